"""Two SAEs of a store and how their features are matched: what the Compare page shows, as a URL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import streamlit as st

from saebench.core.errors import UserError
from saebench.store.query import FeatureStore
from saebench_app.runs import finished_runs
from saebench_app.view import whole
from saebench_app.work import Found, Task, found, weights

WAYS = {"decoder": "decoder directions", "activation": "activations"}
SIDES = {"pairs": "pairs", "a": "only in a", "b": "only in b", "splits": "splits"}
ORDERS = ("similarity", "a", "b")
THRESHOLD = 0.7


@dataclass(frozen=True)
class Comparison:
    """What this page's own part of the URL says: which two SAEs, how matched, which list, which pair."""

    a: str
    b: str
    by: str = "decoder"
    side: str = "pairs"
    rank: str = "similarity"
    turned: bool = False
    """Whether the list is in the order that is not the usual one of ``rank``."""
    at: int = 1
    fa: int | None = None
    fb: int | None = None

    @classmethod
    def read(cls, saes: list[str], sae: str) -> Comparison:
        params = st.query_params
        a = params.get("a", sae)
        b = params.get("b", next((name for name in saes if name != a), a))
        for name in (a, b):
            if name not in saes:
                raise UserError(f"{name!r} is not an SAE of this store; there is {', '.join(saes)}")
        by, side, rank = (params.get(name, "") for name in ("by", "side", "rank"))
        return cls(
            a, b, by if by in WAYS else "decoder", side if side in SIDES else "pairs",
            rank if rank in ORDERS else "similarity", params.get("turned") == "1",
            max(whole(params.get("at")) or 1, 1), whole(params.get("fa")), whole(params.get("fb")),
        )  # fmt: skip

    def written(self) -> dict[str, int | str]:
        standard = Comparison(self.a, self.b)
        own: dict[str, int | str] = {"a": self.a, "b": self.b}
        for name in ("by", "side", "rank", "turned", "at", "fa", "fb"):
            value = getattr(self, name)
            if value is not None and value != getattr(standard, name):
                own[name] = int(value) if isinstance(value, bool) else value
        return own

    def ascending(self) -> bool:
        """Similarities begin with the largest, numbers of features with the smallest."""
        return self.turned == (self.rank == "similarity")

    def but(self, **changes: Any) -> dict[str, int | str]:
        """The same with changes, as ``written`` gives it."""
        return replace(self, **changes).written()


def match_task(this: Comparison, a: FeatureStore, b: FeatureStore) -> Task | None:
    """The work that matches the two; None when no runs are known to do it with."""
    infos, runs = (a.info(), b.info()), [str(run) for run in finished_runs()]
    identity = [*(info["sae_hash"] for info in infos), this.by, THRESHOLD]
    if this.by == "activation":
        identity.append(infos[0]["cache_hash"])
    one, other = map(weights, infos)
    given = {"runs": runs, "a": one, "b": other, "by": this.by, "threshold": THRESHOLD}
    task = Task("match", given, tuple(identity))
    return task if runs or found(task) is not None else None


def frames_of(result: Found) -> dict[str, pd.DataFrame]:
    """Side -> a row a pair: a, b, similarity."""
    pairs, unmatched = result.tables["pairs"], result.tables["unmatched"]
    made = {"pairs": pairs.rename(columns={"feature_a": "a", "feature_b": "b"})[["a", "b", "similarity"]]}
    for side, other in (("a", "b"), ("b", "a")):
        alone = unmatched[unmatched["side"] == side]
        made[side] = alone.rename(columns={"feature": side, "best": other})[["a", "b", "similarity"]]
    if "splits" in result.tables:
        narrow = result.facts["narrow"]
        names = {"feature_a": narrow, "feature_b": "b" if narrow == "a" else "a", "cosine": "similarity"}
        made["splits"] = result.tables["splits"].rename(columns=names)[["a", "b", "similarity"]]
    return made
