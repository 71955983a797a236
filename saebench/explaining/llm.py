"""Explanations by a language model, scored by detection and fuzzing.

The model is shown examples of a feature and says what they have in common. It is then asked about other
examples, with this explanation, and its answers are compared with the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saebench.core.hashing import hash_random
from saebench.explaining import prompting
from saebench.explaining.provider import Provider, Question, Reply
from saebench.explaining.rules import LEAST_FIRINGS, blocks
from saebench.explaining.sampling import Examples, Sampler, Window
from saebench.explaining.scored_items import score_items
from saebench.explaining.token_index import TokenIndex
from saebench.store.folds import TEST, TRAIN

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

Record = dict[str, Any]


class OutOfBudget(Exception):
    """The next questions could take more tokens than the budget has left."""


class LlmExplainer:
    """Explains the features of one store by asking ``provider``."""

    def __init__(
        self, store: FeatureStore, provider: Provider, *, n: int, window: int, seed: int, budget: int | None
    ) -> None:
        self.store, self.provider, self.n, self.seed, self.budget = store, provider, n, seed, budget
        self.index = TokenIndex(store)
        self.sampler = Sampler(self.index, n=n, window=window, seed=seed)
        self._prompt = prompting.version()
        self.version = f"{self._prompt} {provider.version}".strip()
        self._spent = 0
        self._window = window

    def explain(self, features: Sequence[int]) -> Iterator[Record]:
        """A record for each of ``features``; stops when the budget does not allow another one."""
        n_act = self.store.features(["n_act"])["n_act"].to_numpy()
        for block in blocks(features, n_act):
            fired = self.index.firings(self.store, block[0], block[-1] + 1)
            for feature in block:
                try:
                    yield self._explain(feature, *fired[feature - block[0]])
                except OutOfBudget:
                    return

    def finish(self, records: Sequence[Record]) -> None:
        """Does nothing: each record is complete."""

    def forecast(self, n_features: int) -> str:
        calls = n_features * (1 + 4 * self.n)
        tokens = n_features * (self.n * self._window + 4 * self.n * (self._window + 120) + 200)
        limit = f", at most {self.budget:,} of them" if self.budget else ""
        return (
            f"{n_features:,} features: at most {calls:,} questions to {self.provider.model} "
            f"and, very roughly, {tokens:,} tokens{limit}"
        )

    def _explain(self, feature: int, row_R: Any, value_R: Any) -> Record:
        fold_R = self.index.fold_N[row_R]
        n_train, n_test = int((fold_R == TRAIN).sum()), int((fold_R == TEST).sum())
        record: Record = {
            "feature": feature,
            "provider": self.provider.name,
            "model": self.provider.model,
            "prompt": self._prompt,
            "text": None,
            "rule": None,
            "status": "ok",
            "reason": None,
            "n_train": n_train,
            "n_test": n_test,
            "tokens": 0,
            "scores": [],
            "items": [],
        }
        if min(n_train, n_test) < LEAST_FIRINGS:
            reason = (
                f"it fires on {n_train} tokens of the documents from which examples are shown and on "
                f"{n_test} of those on which explanations are scored; both take {LEAST_FIRINGS}"
            )
            return record | {"status": "few", "reason": reason}
        examples = self.sampler.draw(feature, row_R, value_R)
        [reply] = self._ask([prompting.explain(examples.shown, self.index.vocab)], record)
        if reply.status != "ok":
            return record | {"status": reply.status, "reason": reply.reason}
        text = prompting.read_explanation(reply.text)
        if text is None:
            reason = f"the answer {reply.text[:80]!r} is no explanation"
            return record | {"status": "unparsed", "reason": reason}
        record["text"] = text
        for scorer, asked in self._tests(feature, text, examples).items():
            replies = self._ask([question for question, _ in asked], record)
            items = [
                _item(scorer, rank, facts, reply)
                for rank, ((_, facts), reply) in enumerate(zip(asked, replies, strict=True))
            ]
            record["items"] += items
            record["scores"].append(score_items(scorer, items, self.seed))
        return record

    def _tests(
        self, feature: int, text: str, examples: Examples
    ) -> dict[str, list[tuple[Question, dict[str, Any]]]]:
        """For each scorer, questions with the facts about them: window, marks and truth."""
        vocab = self.index.vocab
        detection = [
            (prompting.detection(text, window, vocab), _facts(window, (), truth))
            for truth, windows in ((True, examples.positive[: self.n]), (False, examples.negative))
            for window in windows
        ]
        right = examples.positive[: self.n]
        wrong = examples.positive[self.n :] or right
        fuzzing = [
            (prompting.fuzzing(text, window, marks, vocab), _facts(window, marks, truth))
            for truth, windows in ((True, right), (False, wrong))
            for window in windows
            if (marks := window.fires if truth else self._elsewhere(feature, window))
        ]
        return {"detection": detection, "fuzzing": fuzzing}

    def _elsewhere(self, feature: int, window: Window) -> tuple[int, ...]:
        """As many positions as the window has firings, drawn from visible tokens that do not fire."""
        silent = np.array(
            [
                window.start + i
                for i, token in enumerate(window.tokens)
                if window.start + i not in window.fires and self.index.vocab[token].strip()
            ],
            dtype=np.int64,
        )
        order = np.argsort(hash_random(silent + window.ctx * 65_536, feature, self.seed), kind="stable")
        return tuple(sorted(silent[order[: len(window.fires)]].tolist()))

    def _ask(self, questions: list[Question], record: Record) -> list[Reply]:
        most = sum(question.most_tokens for question in questions)
        if self.budget is not None and self._spent + most > self.budget:
            raise OutOfBudget
        replies = self.provider.ask(questions)
        self._spent += sum(reply.tokens for reply in replies if not reply.kept)
        record["tokens"] += sum(reply.tokens for reply in replies)
        return replies


def _facts(window: Window, marks: Sequence[int], truth: bool) -> dict[str, Any]:
    return {
        "doc": window.doc,
        "ctx": window.ctx,
        "start": window.start,
        "n_shown": len(window.tokens),
        "marked": list(marks),
        "truth": truth,
    }


def _item(scorer: str, rank: int, facts: dict[str, Any], reply: Reply) -> dict[str, Any]:
    status: str = reply.status
    verdict: bool | None = None
    if status == "ok":
        verdict = (
            prompting.read_verdict(reply.text) if reply.probability is None else reply.probability >= 0.5
        )
        status = "unparsed" if verdict is None else "ok"
    probability = reply.probability if status == "ok" else None
    item = {"scorer": scorer, "rank": rank, **facts, "verdict": verdict}
    return item | {"probability": probability, "status": status}
