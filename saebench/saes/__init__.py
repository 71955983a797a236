"""Sparse autoencoders: the base class in ``base``, and one file per architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.saes.base import SAE, LossTerms

__all__ = ["SAE", "LossTerms"]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "base"))
