"""ablate and steer: change the values of latents inside the model and measure its predictions.

The edits themselves are in edits.py.

Shapes: B = 1 context, T positions, V vocabulary, S scored predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from saebench.analysis.attach import (
    AttachedSAE,
    Positions,
    TokenizedPrompt,
    attach,
    check_features,
    check_positions,
)
from saebench.analysis.edits import MODES, LatentEdit, logits_of
from saebench.core.bounds import AtLeast, Seed
from saebench.core.errors import UserError
from saebench.core.settings import Settings, takes_shown_names
from saebench.evaluation.faithfulness import cross_entropies, kl_divergences
from saebench.store.text import token_text

if TYPE_CHECKING:
    import pandas as pd

    from saebench.saes.base import SAE
    from saebench.sources.models import Model

NEXT_SHOWN = 10
"""Number of the most likely next tokens that are reported, of the clean and of the steered predictions."""


@dataclass(frozen=True)
class Steering:
    """The result of `steer`."""

    effects: pd.DataFrame
    """strength and the columns of `ablate`: one row per strength and position of the prompt."""
    texts: pd.DataFrame
    """strength, clean, steered: the texts that the model generates after the prompt."""
    next_tokens: pd.DataFrame
    """strength, token, text, logp_clean, logp_steered, difference: for each strength the tokens that are
    among the 10 most likely next ones with or without steering, the largest difference first."""


@takes_shown_names
@torch.no_grad()
def ablate(
    text: str,
    features: int | Iterable[int],
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    positions: Positions = None,
    bos: bool | None = None,
) -> pd.DataFrame:
    """Set latents to 0 in the model's activations on ``text`` and compare its predictions.

    The result has one row per position: pos, token, edited (whether the latents were set to 0 here),
    next_token, logp_clean and logp_edited (log-probability of the next token of the text, in nats; NaN at the
    last position), difference (edited minus clean), kl (KL(clean || edited) of the prediction, in nats).

    >>> effects = sb.ablate("The Congress of the United States", [3, 7], run, model)
    >>> bool((effects.kl[~effects.edited & (effects.pos == 0)] == 0).all())
    True

    Args:
        text: one prompt, tokenized as a harvest does.
        features: one or several latents, set to 0 together.
        sae: a run directory, or an SAE in memory, which needs ``model`` and ``site``.
        model: a name or a loaded model; 'cache' is the one that the SAE was trained on.
        site: where the SAE reads; by default where it was trained.
        positions: the edited positions: one, several, or a slice; by default all except position 0.
        bos: whether the text begins with the BOS token; by default as in the SAE's cache.

    Raises:
        UserError: an unknown latent, a position outside the text, an empty or too long text, no such SAE,
            model or hook, or another model than the SAE's.
    """
    attached = attach(sae, model, hook, bos)
    prompt = attached.read(text)
    edit = LatentEdit(
        check_features(features, attached.sae), "clamp", 0.0, check_positions(positions, len(prompt))
    )
    if not edit.positions:
        raise _nothing_to_edit(positions, len(prompt))
    clean_BTV, edited_BTV = (logits_of(attached, prompt.ids, one) for one in (None, edit))
    return _effects(prompt, clean_BTV, edited_BTV, edit)


@takes_shown_names
@torch.no_grad()
def steer(
    text: str,
    features: int | Iterable[int],
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    strength: float | Iterable[float],
    mode: str = "add",
    positions: Positions = None,
    new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    bos: bool | None = None,
    on_token: Callable[[], object] | None = None,
) -> Steering:
    """Change latents while the model reads ``text`` and continues it; compare predictions and texts.

    >>> found = sb.steer("The Congress", 3, run, model, strength=[0, 5], new_tokens=4)
    >>> found.texts.columns.tolist()
    ['strength', 'clean', 'steered']
    >>> bool(found.texts.steered[0] == found.texts.clean[0])
    True

    Args:
        text: one prompt, tokenized as a harvest does.
        features: one or several latents, all changed in the same way.
        sae: a run directory, or an SAE in memory, which needs ``model`` and ``site``.
        model: a name or a loaded model; 'cache' is the one that the SAE was trained on.
        site: where the SAE reads; by default where it was trained.
        strength: a number in units of the latent's value, or several, each applied alone.
        mode: with v the latent's value, 'add' makes it v + strength, 'clamp' strength, 'scale' v * strength.
        positions: the edited positions: one, several, or a slice; by default all except position 0. The
            default and a slice without an end also include the generated tokens.
        new_tokens: the largest number of tokens to generate; the end-of-text token ends a text earlier.
        temperature: 0 takes the most likely token; above 0 tokens are drawn from softmax(logits /
            temperature), with the same random numbers for all texts.
        seed: seed of the random numbers.
        bos: whether the text begins with the BOS token; by default as in the SAE's cache.
        on_token: called before each token of each text, to show progress; an exception in it ends the call.

    Raises:
        UserError: a strength, mode, temperature or number of tokens outside its bounds, and what `ablate`
            raises.
    """
    import pandas as pd

    strengths = _check_strengths(strength)
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}; give {', '.join(map(repr, MODES))}")
    generation = Generation(new_tokens, temperature, seed, on_token or _nothing)
    attached = attach(sae, model, hook, bos)
    prompt = attached.read(text, new_tokens=new_tokens)
    chosen = check_features(features, attached.sae)
    at, onwards = check_positions(positions, len(prompt)), _onwards(positions, len(prompt), new_tokens)
    if not at and not onwards:
        raise _nothing_to_edit(positions, len(prompt))
    clean_BTV = logits_of(attached, prompt.ids)
    clean = attached.text(generation.run(attached, prompt, None))
    effects, texts, nexts = [], [], []
    for value in strengths:
        edit = LatentEdit(chosen, mode, value, at, onwards)
        edited_BTV = logits_of(attached, prompt.ids, edit)
        effects.append(_effects(prompt, clean_BTV, edited_BTV, edit))
        nexts.append(_next_tokens(attached, clean_BTV[0, -1], edited_BTV[0, -1]))
        for frame in (effects[-1], nexts[-1]):
            frame.insert(0, "strength", value)
        steered = attached.text(generation.run(attached, prompt, edit))
        texts.append({"strength": value, "clean": clean, "steered": steered})
    return Steering(
        pd.concat(effects, ignore_index=True), pd.DataFrame(texts), pd.concat(nexts, ignore_index=True)
    )


@dataclass(frozen=True)
class Generation(Settings):
    """Settings of text generation; see `steer`."""

    new_tokens: Annotated[int, AtLeast(0)]
    temperature: Annotated[float, AtLeast(0)]
    seed: Seed
    on_token: Callable[[], object]

    def __post_init__(self) -> None:
        if not isinstance(self.new_tokens, int):
            raise UserError(f"new_tokens is {self.new_tokens!r:.60}; give a whole number")
        super().__post_init__()

    def run(self, attached: AttachedSAE, prompt: TokenizedPrompt, edit: LatentEdit | None) -> list[int]:
        """The new token ids; deterministic."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = list(prompt.ids)
        for _ in range(self.new_tokens):
            self.on_token()
            scores_V = logits_of(attached, ids, edit)[0, -1].double().cpu()
            if self.temperature > 0:  # the argmax of logits plus Gumbel noise is a sample of their softmax
                noise_V = -torch.empty_like(scores_V).exponential_(generator=generator).log()
                scores_V = scores_V / self.temperature + noise_V
            new = int(scores_V.argmax())
            if new == attached.model.tokens.separator:
                break
            ids.append(new)
        return ids[len(prompt) :]


def _effects(
    prompt: TokenizedPrompt, clean_BTV: Tensor, edited_BTV: Tensor, edit: LatentEdit
) -> pd.DataFrame:
    """The table that `ablate` returns, for an edit."""
    import pandas as pd

    length = len(prompt)
    position_S = torch.arange(length)
    scored = (torch.zeros_like(position_S), position_S, prompt.ids_1T[0].roll(-1))
    frame = pd.DataFrame(
        {
            "pos": range(length),
            "token": prompt.tokens,
            "edited": False,
            "next_token": [*prompt.tokens[1:], None],
            "logp_clean": -cross_entropies(clean_BTV, scored).cpu().numpy(),
            "logp_edited": -cross_entropies(edited_BTV, scored).cpu().numpy(),
        }
    )
    frame.loc[edit.positions, "edited"] = True
    frame.loc[length - 1, ["logp_clean", "logp_edited"]] = math.nan  # no token follows the last
    frame["difference"] = frame["logp_edited"] - frame["logp_clean"]
    frame["kl"] = kl_divergences(clean_BTV, edited_BTV, scored).cpu().numpy()
    return frame


def _next_tokens(attached: AttachedSAE, clean_V: Tensor, edited_V: Tensor) -> pd.DataFrame:
    """The most likely next tokens; see `Steering.next_tokens`."""
    import pandas as pd

    logps_2V = torch.stack([clean_V, edited_V]).float().log_softmax(-1).cpu()
    most_likely = logps_2V.topk(min(NEXT_SHOWN, logps_2V.shape[1])).indices
    ids = torch.unique(most_likely).tolist()
    clean, edited = logps_2V[:, ids].numpy()
    frame = pd.DataFrame(
        {
            "token": ids,
            "text": [token_text(attached.vocab[id]) for id in ids],
            "logp_clean": clean,
            "logp_steered": edited,
            "difference": edited - clean,
        }
    )
    return frame.sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def _nothing() -> None:
    """The default of ``on_token``."""


def _check_strengths(strength: float | Iterable[float]) -> list[float]:
    if hasattr(strength, "tolist"):  # tensors and numpy arrays, also of no axis
        strength = strength.tolist()
    listed = list(strength) if isinstance(strength, Iterable) else [strength]
    try:
        values = [float(value) for value in listed]
    except (TypeError, ValueError):
        raise UserError(f"strength is {strength!r:.60}; give a number or several") from None
    if not values:
        raise UserError("strength is empty; give a number or several")
    for value in values:
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise UserError(f"strength is {value}; give a number between -3.4e38 and 3.4e38")
    return values


def _onwards(positions: Positions, length: int, new_tokens: int) -> range | None:
    """The edited positions among the generated tokens, or None."""
    if positions is None:
        positions = slice(None)
    if not isinstance(positions, slice) or positions.stop is not None or (positions.step or 1) < 0:
        return None
    start, _, step = positions.indices(length)
    all_of_them = range(start, length + new_tokens, step)
    return all_of_them[len(range(start, length, step)) :]


def _nothing_to_edit(positions: Positions, length: int) -> UserError:
    if positions is None:
        return UserError(
            "text is one token, and position 0 is not edited by default; give a longer text or positions=[0]"
        )
    return UserError(
        f"positions is {positions}, which includes none of the {length} tokens of the text; give 0 to "
        f"{length - 1}"
    )
