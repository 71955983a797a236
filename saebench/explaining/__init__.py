"""Explanations of latents in words: rules found and scored by counting, or answers of a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.explaining.grammar import apply_rule, describe
    from saebench.explaining.run import explain

_HOMES = {"apply_rule": "grammar", "describe": "grammar", "explain": "run"}

__all__ = ["apply_rule", "describe", "explain"]

__getattr__ = lazy_names(__name__, _HOMES)
