"""``Splice``: the sites of a model that an SAE reads, and those that it writes, as edits of a forward pass.

Shapes: B contexts, T positions, P kept positions, D = d_in, E = d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.activations.loader import side_by_side
from saebench.core.errors import UserError
from saebench.saes.spec import SiteWidth

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.sources.models import Model

Edit = Callable[[Tensor], Tensor]
NewRows = Callable[[Tensor, Tensor], Tensor]
"""``new(x, y)``: what replaces the rows y [P, E] at the targets, from the rows x [P, D] at the sites."""


@dataclass(frozen=True)
class Splice:
    """Where an SAE is put into a model.

    An SAE reads and writes one site, and x is y. A transcoder reads its sites earlier in the same forward
    pass than it writes its targets. A crosscoder, which writes all that it reads, is given the activations of
    the unchanged model.
    """

    sites: tuple[SiteWidth, ...]
    targets: tuple[SiteWidth, ...]

    @classmethod
    def of(cls, sae: SAE, hook: str) -> Splice:
        """That of an SAE which was trained at ``hook``; a transcoder or crosscoder names its sites itself."""
        return cls(sae.spec.sites, sae.spec.targets) if sae.spec.sites else cls.at(hook, sae.d_in)

    @classmethod
    def at(cls, hook: str, width: int) -> Splice:
        """That of an SAE which reads and writes one site."""
        one = (SiteWidth(hook, width),)
        return cls(one, one)

    def require_one_model(self) -> None:
        """Raise a UserError when the sites are of several models (named "0:SITE", "1:SITE")."""
        if any(name.partition(":")[0].isdigit() for name in self.names):
            raise UserError(
                f"the SAE reads sites of several models ({', '.join(self.names)}), so it cannot be put into "
                "one of them; leave the model out"
            )

    @property
    def is_plain(self) -> bool:
        """Whether one site is read and written."""
        return len(self.sites) == 1 and self.sites == self.targets

    @property
    def needs_clean(self) -> bool:
        """Whether `edits` needs the activations of the unchanged model, because targets change them."""
        return not self.is_plain and bool({site.name for site in self.sites} & self.target_names)

    @property
    def target_names(self) -> set[str]:
        return {site.name for site in self.targets}

    @property
    def names(self) -> list[str]:
        """All sites and targets, each once."""
        return list(dict.fromkeys(site.name for site in (*self.sites, *self.targets)))

    def rows(self, cache: ActivationCache, row_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [N, D] of some rows of a cache, and y [N, E] if it is not x."""

        def of(sites: Sequence[SiteWidth]) -> Tensor:
            return side_by_side([cache.verified(site.name) for site in sites], row_N)

        return of(self.sites), None if self.targets == self.sites else of(self.targets)

    def input_of(self, found: Mapping[str, Tensor]) -> Tensor:
        """[..., D] the activations at the sites, side by side."""
        return _joined(found, self.sites)

    def target_of(self, found: Mapping[str, Tensor]) -> Tensor:
        """[..., E] the activations, or gradients, at the targets, side by side."""
        return _joined(found, self.targets)

    def read(self, model: Model, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and y [B, T, E] of the unchanged model."""
        found = model.run_to(tokens_BT, self.names)
        return self.input_of(found), self.target_of(found)

    def edits(self, keep_BT: Tensor, new: NewRows, *, clean_BTD: Tensor | None = None) -> dict[str, Edit]:
        """The ``edit`` of `Model.logits` that replaces the targets at the kept positions.

        Args:
            clean_BTD: the activations of the unchanged model at the sites, where ``needs_clean``.
        """
        if self.is_plain:
            return {self.sites[0].name: replace_at(keep_BT, lambda x_PD: new(x_PD, x_PD))}
        read: dict[str, Tensor] = {}
        if clean_BTD is not None:
            widths = [site.width for site in self.sites]
            for site, part_BTd in zip(self.sites, torch.split(clean_BTD, widths, dim=-1), strict=True):
                read[site.name] = part_BTd[keep_BT.to(part_BTd.device)]

        def remember(name: str) -> Edit:
            def edit(x_BTd: Tensor) -> Tensor:
                read[name] = x_BTd[keep_BT.to(x_BTd.device)]
                return x_BTd

            return edit

        def write(position: int) -> Edit:
            first = sum(target.width for target in self.targets[:position])
            columns = slice(first, first + self.targets[position].width)

            def rows(y_Pe: Tensor) -> Tensor:
                missing = [site.name for site in self.sites if site.name not in read]
                if missing:
                    raise UserError(
                        f"the model computes the target {self.targets[position].name} before {missing[0]}, "
                        "which the transcoder reads; train one whose target comes later"
                    )
                x_PD = torch.cat([read[site.name] for site in self.sites], dim=-1)
                # Each target is written when it is computed; the columns of the others are not used.
                y_PE = y_Pe.new_zeros(len(y_Pe), sum(target.width for target in self.targets))
                y_PE[:, columns] = y_Pe
                return new(x_PD, y_PE)[:, columns]

            return replace_at(keep_BT, rows)

        made = {} if clean_BTD is not None else {site.name: remember(site.name) for site in self.sites}
        return made | {target.name: write(i) for i, target in enumerate(self.targets)}


def all_edits(of_each: Iterable[dict[str, Edit]], targets: Sequence[set[str]]) -> dict[str, Edit]:
    """The edits of several splices in one forward pass: each reads what those before it have written.

    Raises:
        UserError: two of them write one site.
    """
    writers: dict[str, Edit] = {}
    readers: dict[str, list[Edit]] = {}
    for edits, names in zip(of_each, targets, strict=True):
        for name, edit in edits.items():
            if name not in names:
                readers.setdefault(name, []).append(edit)
            elif name in writers:
                raise UserError(f"two runs write {name}; evaluate them together with one run for each site")
            else:
                writers[name] = edit
    return {name: _in_turn([*filter(None, [writers.get(name)]), *readers.get(name, [])])
            for name in {**writers, **readers}}  # fmt: skip


def _in_turn(edits: Sequence[Edit]) -> Edit:
    def edit(x_BTd: Tensor) -> Tensor:
        for one in edits:
            x_BTd = one(x_BTd)
        return x_BTd

    return edit


def replace_at(keep_BT: Tensor, new: Callable[[Tensor], Tensor]) -> Edit:
    """An edit for `Model.logits` that replaces the rows [P, D] at the kept positions with ``new(rows)``."""

    def edit(x_BTD: Tensor) -> Tensor:
        keep = keep_BT.to(x_BTD.device)
        edited_BTD = x_BTD.clone()
        edited_BTD[keep] = new(x_BTD[keep]).to(x_BTD)
        return edited_BTD

    return edit


def _joined(found: Mapping[str, Tensor], sites: Sequence[SiteWidth]) -> Tensor:
    if len(sites) == 1:
        return found[sites[0].name]
    return torch.cat([found[site.name] for site in sites], dim=-1)
