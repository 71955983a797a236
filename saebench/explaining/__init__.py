"""What a latent fires on, in words: by rules that are counted exactly, or by asking a language model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saebench.explaining.grammar import apply_rule, describe
    from saebench.explaining.run import explain

_HOMES = {"apply_rule": "grammar", "describe": "grammar", "explain": "run"}

__all__ = ["apply_rule", "describe", "explain"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saebench.explaining' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saebench.explaining.{_HOMES[name]}"), name)
