"""The embedded text and language model, installed as the package ``saebench_data``."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """Absolute path of one embedded file or folder, such as ``text/state_of_the_union.parquet``.

    Raises FileNotFoundError when the package does not carry it.
    """
    found = _FOLDER / name
    if not found.exists():
        raise FileNotFoundError(f"{name} is not part of the embedded data in {_FOLDER}")
    return found
