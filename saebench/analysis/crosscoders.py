"""crosscoder_sites: how much of each latent of a crosscoder is at each of its sites.

Shapes: M = d_sae latents, S sites.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

from saebench.analysis.attach import open_for, read_sae
from saebench.core.errors import UserError
from saebench.saes.base import SAE
from saebench.store.schema import EXCLUSIVE_ABOVE
from saebench.store.sites import check_fit, norm_shares, read_sites, site_cosines, site_norms, site_std

if TYPE_CHECKING:
    import pandas as pd

    from saebench.activations.cache import ActivationCache


@torch.no_grad()
def crosscoder_sites(
    sae: SAE | str | PathLike[str],
    cache: ActivationCache | str | PathLike[str] | None = None,
    *,
    threshold: float = EXCLUSIVE_ABOVE,
) -> pd.DataFrame:
    """How the decoder norm of each latent of a crosscoder is divided among its sites.

    The share of site i is |d_i| / s_i divided by the sum of |d_j| / s_j over all sites j: d_i is the latent's
    decoder row at the site, and s_i the standard deviation of the site's rows in the cache, so that sites
    are compared in the units of the training (Lindsey et al. 2024,
    transformer-circuits.pub/2024/crosscoders). In a crosscoder of two models, a latent that is exclusive to
    one site may stand for what only that model has. Exclusive latents also arise between models that do not
    differ (Minder et al. 2025, arXiv 2504.02922), so count them in a crosscoder of two such models, too.

    Columns: feature; ``share SITE`` for each site; site_cos, the cosine of the decoder rows at the first and
    the last site (missing if their widths differ); kind: ``only SITE`` if the share of the site is above
    ``threshold``, else ``shared``, or ``none`` if the decoder row is 0.

    >>> small = {"d_sae": 32, "k": 4, "tokens": 1_000, "batch_size": 100, "quiet": True}
    >>> two = sb.train(cache=cache, out="two", crosscoder=True, **small)
    >>> sites = sb.crosscoder_sites(two.path)
    >>> sites.columns.tolist()[1:3]
    ['share blocks.0.hook_resid_post', 'share blocks.1.hook_resid_post']
    >>> int(sites["kind"].value_counts().sum())
    32

    Args:
        sae: a run directory, or an SAE in memory.
        cache: the cache that the standard deviations are computed on; by default the one that the crosscoder
            was trained on.
        threshold: the share above which a latent is exclusive to a site.

    Raises:
        UserError: no such SAE or cache, an SAE that is not a crosscoder, a cache without its sites, a
            threshold outside 0.5 to 1.
    """
    import pandas as pd

    if not 0.5 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; give a share of at least 0.5 and at most 1")
    loaded, _ = read_sae(sae, "sae")
    if not loaded.spec.is_crosscoder:
        raise UserError(f"{sae!s:.200} is not a crosscoder; train one with --crosscoder on several sites")
    opened = open_for(sae, cache=cache)
    names = [site.name for site in loaded.spec.sites]
    check_fit(loaded, opened, names[0])
    share_MS = norm_shares(site_norms(loaded, site_std(opened, read_sites(loaded, names[0])))).cpu()
    most = share_MS.max(1)
    kinds = [
        "none" if share != share else f"only {names[at]}" if share > threshold else "shared"
        for share, at in zip(most.values.tolist(), most.indices.tolist(), strict=True)
    ]
    cosine_M = site_cosines(loaded)
    return pd.DataFrame(
        {
            "feature": range(loaded.d_sae),
            **{f"share {name}": share_MS[:, at].numpy() for at, name in enumerate(names)},
            "site_cos": float("nan") if cosine_M is None else cosine_M.cpu().numpy(),
            "kind": kinds,
        }
    )
