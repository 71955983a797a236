"""features_of and compare_prompts: the latents that fire on the tokens of a prompt.

Shapes: T tokens of a prompt, D = d_in, E nonzero entries of its codes.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

from saebench.analysis.attach import AttachedSAE, attach
from saebench.core.errors import UserError
from saebench.core.settings import takes_shown_names

if TYPE_CHECKING:
    import pandas as pd

    from saebench.saes.base import SAE
    from saebench.sources.models import Model

MEASURES = ("max", "mean")


@takes_shown_names
def features_of(
    text: str,
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    top: int | None = None,
    bos: bool | None = None,
) -> pd.DataFrame:
    """The latents that fire on each token of ``text``: pos, token, feature, value, first.

    Rows are sorted by position, then by value, the largest first. Values are exactly those of ``sae.encode``.
    ``first`` marks position 0, on which SAEs are by default neither trained nor evaluated.

    >>> found = sb.features_of("The Congress of the United States", run, model, top=3)
    >>> found.columns.tolist()
    ['pos', 'token', 'feature', 'value', 'first']

    Args:
        text: one prompt, tokenized as a harvest does.
        sae: a run directory, or an SAE in memory, which needs ``model`` and ``site``.
        model: a name or a loaded model; 'cache' is the one that the SAE was trained on.
        site: where the SAE reads; by default where it was trained.
        top: the number of latents per token, those with the largest values; by default all.
        bos: whether the text begins with the BOS token; by default as in the SAE's cache.

    Raises:
        UserError: an empty or too long text, no such SAE, model or hook, a model other than the one that the
            SAE was trained on, or ``top`` below 1.
    """
    if top is not None and top < 1:
        raise UserError(f"top is {top}; it must be at least 1, or None for all")
    return _features(text, attach(sae, model, hook, bos), top)


@takes_shown_names
def compare_prompts(
    a: str,
    b: str,
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    by: str = "max",
    keep_first: bool = False,
    bos: bool | None = None,
) -> pd.DataFrame:
    """Compare the activations of latents on two prompts: feature, max_a, mean_a, max_b, mean_b, difference.

    ``difference`` is the maximum or mean (``by``) in b minus that in a; rows are sorted by its absolute
    value, the largest first. Means are over all tokens of a prompt, including those where the latent is 0.
    Position 0 is left out unless ``keep_first``. The other arguments and errors are those of `features_of`.

    >>> found = sb.compare_prompts("the rights of man", "the price of corn", run, model)
    >>> bool((found.difference == found.max_b - found.max_a).all())
    True

    Raises:
        UserError: also for an unknown ``by``, or a prompt of one token without ``keep_first``.
    """
    import pandas as pd

    if by not in MEASURES:
        raise UserError(f"by is {by!r}; give {' or '.join(map(repr, MEASURES))}")
    attached = attach(sae, model, hook, bos)
    sides = []
    for name, text in (("a", a), ("b", b)):
        n_tokens = len(attached.read(text)) - (not keep_first)
        if n_tokens == 0:
            raise UserError(
                f"prompt {name} is {text!r}, one token, and position 0 is left out; "
                "give a longer prompt or keep_first=True"
            )
        fires = _features(text, attached, None)
        values = fires[~fires["first"] | keep_first].groupby("feature")["value"]
        sides.append(pd.DataFrame({f"max_{name}": values.max(), f"mean_{name}": values.sum() / n_tokens}))
    both = sides[0].join(sides[1], how="outer").fillna(0.0)
    both["difference"] = both[f"{by}_b"] - both[f"{by}_a"]
    order = both.reset_index().sort_values("feature", kind="stable")
    return order.sort_values("difference", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def _features(text: str, attached: AttachedSAE, top: int | None) -> pd.DataFrame:
    import pandas as pd

    prompt, sae = attached.read(text), attached.sae
    x_TD = attached.activations(prompt.ids_1T)
    if not x_TD.isfinite().all():
        raise UserError(
            f"the activations of {attached.model.name} at {attached.hook} hold NaN or infinity on this text; "
            "load the model in fp32, or download its weights again"
        )
    pos_E, feature_E, value_E = sae.encode(x_TD.to(sae.W_dec.device)).merged()
    frame = pd.DataFrame(
        {
            "pos": pos_E.cpu().numpy(),
            "token": [prompt.tokens[pos] for pos in pos_E.tolist()],
            "feature": feature_E.cpu().numpy(),
            "value": value_E.cpu().numpy(),
            "first": (pos_E == 0).cpu().numpy(),
        }
    )
    frame = frame.sort_values(
        ["pos", "value", "feature"], ascending=[True, False, True], kind="stable", ignore_index=True
    )
    return frame if top is None else frame.groupby("pos").head(top).reset_index(drop=True)
