"""What the Compare page shows: its parameters in the URL, and the job that matches two SAEs."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace

import pandas as pd
import streamlit as st

from saebench.core.errors import UserError
from saebench.store.query import FeatureStore
from saebench_app.runs import finished_runs
from saebench_app.session import Here
from saebench_app.url import Choice, Flag, Query, Text, Whole, parameter
from saebench_app.work import Found, Task, found, weights

WAYS = {"decoder": "decoder directions", "activation": "activations"}
SIDES = {"pairs": "pairs", "a": "only in a", "b": "only in b", "splits": "splits"}
ORDERS = ("similarity", "a", "b")
THRESHOLD = 0.7


@dataclass(frozen=True, kw_only=True)
class Comparison(Query):
    """Which two SAEs are compared, how they are matched, which list is shown, which pair of features."""

    a: str = parameter(MISSING, Text())
    b: str = parameter(MISSING, Text())
    by: str = parameter("decoder", Choice(tuple(WAYS)))
    side: str = parameter("pairs", Choice(tuple(SIDES)))
    rank: str = parameter("similarity", Choice(ORDERS))
    turned: bool = parameter(False, Flag())
    """Whether the list is in the reverse of the usual order of ``rank``."""
    at: int = parameter(1, Whole(1))
    fa: int | None = parameter(None, Whole())
    fb: int | None = parameter(None, Whole())

    @classmethod
    def of(cls, here: Here) -> Comparison:
        """What the URL asks for; by default the SAE that is shown and another one.

        Raises:
            UserError: the store has no SAE of that name.
        """
        saes = here.store.saes
        a = st.query_params.get("a", here.store.sae)
        b = st.query_params.get("b", next((name for name in saes if name != a), a))
        for name in (a, b):
            if name not in saes:
                raise UserError(f"{name!r} is not an SAE of this store; there is {', '.join(saes)}")
        return here.read(cls, a=a, b=b)

    def with_feature(self, side: str, feature: int | None) -> Comparison:
        """The same with another feature of SAE a or b."""
        return replace(self, fa=feature) if side == "a" else replace(self, fb=feature)

    def ascending(self) -> bool:
        """Similarities begin with the largest, numbers of features with the smallest."""
        return self.turned == (self.rank == "similarity")


def match_task(this: Comparison, a: FeatureStore, b: FeatureStore) -> Task | None:
    """The job that matches the two SAEs; None when no runs are known to do it with."""
    infos, runs = (a.info(), b.info()), [str(run) for run in finished_runs()]
    identity = [*(info["sae_hash"] for info in infos), this.by, THRESHOLD]
    if this.by == "activation":
        identity.append(infos[0]["cache_hash"])
    one, other = map(weights, infos)
    given = {"runs": runs, "a": one, "b": other, "by": this.by, "threshold": THRESHOLD}
    task = Task("match", given, tuple(identity))
    return task if runs or found(task) is not None else None


def frames_of(result: Found) -> dict[str, pd.DataFrame]:
    """Side -> its pairs, one per row: a, b, similarity."""
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
