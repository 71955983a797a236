"""Old names of the Python API, which keep working for one version with a DeprecationWarning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    """Warn that ``old`` is deprecated and ``new`` is to be used."""
    warnings.warn(
        f"{old} is deprecated and will be removed in the next version; use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


MOVED_MODULES = {
    "saebench.errors": "saebench.core.errors",
    "saebench.files": "saebench.core.files",
    "saebench.fields": "saebench.core.settings",
    "saebench.codes": "saebench.core.codes",
    "saebench.progress": "saebench.core.progress",
    "saebench.device": "saebench.core.device",
    "saebench.tensors": "saebench.core.tensors",
    "saebench.runfile": "saebench.runs.layout",
    "saebench.course": "saebench.runs.metrics_log",
    "saebench.activations.models": "saebench.sources.models",
    "saebench.activations.text": "saebench.sources.text",
    "saebench.activations.tokens": "saebench.sources.tokenizer",
    "saebench.analysis.mounting": "saebench.analysis.attach",
    "saebench.evaluation.reading": "saebench.evaluation.inference_mode",
    "saebench.training.trainee": "saebench.training.state",
}
"""Modules of saebench 0.1 that scripts may import, and where they are now."""


class MovedModules(MetaPathFinder, Loader):
    """Imports a module of `MOVED_MODULES` from its new place, with a warning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED_MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED_MODULES[spec.name]
        # What stands between the user's import and this call are frames of importlib, which are not counted.
        warn_renamed(spec.name, new, stacklevel=3)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's there
