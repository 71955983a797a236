"""NativePath: a language model of transformers, read through forward hooks on its own modules.

Shapes: B contexts, T positions, D width of a hook, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from saebench.sources.families import Family
from saebench.sources.family_sites import FamilySites
from saebench.sources.hook_names import is_between_blocks
from saebench.sources.native import EditFunction, ModuleSites, Site, parse_site


class NativePath:
    """Reads and replaces activations at hooks of the model's family, and at module paths.

    ``load`` makes the model of transformers when it is first needed. ``family`` is its entry of the table,
    or None: then only module paths have sites. ``name`` is what error sentences call the model.
    """

    def __init__(self, name: str, family: Family | None, load: Callable[[], Any]) -> None:
        self.name = name
        self.family = family
        self._load = load
        self._readers: dict[tuple[str, ...], ModuleSites] = {}

    @cached_property
    def module(self) -> Any:
        """The model of transformers."""
        return self._load()

    @cached_property
    def _sites(self) -> FamilySites | None:
        return None if self.family is None else FamilySites(self.module, self.family)

    @property
    def text(self) -> Any:
        """The submodule that holds the blocks."""
        assert self._sites is not None
        return self.module.get_submodule(self._sites.root)

    def names(self) -> list[str]:
        """Hook names of the family that the model has."""
        return [] if self._sites is None else self._sites.names()

    def why_not(self, hook: str) -> str | None:
        """Why an architecture of this family has no such hook; None when the table does not say so."""
        site = self._sites.get(hook) if self._sites else None
        return site if isinstance(site, str) else None

    def site(self, hook: str) -> Site | None:
        """The site of a hook name or module path; None when there is none."""
        site = self._sites.get(hook) if self._sites else None
        if isinstance(site, Site):
            return site
        if hook.partition(".")[0] in ("blocks", "embed", "unembed", "ln_final") and self._sites:
            return None  # a TransformerLens name
        parsed = parse_site(hook)
        return parsed if parsed.path in self._paths else None

    @cached_property
    def _paths(self) -> frozenset[str]:
        return frozenset(path for path, _ in self.module.named_modules() if path)

    def hook_name(self, hook: str) -> str:
        """The TransformerLens name of a module path where it has one; otherwise ``hook`` itself."""
        if self._sites is None or self._sites.get(hook) is not None:
            return hook
        site = self.site(hook)
        return (self._sites.name_of(site) if site else None) or hook

    def read(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """The value at each hook; modules after the last one needed are not computed."""
        return self._at(hooks).read(lambda: self._run(tokens_BT))

    def logits(self, tokens_BT: Tensor, edits: Mapping[str, EditFunction]) -> Tensor:
        """Logits [B, T, V]; each function replaces the activations at its hook."""
        with self._at(list(edits)).editing(edits):
            return self._run(tokens_BT)

    def variants(self, tokens_1T: Tensor, hook: str, x_FTD: Tensor) -> Tensor | None:
        """Logits [F, T, V] with one pass up to the hook; None where the model cannot branch at it."""
        if not is_between_blocks(self.hook_name(hook)) or self.family is None or self.family.alibi:
            return None
        return self.logits(tokens_1T, {hook: lambda _: x_FTD})

    def tracked_logits(self, tokens_BT: Tensor, hooks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, T, V], and the value at each hook as a tensor of their graph."""
        with self._at(hooks).tracking() as found:
            return self._run(tokens_BT), found

    def _at(self, hooks: Sequence[str]) -> ModuleSites:
        key = tuple(hooks)
        if key not in self._readers:
            sites = {hook: self.site(hook) for hook in hooks}
            self._readers[key] = ModuleSites(
                self.module, {hook: site for hook, site in sites.items() if site}, name=self.name
            )
        return self._readers[key]

    def _run(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.module(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV
