"""The warnings of a training, in RUN/warnings.json: what a reader of its results must know."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from saebench.core.errors import UserError
from saebench.core.files import write_json_atomic
from saebench.core.reading import read_json
from saebench.runs.layout import WARNINGS_FILE


def write_warnings(directory: Path, sentences: Sequence[str]) -> None:
    """Write warnings.json, or remove it where there is none."""
    file = directory / WARNINGS_FILE
    if sentences:
        write_json_atomic(file, {"warnings": list(sentences)})
    else:
        file.unlink(missing_ok=True)


def read_warnings(directory: Path) -> list[str]:
    """The sentences; [] where the training was well, or an earlier version ran it."""
    with contextlib.suppress(UserError):
        found = read_json(directory / WARNINGS_FILE, what="the warnings of the training")
        if isinstance(found, dict) and isinstance(found.get("warnings"), list):
            return [sentence for sentence in found["warnings"] if isinstance(sentence, str)]
    return []
