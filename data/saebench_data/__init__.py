"""The embedded text and language model, installed as the package ``saebench_data``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CHECKSUMS = "checksums.json"
"""SHA-256 of every file in demo_model and text."""


def path(name: str) -> Path:
    """Absolute path of one embedded file or folder, such as ``text/state_of_the_union.parquet``.

    Raises FileNotFoundError when the package does not carry it.
    """
    found = FOLDER / name
    if not found.exists():
        raise FileNotFoundError(f"{name} is not part of the embedded data in {FOLDER}")
    return found


def damaged_files(part: str) -> list[str]:
    """The files of ``part`` (``demo_model`` or ``text``) that are missing or differ from their checksum."""
    sums: dict[str, str] = json.loads((FOLDER / CHECKSUMS).read_text(encoding="utf-8"))
    return [name for name, known in sums.items() if name.startswith(part + "/") and _sha256(name) != known]


def _sha256(name: str) -> str | None:
    try:
        return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
    except OSError:
        return None
