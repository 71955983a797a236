"""logit_attribution: what each latent contributes to a logit difference of the next token.

Shapes: T positions of a prompt, D = d_in, V vocabulary, E nonzero entries of its codes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.analysis.attach import AttachedSAE, TokenizedPrompt, attach, check_positions
from saebench.analysis.edits import LatentEdit, logits_of
from saebench.core.errors import UserError
from saebench.core.settings import takes_shown_names
from saebench.store.text import token_text
from saebench_kernels import gathered_dots

if TYPE_CHECKING:
    import pandas as pd

    from saebench.saes.base import SAE
    from saebench.sources.models import Model

METHODS = ("gradient", "direct")


@dataclass(frozen=True)
class Attribution:
    """The result of `logit_attribution`."""

    latents: pd.DataFrame
    """feature, pos, token, value, attribution, the largest |attribution| first; with ``check`` also effect:
    the score without an edit minus the score with this latent set to 0 at this position, NaN where it was
    not measured."""
    score: float
    """logit(target) - logit(against); without ``against``, logit(target) minus the mean of all logits."""
    correlation: float | None
    """Pearson correlation of attribution and measured effect; None with fewer than two distinct values."""
    target: str
    """The text of the target token."""


@takes_shown_names
def logit_attribution(
    text: str,
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    target: str | int | None = None,
    against: str | int | None = None,
    position: int = -1,
    by: str = "gradient",
    check: int = 0,
    keep_first: bool = False,
    bos: bool | None = None,
) -> Attribution:
    """The contribution of each latent that fires in ``text`` to a logit difference at ``position``.

    The score is L = logit(target) - logit(against). With z_i the value of latent i at a position p, d_i its
    decoder row and x the activations, the attribution by 'gradient' is

        z_i d_i . dL/dx_p,

    gradient x activation in the model with the SAE spliced in and its error term held fixed. It is what the
    score loses, to first order and along all paths, when z_i is set to 0 at p (Marks et al. 2024, arXiv
    2403.19647). The attribution by 'direct' is

        z_i d_i . u / s,  u = U[:, target] - U[:, against],

    with U the unembedding through the final norm and s that norm's scale, frozen at the prompt
    (`Model.unembedding`): the path from the latent at ``position`` straight to the unembedding, without later
    layers. Position 0 is left out unless ``keep_first``.

    >>> found = sb.logit_attribution("The Congress", run, model, target=5, against=9, check=3)
    >>> found.latents.columns.tolist()
    ['feature', 'pos', 'token', 'value', 'attribution', 'effect']

    Args:
        text: one prompt, tokenized as a harvest does.
        sae: a run directory, or an SAE in memory, which needs ``model`` and ``site``.
        model: a name or a loaded model; 'cache' is the one that the SAE was trained on.
        site: where the SAE reads; by default where it was trained.
        target: a token as a string, with its leading space if it has one, or its id; by default the token
            that the model predicts.
        against: another token; by default the mean over the vocabulary.
        position: the position of the prediction; negative numbers count from the end.
        by: 'gradient' or 'direct'.
        check: for this many of the largest attributions, measure the effect by setting the latent to 0.
        keep_first: include position 0.
        bos: whether the text begins with the BOS token; by default as in the SAE's cache.

    Raises:
        UserError: a target that is not exactly one token, a position outside the text, 'direct' at a hook
            that is not in the residual stream, an unknown ``by``, a negative ``check``, and what
            `features_of` raises.
    """
    if by not in METHODS:
        raise UserError(f"by is {by!r}; give {' or '.join(map(repr, METHODS))}")
    if not isinstance(check, int) or check < 0:
        raise UserError(f"check is {check!r:.60}; give the number of latents to set to 0, at least 0")
    attached = attach(sae, model, hook, bos)
    prompt = attached.read(text)
    at = _position(position, len(prompt))
    if at == 0 and not keep_first:
        raise UserError(
            "position is 0, which is left out by default; give a later position or keep_first=True"
        )
    if target is not None:
        _tokens(attached, target, against)  # raises before the model runs
    written = [target.name for target in attached.splice.targets]
    if by == "direct" and not (len(written) == 1 and attached.model.residual_hook(written[0])):
        raise UserError(
            f"by is 'direct', but {' and '.join(written)} is not in the residual stream, which the "
            "unembedding reads; give by='gradient'"
        )
    clean_BTV = logits_of(attached, prompt.ids)
    predicted = int(clean_BTV[0, at].argmax())
    score = _Score(at, *_tokens(attached, predicted if target is None else target, against))
    slope_TD = _direct(attached, prompt, score) if by == "direct" else _gradient(attached, prompt, score)
    first = at if by == "direct" else 0 if keep_first else 1
    latents = _latents(attached, prompt, slope_TD, range(first, at + 1))
    clean = float(score(clean_BTV))
    correlation = None
    if check:
        latents["effect"] = float("nan")
        for row in range(min(check, len(latents))):
            edit = LatentEdit([int(latents.at[row, "feature"])], "clamp", 0.0, [int(latents.at[row, "pos"])])
            with torch.no_grad():
                latents.loc[row, "effect"] = clean - float(score(logits_of(attached, prompt.ids, edit)))
        tried = latents.head(check)
        if tried["attribution"].nunique() > 1 and tried["effect"].nunique() > 1:
            correlation = float(tried["attribution"].corr(tried["effect"]))
    return Attribution(latents, clean, correlation, token_text(attached.vocab[score.target]))


@dataclass(frozen=True)
class _Score:
    """L = logit(target) - logit(against) at one position, as a function of the logits of one context."""

    position: int
    target: int
    against: int | None

    def __call__(self, logits_1TV: Tensor) -> Tensor:
        return self.of(logits_1TV[0, self.position].float())

    def of(self, last_V: Tensor) -> Tensor:
        """The difference along the last axis, the vocabulary: [..., V] -> [...]."""
        other = last_V.mean(-1) if self.against is None else last_V[..., self.against]
        return last_V[..., self.target] - other


def _gradient(attached: AttachedSAE, prompt: TokenizedPrompt, score: _Score) -> Tensor:
    """[T, E]: dL/dy at the target; with the error term held fixed it is also dL/d decode(z)."""
    return attached.gradients(prompt.ids_1T, score)[2]


def _direct(attached: AttachedSAE, prompt: TokenizedPrompt, score: _Score) -> Tensor:
    """[T, D]: u / s at the position of the score, 0 elsewhere."""
    direction_D = score.of(attached.model.unembedding())
    scale = attached.model.final_scale(prompt.ids_1T)[0, score.position]
    slope_TD = torch.zeros(len(prompt), len(direction_D))
    slope_TD[score.position] = direction_D / scale.cpu()
    return slope_TD


@torch.no_grad()
def _latents(
    attached: AttachedSAE, prompt: TokenizedPrompt, slope_TD: Tensor, positions: range
) -> pd.DataFrame:
    """The table of `Attribution`: z_i d_i . slope of every latent that fires at ``positions``."""
    import pandas as pd

    sae = attached.sae
    x_TD = attached.activations(prompt.ids_1T)
    pos_E, feature_E, value_E = sae.encode(x_TD.to(sae.W_dec.device)).merged()
    starts_T = torch.searchsorted(pos_E, torch.arange(len(prompt), device=pos_E.device))
    slope_E = gathered_dots(feature_E, starts_T, slope_TD.to(sae.W_dec), sae.W_dec)
    columns = {"feature": feature_E, "pos": pos_E, "value": value_E, "attribution": value_E * slope_E}
    frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    frame.insert(2, "token", [prompt.tokens[pos] for pos in frame["pos"]])
    frame = frame[frame["pos"].isin(positions)]
    return frame.sort_values("attribution", key=abs, ascending=False, kind="stable", ignore_index=True)


def _position(position: int, length: int) -> int:
    try:
        [at] = check_positions([operator.index(position)], length)
    except TypeError:
        raise UserError(f"position is {position!r:.60}; give one whole number") from None
    return at


def _tokens(attached: AttachedSAE, target: str | int, against: str | int | None) -> tuple[int, int | None]:
    chosen = _token(attached, target, "target")
    if against is None:
        return chosen, None
    other = _token(attached, against, "against")
    if chosen == other:
        raise UserError(f"target and against are both token {chosen} ({target!r:.60}); give two that differ")
    return chosen, other


def _token(attached: AttachedSAE, token: str | int, name: str) -> int:
    """The id of one token."""
    if isinstance(token, str):
        ids = attached.model.tokens.encode(token)
        if len(ids) == 1:
            return ids[0]
        pieces = ", ".join(repr(token_text(attached.vocab[id])) for id in ids[:8])
        what = f"{len(ids)} tokens ({pieces}{', ...' if len(ids) > 8 else ''})" if ids else "empty"
        raise UserError(f"{name} is {token!r:.60}, which is {what}; give exactly one, or an id")
    try:
        id = operator.index(token)
    except TypeError:
        raise UserError(f"{name} is {token!r:.60}; give a token as a string, or its id") from None
    if not 0 <= id < attached.model.vocab_size:
        raise UserError(
            f"{name} is {id}, which is not a token id of {attached.model.name}; "
            f"give 0 to {attached.model.vocab_size - 1}"
        )
    return id
