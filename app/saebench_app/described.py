"""The name of a feature: a person's label, else its explanation, else its top token with its share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saebench.core.formatting import is_absent, share, visible
from saebench.store.query import FeatureStore

COLUMNS = ("feature", "density", "max_act", "top_token", "top_token_share", "explanation")


@dataclass(frozen=True)
class Described:
    feature: int
    density: float
    max_act: float
    label: str
    explanation: str
    top_token: str
    top_token_share: float
    """Share of its activations that are on the top token."""

    @property
    def words(self) -> str:
        """One line: its label, its explanation, or its top token with its share; '' where there is none."""
        if self.label or self.explanation:
            return self.label or self.explanation
        return f"top token {self.top_token} ({share(self.top_token_share)})" if self.top_token else ""


def describe(store: FeatureStore, features: Iterable[int]) -> dict[int, Described]:
    """Feature -> its name and statistics."""
    wanted = sorted(set(features))
    if not wanted:
        return {}
    named = store.annotations.labels()
    labels = dict(zip(named["feature"].tolist(), named["label"].tolist(), strict=True))
    rows = store.features(COLUMNS, among=wanted).to_dict("records")
    return {
        int(row["feature"]): Described(
            int(row["feature"]),
            float(row["density"]),
            float(row["max_act"]),
            _line(labels.get(row["feature"])),
            _line(row["explanation"]),
            "" if is_absent(row["top_token"]) else visible(row["top_token"], spaces="edges"),
            float("nan") if is_absent(row["top_token_share"]) else float(row["top_token_share"]),
        )
        for row in rows
    }


def _line(text: object) -> str:
    return "" if text is None or is_absent(text) else visible(str(text))
