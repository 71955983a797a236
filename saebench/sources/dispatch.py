"""Dispatcher: which of its two paths serves a site of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from saebench.core.errors import UserError
from saebench.sources.bridge import BridgePath
from saebench.sources.family_sites import EXPERTS
from saebench.sources.hook_names import unknown_hook
from saebench.sources.model_info import ModelInfo
from saebench.sources.native_path import NativePath

PathName = Literal["native", "bridge"]
ModelPath = NativePath | BridgePath


class Dispatcher:
    """Sends hooks that the table of families has, and module paths, to ``native``; others to ``bridge``."""

    def __init__(self, info: ModelInfo, native: NativePath, bridge: BridgePath) -> None:
        self._info = info
        self._native = native
        self._bridge = bridge
        self._paths: dict[str, PathName] = {}

    def hook_names(self) -> list[str]:
        """All TransformerLens names that the model has."""
        return list(dict.fromkeys([*self._native.names(), *self._bridge.names()]))

    def path_of(self, hook: str) -> PathName:
        """See `Model.path_of`."""
        if hook not in self._paths:
            self._info.check_hook(hook)
            if self._native.site(hook) is not None:
                self._paths[hook] = "native"
            elif reason := self._native.why_not(hook):
                raise UserError(f"--site {hook} is not a hook of {self._info.name}: {reason}")
            elif hook in self._bridge.names():
                if self._bridge.is_stand_in(hook):
                    raise UserError(f"--site {hook} is not a hook of {self._info.name}: {EXPERTS}")
                self._paths[hook] = "bridge"
            else:
                raise UserError(unknown_hook(hook, self.hook_names(), self._info.name))
        return self._paths[hook]

    def by_path(self, hooks: Sequence[str]) -> Iterator[tuple[ModelPath, list[str]]]:
        """The paths that ``hooks`` need, with those of them that each reads."""
        names = {hook: self.path_of(hook) for hook in hooks}
        paths: dict[PathName, ModelPath] = {"native": self._native, "bridge": self._bridge}
        for name, path in paths.items():
            if own := [hook for hook in hooks if names[hook] == name]:
                yield path, own

    def path_for(self, hooks: Sequence[str]) -> ModelPath:
        """The path on which all of ``hooks`` can be replaced in one forward pass."""
        used = {hook: self.path_of(hook) for hook in hooks}
        if not used:
            return self._native if self._info.family else self._bridge
        if "bridge" not in used.values():
            return self._native
        for hook in hooks:
            if used[hook] == "native" and hook not in self._bridge.names():
                other = next(name for name in hooks if used[name] == "bridge")
                raise UserError(
                    f"{hook} and {other} cannot be replaced in one forward pass: only TransformerLens has "
                    "the second, and it lacks the first; replace one of them"
                )
        return self._bridge
