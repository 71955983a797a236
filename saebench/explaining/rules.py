"""The provider ``rules``: explanations that are found and scored by counting, without a language model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saebench.explaining.grammar import VERSION, Rule, describe
from saebench.explaining.induction import Induction
from saebench.explaining.scoring import RuleScore, RuleScorer
from saebench.explaining.token_index import Rows, TokenIndex
from saebench.store.folds import TEST, TRAIN

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

NAME = "rules"
PROMPT = f"grammar {VERSION}"
LEAST_FIRINGS = 10
"""Firings that each fold must have for a rule to be searched and scored."""
BLOCK = 4_000_000
"""Number of activations that are read at once."""


class RuleExplainer:
    """Explains the features of one store; tables.py describes the records."""

    def __init__(self, store: FeatureStore, seed: int) -> None:
        self.store, self.version = store, PROMPT
        self.index = TokenIndex(store)
        self.induction = Induction(self.index)
        self.scorer = RuleScorer(self.index, seed)

    def explain(self, features: Sequence[int]) -> Iterator[dict[str, Any]]:
        """A record for each of ``features``, in order: the rule, its score and that of the best token."""
        for feature, row_R in self.firings(features):
            yield self._explain(feature, row_R)

    def shuffled(self, records: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """``(record, score)`` of each record that has a rule, scored with the rule of the one before it.

        This is a baseline: a specific rule scores better on its own latent than on another. The first record
        gets the rule of the last one; with only one rule there is no baseline.
        """
        ruled = [record for record in records if record["rule"] is not None]
        if len(ruled) < 2:
            return
        others = {ruled[i]["feature"]: ruled[i - 1]["rule"] for i in range(len(ruled))}
        by_feature = {record["feature"]: record for record in ruled}
        for feature, row_R in self.firings(list(others)):
            rule = json.loads(others[feature])
            test_R = row_R[self.index.fold_N[row_R] == TEST]
            yield by_feature[feature], self._scored("shuffled", rule, test_R)

    def finish(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the baseline scores of `shuffled` to the records."""
        for record, score in self.shuffled(records):
            record["scores"] = [*record["scores"], score]

    def forecast(self, n_features: int) -> str:
        return f"{n_features:,} features, {self.index.n_rows:,} tokens; no model is asked"

    def firings(self, features: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        """The rows on which each of ``features`` fires; activations of nearby features are read together."""
        n_act = self.store.features(["n_act"])["n_act"].to_numpy()
        for block in blocks(features, n_act):
            fired = self.index.firings(self.store, block[0], block[-1] + 1)
            for feature in block:
                yield feature, fired[feature - block[0]][0]

    def _explain(self, feature: int, row_R: Rows) -> dict[str, Any]:
        fold_R = self.index.fold_N[row_R]
        train_R, test_R = row_R[fold_R == TRAIN], row_R[fold_R == TEST]
        record: dict[str, Any] = {
            "feature": feature,
            "provider": NAME,
            "model": "",
            "prompt": PROMPT,
            "text": None,
            "rule": None,
            "status": "ok",
            "reason": None,
            "n_train": len(train_R),
            "n_test": len(test_R),
            "tokens": 0,
            "scores": [],
            "items": [],
        }
        if min(len(train_R), len(test_R)) < LEAST_FIRINGS:
            reason = (
                f"it fires on {len(train_R)} tokens of the documents from which rules are made and on "
                f"{len(test_R)} of those on which they are scored; both take {LEAST_FIRINGS}"
            )
            return record | {"status": "few", "reason": reason}
        rule = self.induction.rule(train_R)
        scores = [
            self._scored("rule", rule, test_R),
            self._scored("best token", self.induction.best_token(train_R), test_R),
        ]
        text = describe(rule, self.index.vocab)
        return record | {"text": text, "rule": json.dumps(rule), "scores": scores}

    def _scored(self, scorer: str, rule: Rule, test_R: Rows) -> dict[str, Any]:
        score: RuleScore = self.scorer.score(self.index.rows_where(rule, TEST), test_R)
        return {"scorer": scorer, **score.to_dict(), "auc": None, "n_failed": 0, "rule": json.dumps(rule)}


def blocks(features: Sequence[int], n_act: Any) -> Iterator[list[int]]:
    """``features``, ascending, in blocks; the range of features of a block has at most BLOCK activations."""
    total = np.concatenate([[0], np.cumsum(n_act)])
    block: list[int] = []
    for feature in features:
        if block and total[feature + 1] - total[block[0]] > BLOCK:
            yield block
            block = []
        block.append(feature)
    if block:
        yield block
