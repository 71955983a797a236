"""What one part of the reliability campaign (``make torture``) reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """One row of the campaign's table: what was tried how often, and every attempt that failed."""

    part: str  # "reads of damaged files"
    unit: str  # what one attempt is: "read", "kill", "crash state"
    attempts: int = 0
    failures: list[str] = field(default_factory=list)  # one line each, with what is needed to repeat it
    notes: dict[str, int] = field(
        default_factory=dict
    )  # other counts, such as {"refused with a sentence": 4100}

    def count(self, name: str, by: int = 1) -> None:
        self.notes[name] = self.notes.get(name, 0) + by
