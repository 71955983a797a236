"""Old names of the Python API, which keep working for one version with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def renamed_arguments(**new_names: str) -> Callable[[FunctionT], FunctionT]:
    """Let a function also take keywords under their old names: ``@renamed_arguments(colour="color")``.

    Raises:
        TypeError: the old and the new name are both given.
    """

    def decorate(function: FunctionT) -> FunctionT:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            for old, new in new_names.items():
                if old in keywords:
                    if new in keywords:
                        raise TypeError(f"{function.__name__} got both {old} and {new}; give {new}")
                    warn_renamed(f"{function.__name__}({old}=...)", f"{function.__name__}({new}=...)")
                    keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate


def renamed(old_name: str, function: FunctionT) -> FunctionT:
    """``function`` under its old name: ``train_course = renamed("train_course", metrics_wide)``."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        warn_renamed(old_name, function.__name__)
        return function(*args, **keywords)

    call.__name__ = old_name
    call.__doc__ = f"Deprecated name of `{function.__name__}`."
    return call  # type: ignore[return-value]


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """The one form of the warning: ``old`` is deprecated, use ``new``."""
    warnings.warn(
        f"{old} is deprecated and will be removed in the next version; use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
