"""Sparse autoencoders: the base contract in ``base``, then one file for each architecture."""

from __future__ import annotations

from typing import Any

__all__ = ["SAE", "LossTerms", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from saebench.saes import base

        return getattr(base, name)
    raise AttributeError(f"module 'saebench.saes' has no attribute {name!r}")
