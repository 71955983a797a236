"""absorbed: pairs of latents where a specific latent fires in place of a general one (feature absorption).

Absorption was described by Chanin et al. (2024, arXiv 2409.14507): when one feature implies a more general
one, a sparse code can use a single latent for both, the specific one, so that the general latent does not
fire there. They use a probe to decide where the general feature is present; here the decoder direction of the
general latent is the probe.

Shapes: N rows, D = d_in, M = d_sae, J candidates per latent, E nonzero entries of codes, P pairs.
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
from saebench.core.settings import takes_shown_names
from saebench.evaluation.measure import require_width
from saebench.evaluation.samples import first_rows
from saebench.evaluation.splice import Splice
from saebench.saes.base import SAE
from saebench.store.geometry import nearest_rows

if TYPE_CHECKING:
    import pandas as pd

    from saebench.activations.cache import ActivationCache
    from saebench.core.progress import Progress

CANDIDATES = 16
TYPICAL = 0.1
"""The quantile of a latent's amounts, over the rows where it fires, that counts as its typical amount."""
MOST_REVERSE = 0.5
"""A pair is dropped unless the reverse share is below this fraction of its share."""
BLOCK_BYTES = 2**27


@takes_shown_names
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
    """Pairs of latents (general g, specific s) where s replaces g on the tokens on which s fires.

    Let x be a row, x_hat its reconstruction and p the unit decoder row of g. The amount of g in the row is
    u = (x - x_hat + z_g d_g) . p: its own contribution plus the error of the reconstruction along p. The
    ``typical`` amount t of g is the 10% quantile of u over the rows where g fires, weighted by u^2, so that
    weak activations count for little. A row is absorbed when s fires and

        u  <  t  <=  u + z_s d_s . p,

    that is, without s the amount of g would be at least typical, and with s it is not. A pair is reported
    when at least ``share`` of the rows where s fires are absorbed and the share with g and s exchanged is
    less than half of that (similar latents replace each other in both directions, a specific and a general
    one do not). s must also be the rarer latent, because a dense latent with large values has a part along
    many directions.

    The result has one row per pair, the largest share first: general, specific, share, n_absorbed, n_silent
    (absorbed rows where g does not fire at all: full absorption, as Chanin et al. count it), n_specific (rows
    where s fires), n_general, cosine (of the decoder rows), typical (t), written (mean of z_s d_s . p over
    the absorbed rows). The direction of g takes the place of the probe of Chanin et al., and t that of their
    threshold. This definition is ours. It finds candidates to check, not proofs: a latent that is only
    similar to g can be reported too.

    >>> found = sb.absorbed(run, cache, rows=500, quiet=True)
    >>> bool((found.n_silent <= found.n_absorbed).all())
    True

    Args:
        sae: a run directory, or an SAE in memory.
        cache: the cache whose rows are used; by default the one that the SAE was trained on.
        site: the hook of the cache that the SAE reads; by default the one it was trained at.
        rows: the largest number of held-out rows to use.
        share: the fraction of the rows of s that must be absorbed.
        cosine: candidates for g are the 16 latents with the nearest decoder rows and at least this cosine.
        at_least: latents that fire on fewer rows are left out.
        quiet: no progress display.

    Raises:
        UserError: no such SAE, cache or hook, rows of another width or with NaN or infinity, no held-out
            rows, or a number outside its bounds.
    """
    for name, value in (("share", share), ("cosine", cosine)):
        if not 0 < value <= 1:
            raise UserError(f"{name} is {value}; give a number greater than 0 and at most 1")
    for name, value in (("rows", rows), ("at_least", at_least)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    loaded, origin = read_sae(sae, "sae")
    opened = open_for(sae, cache=cache)
    place = Splice.of(loaded, opened.resolve_hook(hook or origin.hook_name))
    for site in (*place.sites, *place.targets):
        require_width(opened.d_in(site.name), site, opened.path)
    row_N = first_rows(opened.held_out, True, limit=rows)
    if len(row_N) == 0:
        raise UserError(
            f"none of the {opened.n_rows:,} rows of {opened.path} is held out from training; give a cache of "
            "more documents"
        )
    with progress("absorption", total=3 * len(row_N), unit="tok", quiet=quiet) as bar:
        encoded = _EncodedRows(loaded, opened, place, row_N, bar)
        typical_M, fires_M = _typical(encoded)
        return _pairs(encoded, typical_M, fires_M, share=share, cosine=cosine, at_least=at_least)


class _EncodedRows:
    """Rows of a cache, encoded in batches."""

    def __init__(self, sae: SAE, cache: ActivationCache, place: Splice, row_N: Tensor, bar: Progress) -> None:
        self.sae, self._cache, self._place, self._row_N, self._bar = sae, cache, place, row_N, bar
        self.norm_M = sae.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each batch: row, latent and value of each entry [E], and the reconstruction errors [N, D]."""
        size = max(1, BLOCK_BYTES // (8 * self.sae.d_sae))
        for part_N in torch.split(self._row_N, size):
            x_ND, target_NE = self._place.rows(self._cache, part_N)
            x_ND = x_ND.to(self.sae.W_dec.device).float()
            y_NE = x_ND if target_NE is None else target_NE.to(x_ND)
            if not (x_ND.isfinite().all() and y_NE.isfinite().all()):
                raise UserError(
                    f"held-out rows of {self._cache.path} at {' and '.join(self._place.names)} hold NaN or "
                    "infinity; harvest again in bf16 or fp32"
                )
            codes = self.sae.encode(x_ND)
            row_E, latent_E, value_E = codes.merged()
            yield row_E, latent_E, value_E, y_NE - self.sae.decode(codes, x_ND)
            self._bar.update(len(part_N))

    def along(
        self, row_E: Tensor, latent_E: Tensor, value_E: Tensor, error_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The error along the unit decoder row of each latent, and z |d| of each latent: both [N, M], on the
        CPU."""
        error_NM = error_ND @ (self.sae.W_dec / self.norm_M[:, None]).T
        part_NM = torch.zeros_like(error_NM)
        part_NM[row_E, latent_E] = value_E * self.norm_M[latent_E]
        return error_NM.cpu(), part_NM.cpu()


def _typical(encoded: _EncodedRows) -> tuple[Tensor, Tensor]:
    """The typical amount of each latent (infinity if it never fires) and its number of firings, both [M]."""
    latents, amounts = [], []
    for row_E, latent_E, value_E, error_ND in encoded.batches():
        error_NM, part_NM = encoded.along(row_E, latent_E, value_E, error_ND)
        row_E, latent_E = row_E.cpu(), latent_E.cpu()
        latents.append(latent_E)
        amounts.append((error_NM + part_NM)[row_E, latent_E])
    latent_E, amount_E = torch.cat(latents), torch.cat(amounts)
    order_E = amount_E.argsort()
    order_E = order_E[latent_E[order_E].argsort(stable=True)]  # sorted by latent, then by amount
    weight_E = amount_E[order_E].double().clamp_min(0).square()
    fires_M = torch.bincount(latent_E, minlength=encoded.sae.d_sae)
    total_M = torch.zeros(encoded.sae.d_sae, dtype=torch.float64).index_add_(0, latent_E[order_E], weight_E)
    wanted_M = total_M.cumsum(0) - total_M + TYPICAL * total_M
    at_M = torch.searchsorted(weight_E.cumsum(0), wanted_M).clamp_max(max(len(order_E) - 1, 0))
    typical_M = torch.full((encoded.sae.d_sae,), torch.inf)
    typical_M[total_M > 0] = amount_E[order_E][at_M[total_M > 0]]
    return typical_M, fires_M


def _pairs(
    encoded: _EncodedRows, typical_M: Tensor, fires_M: Tensor, *, share: float, cosine: float, at_least: int
) -> pd.DataFrame:
    import pandas as pd

    general_MJ, cosine_MJ = nearest_rows(encoded.sae.W_dec, CANDIDATES)
    absorbed_MJ, silent_MJ = (torch.zeros(general_MJ.shape, dtype=torch.int64) for _ in range(2))
    written_MJ = torch.zeros(general_MJ.shape, dtype=torch.float64)
    for row_E, latent_E, value_E, error_ND in encoded.batches():
        error_NM, part_NM = encoded.along(row_E, latent_E, value_E, error_ND)
        latent_E, row_E1 = latent_E.cpu(), row_E.cpu()[:, None]
        general_EJ = general_MJ[latent_E]
        own_EJ = part_NM[row_E1, general_EJ]
        written_EJ = part_NM[row_E1, latent_E[:, None]] * cosine_MJ[latent_E]
        hit_EJ = _is_absorbed(error_NM[row_E1, general_EJ] + own_EJ, written_EJ, typical_M[general_EJ])
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
    reverse_P = _reverse(encoded, general_P, specific_P, cosine_MJ[kept_MJ], typical_M) / fires_M[general_P]
    frame = frame[(reverse_P < MOST_REVERSE * share_MJ[kept_MJ]).numpy()]
    return frame.sort_values(["share", "n_absorbed"], ascending=False, kind="stable", ignore_index=True)


def _reverse(
    encoded: _EncodedRows, general_P: Tensor, specific_P: Tensor, cosine_P: Tensor, typical_M: Tensor
) -> Tensor:
    """[P] int64: the number of rows where the general latent replaces the specific one."""
    found_P = torch.zeros(len(general_P), dtype=torch.int64)
    if len(general_P) == 0:
        return found_P
    for batch in encoded.batches():
        error_NM, part_NM = encoded.along(*batch)
        for some in torch.split(torch.arange(len(general_P)), max(1, BLOCK_BYTES // (16 * len(error_NM)))):
            general, specific = general_P[some], specific_P[some]
            written = part_NM[:, general] * cosine_P[some]
            left = error_NM[:, specific] + part_NM[:, specific]
            hit = _is_absorbed(left, written, typical_M[specific])
            found_P[some] += (hit & (part_NM[:, general] != 0)).sum(0)
    return found_P


def _is_absorbed(left: Tensor, written: Tensor, typical: Tensor) -> Tensor:
    """True where the amount that is left is below the typical one, but is not when ``written`` is added."""
    return (left < typical) & (left + written >= typical)
