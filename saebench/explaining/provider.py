"""Questions to a language model, its replies, and the interface of a provider that answers them.

A missing answer has a status and is not counted as a verdict: ``failed`` (no answer in time, or an error),
``refused`` (the model or its server declines) or ``unparsed`` (the answer has no verdict or explanation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["ok", "failed", "refused", "unparsed"]


@dataclass(frozen=True)
class Question:
    """One prompt. With ``yes_or_no`` the answer is yes or no, and may have a probability."""

    system: str
    user: str
    yes_or_no: bool
    max_tokens: int

    @property
    def most_tokens(self) -> int:
        """Estimate of the most tokens that asking this takes, with three bytes per token of the prompt."""
        return (len(self.system.encode()) + len(self.user.encode())) // 3 + self.max_tokens + 16


@dataclass(frozen=True)
class Reply:
    """An answer: its text, or why there is none; the probability of yes; the tokens it took.

    A ``kept`` one was paid for earlier.
    """

    status: Status
    text: str = ""
    probability: float | None = None
    reason: str = ""
    tokens: int = 0
    kept: bool = False


class Provider(Protocol):
    """Answers questions with a language model."""

    name: str
    model: str
    version: str
    """A hash of the model; empty when it is not known."""

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply per question, in order."""


def shown_name(model: str) -> str:
    """The name of a model in a store; for a folder, the folder's name without its path."""
    return Path(model).resolve().name if Path(model).is_dir() else model
