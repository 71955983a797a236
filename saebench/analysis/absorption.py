"""Latents that have swallowed another one: specific ones that fire where a general one should and does not.

Absorption is Chanin et al.'s (2024, arXiv 2409.14507): where a feature implies a more general one, a sparse
code saves a latent by writing both with the specific latent alone, so that the general one has holes. They
know what a token should show from a probe; here the general latent's own decoder direction is the probe.

Shapes: N rows, D = d_in, M = d_sae, J candidates of each latent, E entries of codes that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.analysis.attach import open_for, read_sae
from saebench.core.errors import UserError
from saebench.core.progress import progress
from saebench.evaluation.measure import require_width
from saebench.evaluation.samples import first_rows
from saebench.saes.base import SAE
from saebench.store.geometry import nearest_rows

if TYPE_CHECKING:
    import pandas as pd

    from saebench.activations.cache import ActivationCache
    from saebench.core.progress import Progress

CANDIDATES = 16
TYPICAL = 0.1
"""The quantile of what falls to a latent where it fires that it should get."""
LESS_BACKWARDS = 0.5
BLOCK_BYTES = 2**27


@torch.no_grad()
def absorbed(
    sae: SAE | str | PathLike[str],
    cache: ActivationCache | str | PathLike[str] | None = None,
    *,
    hook: str | None = None,
    rows: int = 65_536,
    share: float = 0.6,
    cosine: float = 0.2,
    at_least: int = 10,
    quiet: bool = False,
) -> pd.DataFrame:
    """Pairs of latents (general g, specific s) such that s takes the place of g on the tokens it fires on.

    With x a row, x_hat its reconstruction and p the unit decoder row of g, what falls to g there is
    u = (x - x_hat + z_g d_g) . p: its own part and what nobody explains. Its ``typical`` amount t is the 10%
    quantile of u over the rows where g fires, each with the weight u^2, so that faint firings, which fill
    up what k allows, count for little. A row is absorbed when s fires and

        u  <  t  <=  u + z_s d_s . p,

    that is, without s at least a typical amount would fall to g, and with s it does not. ``share`` of the
    rows where s fires must be absorbed, and less than half as much the other way round: latents that are
    alike (siblings, copies) stand in for each other both ways, a part and its whole do not. And s must be the
    rarer one, since a dense latent with large values writes a little of everything.

    A row for each pair, the largest share first: general, specific, share, n_absorbed, n_silent (of these,
    where g does not fire at all: absorption in full, as Chanin et al. count it), n_specific (rows where s
    fires), n_general, cosine (of the decoder rows), typical (t), written (the mean of z_s d_s . p over the
    absorbed rows). The direction of g is in the place of their probe and t in that of their threshold; this
    reading is ours, and finds candidates to look at, not proofs: a latent that is merely like g counts too.

    >>> found = sb.absorbed(run, cache, rows=500, quiet=True)
    >>> bool((found.n_silent <= found.n_absorbed).all())
    True

    Args:
        sae: a run directory, or an SAE in memory.
        cache: rows to look at; by default those that the SAE was trained on.
        hook: which rows of the cache it reads; by default where it was trained.
        rows: so many of the cache's held-out rows, at most.
        share: of the rows of s, how many must be absorbed.
        cosine: candidates for g are the 16 latents with the nearest decoder rows, down to this cosine.
        at_least: a latent that fires on fewer rows is not judged.
        quiet: no progress display.

    Raises:
        UserError: no such SAE, cache or hook, rows of another width or that are not finite, no held-out
            rows, or a number that makes no sense.
    """
    for name, value in (("share", share), ("cosine", cosine)):
        if not 0 < value <= 1:
            raise UserError(f"{name} is {value}; give a number above 0 and at most 1")
    for name, value in (("rows", rows), ("at_least", at_least)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    loaded, origin = read_sae(sae, "sae")
    opened = open_for(sae, cache=cache)
    place = opened.resolve_hook(hook or origin.hook_name)
    require_width(opened.d_in(place), loaded, place, opened.path)
    row_N = first_rows(opened.held_out, True, limit=rows)
    if len(row_N) == 0:
        raise UserError(
            f"none of the {opened.n_rows:,} rows of {opened.path} is held out from training; give a cache of "
            "more documents"
        )
    with progress("absorption", total=3 * len(row_N), unit="tok", quiet=quiet) as bar:
        reader = _Reader(loaded, opened, place, row_N, bar)
        typical_M, fires_M = _typical(reader)
        return _pairs(reader, typical_M, fires_M, share=share, cosine=cosine, at_least=at_least)


class _Reader:
    """Rows of a cache, encoded batch by batch."""

    def __init__(self, sae: SAE, cache: ActivationCache, hook: str, row_N: Tensor, bar: Progress) -> None:
        self.sae, self._cache, self._hook, self._row_N, self._bar = sae, cache, hook, row_N, bar
        self.norm_M = sae.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Row in the batch, latent and value of each entry [E], and the errors [N, D]."""
        size = max(1, BLOCK_BYTES // (8 * self.sae.d_sae))
        for part_N in torch.split(self._row_N, size):
            x_ND = self._cache.activations(self._hook)[part_N].float().to(self.sae.W_dec.device)
            if not x_ND.isfinite().all():
                raise UserError(
                    f"held-out rows of {self._cache.path} at {self._hook} hold NaN or infinity; harvest "
                    "again in bf16 or fp32"
                )
            codes = self.sae.encode(x_ND)
            row_E, latent_E, value_E = codes.merged()
            yield row_E, latent_E, value_E, x_ND - self.sae.decode(codes)
            self._bar.update(len(part_N))

    def along(
        self, row_E: Tensor, latent_E: Tensor, value_E: Tensor, error_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The error along every latent's unit decoder row, and z |d| of every latent: [N, M] each, on the
        CPU."""
        error_NM = error_ND @ (self.sae.W_dec / self.norm_M[:, None]).T
        part_NM = torch.zeros_like(error_NM)
        part_NM[row_E, latent_E] = value_E * self.norm_M[latent_E]
        return error_NM.cpu(), part_NM.cpu()


def _typical(reader: _Reader) -> tuple[Tensor, Tensor]:
    """[M] each: the typical amount that falls to a latent where it fires (infinity if nowhere), and how often
    it fires."""
    latents, amounts = [], []
    for row_E, latent_E, value_E, error_ND in reader.batches():
        error_NM, part_NM = reader.along(row_E, latent_E, value_E, error_ND)
        row_E, latent_E = row_E.cpu(), latent_E.cpu()
        latents.append(latent_E)
        amounts.append((error_NM + part_NM)[row_E, latent_E])
    latent_E, amount_E = torch.cat(latents), torch.cat(amounts)
    order_E = amount_E.argsort()
    order_E = order_E[latent_E[order_E].argsort(stable=True)]  # by latent, then by amount
    weight_E = amount_E[order_E].double().clamp_min(0).square()
    fires_M = torch.bincount(latent_E, minlength=reader.sae.d_sae)
    total_M = torch.zeros(reader.sae.d_sae, dtype=torch.float64).index_add_(0, latent_E[order_E], weight_E)
    wanted_M = total_M.cumsum(0) - total_M + TYPICAL * total_M
    at_M = torch.searchsorted(weight_E.cumsum(0), wanted_M).clamp_max(max(len(order_E) - 1, 0))
    typical_M = torch.full((reader.sae.d_sae,), torch.inf)
    typical_M[total_M > 0] = amount_E[order_E][at_M[total_M > 0]]
    return typical_M, fires_M


def _pairs(
    reader: _Reader, typical_M: Tensor, fires_M: Tensor, *, share: float, cosine: float, at_least: int
) -> pd.DataFrame:
    import pandas as pd

    general_MJ, cosine_MJ = nearest_rows(reader.sae.W_dec, CANDIDATES)
    absorbed_MJ, silent_MJ = (torch.zeros(general_MJ.shape, dtype=torch.int64) for _ in range(2))
    written_MJ = torch.zeros(general_MJ.shape, dtype=torch.float64)
    for row_E, latent_E, value_E, error_ND in reader.batches():
        error_NM, part_NM = reader.along(row_E, latent_E, value_E, error_ND)
        latent_E, row_E1 = latent_E.cpu(), row_E.cpu()[:, None]
        general_EJ = general_MJ[latent_E]
        own_EJ = part_NM[row_E1, general_EJ]
        written_EJ = part_NM[row_E1, latent_E[:, None]] * cosine_MJ[latent_E]
        hit_EJ = _makes_up(error_NM[row_E1, general_EJ] + own_EJ, written_EJ, typical_M[general_EJ])
        absorbed_MJ.index_add_(0, latent_E, hit_EJ.long())
        silent_MJ.index_add_(0, latent_E, (hit_EJ & (own_EJ == 0)).long())
        written_MJ.index_add_(0, latent_E, torch.where(hit_EJ, written_EJ, 0.0).double())
    share_MJ = absorbed_MJ / fires_M[:, None].clamp_min(1)
    enough_M = fires_M >= at_least
    kept_MJ = (cosine_MJ >= cosine) & (share_MJ >= share) & enough_M[:, None] & enough_M[general_MJ]
    kept_MJ &= fires_M[:, None] < fires_M[general_MJ]
    specific_P, j_P = kept_MJ.nonzero(as_tuple=True)
    general_P = general_MJ[specific_P, j_P]
    frame = pd.DataFrame(
        {
            "general": general_P.numpy(),
            "specific": specific_P.numpy(),
            "share": share_MJ[kept_MJ].numpy(),
            "n_absorbed": absorbed_MJ[kept_MJ].numpy(),
            "n_silent": silent_MJ[kept_MJ].numpy(),
            "n_specific": fires_M[specific_P].numpy(),
            "n_general": fires_M[general_P].numpy(),
            "cosine": cosine_MJ[kept_MJ].numpy(),
            "typical": typical_M[general_P].numpy(),
            "written": (written_MJ[kept_MJ] / absorbed_MJ[kept_MJ]).float().numpy(),
        }
    )
    back_P = _backwards(reader, general_P, specific_P, cosine_MJ[kept_MJ], typical_M) / fires_M[general_P]
    frame = frame[(back_P < LESS_BACKWARDS * share_MJ[kept_MJ]).numpy()]
    return frame.sort_values(["share", "n_absorbed"], ascending=False, kind="stable", ignore_index=True)


def _backwards(
    reader: _Reader, general_P: Tensor, specific_P: Tensor, cosine_P: Tensor, typical_M: Tensor
) -> Tensor:
    """[P] int64: rows where the general latent stands in for the specific one."""
    found_P = torch.zeros(len(general_P), dtype=torch.int64)
    if len(general_P) == 0:
        return found_P
    for batch in reader.batches():
        error_NM, part_NM = reader.along(*batch)
        for some in torch.split(torch.arange(len(general_P)), max(1, BLOCK_BYTES // (16 * len(error_NM)))):
            general, specific = general_P[some], specific_P[some]
            written = part_NM[:, general] * cosine_P[some]
            left = error_NM[:, specific] + part_NM[:, specific]
            hit = _makes_up(left, written, typical_M[specific])
            found_P[some] += (hit & (part_NM[:, general] != 0)).sum(0)
    return found_P


def _makes_up(left: Tensor, written: Tensor, typical: Tensor) -> Tensor:
    """Where what is left is less than a typical amount, and with what was written it is not."""
    return (left < typical) & (left + written >= typical)
