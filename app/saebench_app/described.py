"""What a feature is called: a person's label, else its explanation, else the token it fires on most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saebench.core.formatting import is_absent, visible
from saebench.store.query import FeatureStore

COLUMNS = ("feature", "density", "max_act", "top_token", "explanation")


@dataclass(frozen=True)
class Described:
    feature: int
    density: float
    max_act: float
    label: str
    explanation: str
    top_token: str

    @property
    def words(self) -> str:
        """The best that is known in one line; '' for a feature of which nothing is."""
        if self.label or self.explanation:
            return self.label or self.explanation
        return f"mostly {self.top_token}" if self.top_token else ""


def describe(store: FeatureStore, features: Iterable[int]) -> dict[int, Described]:
    """Each of ``features`` by its number."""
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
        )
        for row in rows
    }


def _line(text: object) -> str:
    return "" if text is None or is_absent(text) else visible(str(text))
