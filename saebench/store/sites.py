"""What an SAE reads and what it writes: sites, their rows in a cache, and how a crosscoder's decoder divides
among them.

The decoder norms of a crosscoder are compared in units in which every site has the same variance, those of
its training: the norm of a latent's decoder row at a site is divided by the standard deviation of the site's
rows. The share of a site is its norm divided by the sum of the norms at all sites (Lindsey et al. 2024,
transformer-circuits.pub/2024/crosscoders).

Shapes: N rows, D = d_in, M = d_sae latents, S sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.saes.scales import unit_scale
from saebench.saes.spec import SiteWidth
from saebench.store.database import insert, insert_meta, new_database
from saebench.store.extras import ORIGIN
from saebench.store.schema import CROSSCODER, EXCLUSIVE_ABOVE, EXTRA_TABLES, SAE_META, SITE_NORM

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE

SITES_EXTRA = "sites"
STD_ROWS = 8192
"""Rows, evenly spaced over the cache, that a standard deviation is computed from."""


def read_sites(sae: SAE, hook: str) -> tuple[SiteWidth, ...]:
    """The sites that the SAE reads; ``hook`` is the name of a single one."""
    sites = sae.spec.sites
    return sites if len(sites) > 1 else (SiteWidth(hook, sae.d_in),)


def written_sites(sae: SAE, hook: str) -> tuple[SiteWidth, ...]:
    """The sites that the SAE reconstructs; for an SAE of one site, ``hook``."""
    return sae.spec.targets or (SiteWidth(hook, sae.d_in),)


def written_part(sae: SAE, site: str | None) -> Tensor:
    """[M, width]: the part of W_dec that writes one of several targets; all of W_dec for a single one."""
    if len(sae.spec.targets) < 2:
        return sae.W_dec.detach()
    assert site is not None
    return sae.split(sae.W_dec.detach(), of=sae.spec.targets)[site]


def check_fit(sae: SAE, cache: ActivationCache, hook: str) -> None:
    """Raise a UserError unless the cache has what the SAE reads, in the right width."""
    sites = read_sites(sae, hook)
    missing = [site.name for site in sites if site.name not in cache.hooks]
    if missing:
        raise UserError(
            f"the SAE reads {', '.join(site.name for site in sites)}, but the cache {cache.path} has no "
            f"{' and no '.join(missing)}; it has {', '.join(cache.hooks)}"
        )
    for site in sites:
        if site.width != cache.d_in(site.name):
            raise UserError(
                f"the SAE has d_in {site.width} but {site.name} in the cache {cache.path} has d_in "
                f"{cache.d_in(site.name)}; pass the cache of the layer it was trained on"
            )


def cache_rows(
    cache: ActivationCache,
    sites: Sequence[SiteWidth],
    rows: Tensor | slice,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[N, D] float32: these rows of all sites side by side."""
    parts = [cache.verified(site.name)[rows] for site in sites]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(device, torch.float32)


def site_std(cache: ActivationCache, sites: Sequence[SiteWidth]) -> list[float]:
    """The standard deviation of the rows of each site: the root of the mean variance of its dimensions.

    Raises:
        UserError: a site does not vary.
    """
    row_N = torch.arange(0, cache.n_rows, max(1, cache.n_rows // STD_ROWS))
    return [1 / unit_scale(cache.verified(site.name)[row_N], site) for site in sites]


def comparable_rows(sae: SAE, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """``(W_enc [M, D], W_dec [M, E])`` whose rows are compared by cosine.

    Those of a crosscoder are in units of each site's standard deviation ``std``, as in its training: else the
    site with the largest activations would decide alone.
    """
    W_enc_MD, W_dec_ME = sae.W_enc.detach().T, sae.W_dec.detach()
    if std is None:
        return W_enc_MD, W_dec_ME
    std_D = sae.columns(std, of=sae.spec.sites)
    return W_enc_MD * std_D, W_dec_ME / std_D


def site_norms(sae: SAE, std: Sequence[float]) -> Tensor:
    """[M, S]: the norm of each latent's decoder row at each site / standard deviation of the site."""
    parts = sae.split(sae.W_dec.detach().float(), of=sae.spec.targets).values()
    return torch.stack([part.norm(dim=1) / one for part, one in zip(parts, std, strict=True)], dim=1)


def norm_shares(norms_MS: Tensor) -> Tensor:
    """[M, S]: each norm divided by the sum of its row; NaN where all are 0."""
    return norms_MS / norms_MS.sum(1, keepdim=True)


def site_cosines(sae: SAE) -> Tensor | None:
    """[M]: cosine of the decoder rows at the first and the last site; None where their widths differ."""
    parts = list(sae.split(sae.W_dec.detach().float(), of=sae.spec.targets).values())
    if parts[0].shape != parts[-1].shape:
        return None
    return torch.nn.functional.cosine_similarity(parts[0], parts[-1], dim=1).clamp(-1, 1)


def crosscoder_columns(sae: SAE, std: Sequence[float]) -> dict[str, Any]:
    """The columns of the table crosscoder."""
    share_MS = norm_shares(site_norms(sae, std)).cpu()
    main = share_MS.max(1)  # NaN is its own maximum
    names = [site.name for site in sae.spec.targets]
    cosine_M = site_cosines(sae)
    return {
        "feature": list(range(sae.d_sae)),
        "norm_share": _absent(share_MS[:, -1]),
        "main_site": [
            None if share != share else names[at]
            for at, share in zip(main.indices.tolist(), main.values.tolist(), strict=True)
        ],
        "main_share": _absent(main.values),
        "exclusive": [share > EXCLUSIVE_ABOVE for share in main.values.tolist()],
        "site_cos": [None] * sae.d_sae if cosine_M is None else cosine_M.cpu().tolist(),
    }


def site_norm_columns(sae: SAE, std: Sequence[float]) -> dict[str, Any]:
    """The columns of the table site_norm."""
    norm_MS = site_norms(sae, std).cpu()
    names = [site.name for site in sae.spec.targets]
    return {
        "feature": torch.arange(sae.d_sae).repeat_interleave(len(names)).numpy(),
        "site": torch.arange(len(names)).repeat(sae.d_sae).numpy(),
        "name": names * sae.d_sae,
        "norm": norm_MS.reshape(-1).numpy(),
        "share": _absent(norm_shares(norm_MS).reshape(-1)),
    }


def write_sites_file(building: Path, sae_file: str, sae: SAE, meta: Mapping[str, Any]) -> Path:
    """Write the extra of a crosscoder beside its SAE file in the build directory; returns its path."""
    path = building / f"{SITES_EXTRA}-{sae_file.removeprefix('sae-')}"
    with new_database(path, [SAE_META, *EXTRA_TABLES[SITES_EXTRA].values()]) as connection:
        insert(connection, CROSSCODER, crosscoder_columns(sae, meta["site_std"]))
        insert(connection, SITE_NORM, site_norm_columns(sae, meta["site_std"]))
        own = {"format_version": meta["format_version"], "extra": SITES_EXTRA}
        insert_meta(connection, SAE_META, own | {key: meta[key] for key in ORIGIN})
    return path


def sites_meta(sae: SAE, hook: str) -> dict[str, Any]:
    """Keys of the meta table of a transcoder or crosscoder; an SAE of one site has none of them."""
    if not sae.spec.targets:
        return {}
    return {
        "sites": [{"name": site.name, "width": site.width} for site in read_sites(sae, hook)],
        "targets": [{"name": site.name, "width": site.width} for site in written_sites(sae, hook)],
        "skip": sae.spec.skip,
    }


def _absent(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
