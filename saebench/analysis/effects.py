"""loss_effects: the change of the model's loss on sampled contexts when one latent is ablated.

The SAE is spliced in with its error term (edits.py). With z_i(p) the value of latent i at position p and d_i
its decoder row, latent i is ablated at all positions of a context at once: x'_p = x_p - z_i(p) d_i.

Shapes: T positions of one context, D = d_in, V vocabulary, M = d_sae, F latents ablated one
at a time, E nonzero entries of codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.analysis.attach import AttachedSAE, attach, check_features, open_for
from saebench.analysis.contexts import CacheContext, draw_contexts
from saebench.core.errors import UserError
from saebench.core.progress import progress
from saebench.core.settings import takes_shown_names
from saebench.saes.base import SAE
from saebench.sources.gradients import contexts_at_once, summed_cross_entropy
from saebench.sources.model_identity import same_model
from saebench_kernels import gathered_dots

if TYPE_CHECKING:
    import pandas as pd

    from saebench.activations.cache import ActivationCache
    from saebench.sources.models import Model

ROWS = ("held-out", "all")


@dataclass(frozen=True)
class LossEffects:
    """The result of `loss_effects`. With a positive effect the model predicts worse without the latent."""

    features: pd.DataFrame
    """One row per requested latent: feature; loss_effect (mean change of the cross entropy of the next token,
    in nats) and kl (mean KL(with || without)), both over all tokens whose prediction the latent could change
    in the contexts where it was ablated; loss_effect_n, the number of these contexts; loss_estimate, the
    estimate of loss_effect by gradient x activation over loss_estimate_n contexts, all of the sample in which
    the latent fires. NaN where n is 0."""
    pairs: pd.DataFrame
    """One row per latent and context in which it was ablated: feature, ctx, n_firings, n_tokens, effect, kl,
    estimate; the last three are sums over the n_tokens predictions of the context, in nats."""
    correlation: float | None
    """Pearson correlation of effect and estimate over ``pairs``; None with fewer than two distinct values."""
    n_contexts: int
    """Number of sampled contexts."""

    def __repr__(self) -> str:
        correlation = (
            "" if self.correlation is None else f", correlation with the estimate {self.correlation:.3f}"
        )
        n = int((self.features["loss_effect_n"] > 0).sum())
        return (
            f"LossEffects({n:,} latents ablated in {len(self.pairs):,} pairs of latent and context, "
            f"a sample of {self.n_contexts:,} contexts{correlation})"
        )


@takes_shown_names
def loss_effects(
    sae: SAE | str | PathLike[str],
    cache: ActivationCache | str | PathLike[str] | None = None,
    model: Model | str = "cache",
    hook: str | None = None,
    *,
    features: int | Iterable[int] | None = None,
    contexts: int = 4,
    sample: int = 256,
    rows: str = "held-out",
    seed: int = 0,
    quiet: bool = False,
) -> LossEffects:
    """The change of the model's loss without each latent: exact on a few contexts, to first order on many.

    A ``sample`` of the cache's contexts is drawn. A latent is ablated in the first ``contexts`` of them in
    which it fires, one latent and one context at a time, and the model is run from the hook to the end.
    Positions that are not rows of the cache (usually position 0) are not changed. The estimate is

        - sum_p z_i(p) d_i . dL/dx_p,  L the summed cross entropy of the context,

    for all latents of a context from one forward and one backward pass (attribution patching; Syed et al.
    2023, arXiv 2310.10348; Marks et al. 2024, arXiv 2403.19647).

    >>> found = sb.loss_effects(run, cache, model, contexts=2, sample=8, quiet=True)
    >>> found.features.columns.tolist()
    ['feature', 'loss_effect', 'kl', 'loss_effect_n', 'loss_estimate', 'loss_estimate_n']
    >>> bool((found.features.loss_effect_n <= 2).all())
    True

    Args:
        sae: a run directory, or an SAE in memory, which needs ``model`` and ``site``.
        cache: the cache whose contexts are sampled; by default the one that the SAE was trained on.
        model: a name or a loaded model; 'cache' is the one that the SAE was trained on.
        site: where the SAE reads; by default where it was trained.
        features: one or many latents; by default all.
        contexts: the largest number of contexts per latent; 0 computes only the estimate.
        sample: the largest number of contexts to draw; in a small sample a rare latent may never fire.
        rows: 'held-out' draws from contexts that the SAE was not trained on, 'all' from all.
        seed: seed of the sample; equal seeds give equal results.
        quiet: no progress display.

    Raises:
        UserError: no such SAE, cache, model or hook, a cache of another model, without contexts or without
            held-out ones, an unknown latent, predictions with NaN or infinity, or a number below its bound.
    """
    if rows not in ROWS:
        raise UserError(f"rows is {rows!r}; give {' or '.join(map(repr, ROWS))}")
    for name, value, least in (("contexts", contexts, 0), ("sample", sample, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r:.60}; give a whole number, at least {least}")
    opened = open_for(sae, cache=cache)
    attached = attach(sae, model, hook)
    if opened.model is not None and not same_model(opened.model, attached.model.info.to_json()):
        raise UserError(
            f"the cache {opened.path} was made by model {opened.model['name']}, but model is "
            f"{attached.model.name} (their hashes differ); give model={opened.model['name']!r}"
        )
    wanted_M = torch.zeros(attached.sae.d_sae, dtype=torch.bool)
    wanted_M[slice(None) if features is None else check_features(features, attached.sae)] = True
    drawn = draw_contexts(opened, sample, rows=rows, seed=seed)
    sums = _EffectSums(wanted_M)
    with progress("effects", total=len(drawn), unit="ctx", quiet=quiet) as bar:
        for place in drawn:
            sums.add(_EncodedContext.of(attached, place), contexts)
            bar.update(1)
    return sums.result(len(drawn))


@dataclass(frozen=True)
class _EncodedContext:
    """A context with the model's activations and predictions, and the codes of the SAE."""

    attached: AttachedSAE
    place: CacheContext
    y_1TE: Tensor
    """The activations at the target."""
    logp_TV: Tensor
    """Log-probabilities of the predictions that a latent could change."""
    first: int
    """Position of the first of these predictions."""
    codes: tuple[Tensor, Tensor, Tensor]
    """Position, latent and value of each entry [E], sorted by position."""
    estimate_E: Tensor
    """- z d . dL/dx of each entry."""

    @classmethod
    def of(cls, attached: AttachedSAE, place: CacheContext) -> _EncodedContext:
        sae, ids_1T, length = attached.sae, place.ids_T[None], torch.tensor([len(place.ids_T)])
        seen: list[Tensor] = []

        def loss(logits_1TV: Tensor) -> Tensor:
            seen.append(logits_1TV.detach())
            return summed_cross_entropy(logits_1TV, ids_1T, length)

        x_TD, y_TE, gradient_TE = attached.gradients(ids_1T, loss)
        if not (seen[0].isfinite().all() and x_TD.isfinite().all()):
            raise UserError(
                f"the activations or predictions of {attached.model.name} on context {place.ctx} hold NaN or "
                "infinity; load the model in fp32, or download its weights again"
            )
        first = int(place.positions.min())
        with torch.no_grad():
            device = sae.W_dec.device
            row_E, latent_E, value_E = sae.encode(x_TD[place.positions].to(device)).merged()
            starts = torch.searchsorted(row_E, torch.arange(len(place.positions), device=device))
            slope_TE = gradient_TE[place.positions].to(sae.W_dec)
            slope_E = gathered_dots(latent_E, starts, slope_TE, sae.W_dec)
            return cls(
                attached=attached, place=place, y_1TE=y_TE[None], first=first,
                logp_TV=seen[0][0, first:-1].float().log_softmax(-1),
                codes=(place.positions.to(device)[row_E], latent_E, value_E),
                estimate_E=(-value_E * slope_E).cpu(),
            )  # fmt: skip

    @property
    def n_tokens(self) -> int:
        return len(self.logp_TV)

    @torch.no_grad()
    def without(self, features: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Effect and KL of ablating latents one at a time, each float64 [F] and summed over tokens."""
        position_E, latent_E, value_E = self.codes
        W_MD, length = self.attached.sae.W_dec, len(self.place.ids_T)
        target_T1 = self.place.ids_T[self.first + 1 :, None].to(self.logp_TV.device)
        own_T = self.logp_TV.gather(1, target_T1)[:, 0].double()
        p_TV = self.logp_TV.exp()
        at_once = max(1, contexts_at_once(length, self.logp_TV.shape[-1]) // 2)
        for some in torch.split(torch.tensor(features, device=W_MD.device), at_once):
            value_FT = W_MD.new_zeros(len(some), length)
            which, entry = (some[:, None] == latent_E).nonzero(as_tuple=True)
            value_FT[which, position_E[entry]] = value_E[entry]
            taken_FTE = (value_FT[:, :, None] * W_MD[some][:, None]).to(self.y_1TE.device)
            logits_FTV = self._variants(self.y_1TE.float() - taken_FTE)[:, self.first : -1]
            # Predictions before the first firing do not change.
            begins_F = (value_FT != 0).int().argmax(dim=1) - self.first
            effect, kl = [], []
            for logits_TV, begin in zip(logits_FTV, begins_F.tolist(), strict=True):
                logp_TV = logits_TV[begin:].float().log_softmax(-1)
                effect.append((own_T[begin:] - logp_TV.gather(1, target_T1[begin:])[:, 0]).sum())
                kl.append(((self.logp_TV[begin:] - logp_TV) * p_TV[begin:]).sum(-1).double().sum())
            found = torch.stack(effect).cpu(), torch.stack(kl).cpu()
            if not all(part.isfinite().all() for part in found):
                raise UserError(
                    f"without one of the latents {some.tolist()[:4]}... the predictions on context "
                    f"{self.place.ctx} hold NaN or infinity; load the model in fp32"
                )
            yield found

    def _variants(self, y_FTE: Tensor) -> Tensor:
        """Logits [F, T, V] of the context with each of these activations at the targets."""
        ids_1T, targets = self.place.ids_T[None], self.attached.splice.targets
        if len(targets) == 1:
            return self.attached.model.variants(ids_1T, targets[0].name, y_FTE)
        parts = torch.split(y_FTE, [target.width for target in targets], dim=-1)
        edit = {target.name: lambda _, part=part: part for target, part in zip(targets, parts, strict=True)}
        return self.attached.model.logits(ids_1T.expand(len(y_FTE), -1), edit=edit)


class _EffectSums:
    """Sums over contexts of the effects of each latent."""

    def __init__(self, wanted_M: Tensor) -> None:
        self.wanted_M = wanted_M
        self.times_M = torch.zeros(len(wanted_M), dtype=torch.int64)
        self.estimate_M = torch.zeros(len(wanted_M), dtype=torch.float64)
        self.estimated_tokens_M = torch.zeros(len(wanted_M), dtype=torch.int64)
        self.estimated_M = torch.zeros(len(wanted_M), dtype=torch.int64)
        self.pairs: list[dict[str, Any]] = []

    def add(self, read: _EncodedContext, contexts: int) -> None:
        if read.n_tokens == 0:
            return
        latent_E = read.codes[1].cpu()
        firings_M = torch.bincount(latent_E, minlength=len(self.wanted_M))
        estimate_M = torch.zeros_like(self.estimate_M).index_add_(0, latent_E, read.estimate_E.double())
        fires_M = (firings_M > 0) & self.wanted_M
        self.estimate_M += torch.where(fires_M, estimate_M, 0.0)
        self.estimated_tokens_M += fires_M * read.n_tokens
        self.estimated_M += fires_M
        features = (fires_M & (self.times_M < contexts)).nonzero()[:, 0]
        if len(features) == 0:
            return
        self.times_M[features] += 1
        effect_F, kl_F = (torch.cat(parts) for parts in zip(*read.without(features.tolist()), strict=True))
        for i, feature in enumerate(features.tolist()):
            self.pairs.append(
                {
                    "feature": feature, "ctx": read.place.ctx, "n_firings": int(firings_M[feature]),
                    "n_tokens": read.n_tokens, "effect": float(effect_F[i]), "kl": float(kl_F[i]),
                    "estimate": float(estimate_M[feature]),
                }
            )  # fmt: skip

    def result(self, n_contexts: int) -> LossEffects:
        import pandas as pd

        names = ("feature", "ctx", "n_firings", "n_tokens", "effect", "kl", "estimate")
        pairs = pd.DataFrame(self.pairs, columns=names)
        frame = pd.DataFrame({"feature": self.wanted_M.nonzero()[:, 0].numpy()})
        summed = pairs.groupby("feature")[["n_tokens", "effect", "kl"]].sum().reindex(frame["feature"])
        n_tokens = summed["n_tokens"].to_numpy()
        frame["loss_effect"] = summed["effect"].to_numpy() / n_tokens
        frame["kl"] = summed["kl"].to_numpy() / n_tokens
        frame["loss_effect_n"] = self.times_M[self.wanted_M].numpy()
        estimate_M = self.estimate_M / self.estimated_tokens_M  # 0 / 0 is NaN: the latent never fired
        frame["loss_estimate"] = estimate_M[self.wanted_M].numpy()
        frame["loss_estimate_n"] = self.estimated_M[self.wanted_M].numpy()
        correlation = None
        if pairs["effect"].nunique() > 1 and pairs["estimate"].nunique() > 1:
            correlation = float(pairs["effect"].corr(pairs["estimate"]))
        return LossEffects(frame, pairs, correlation, n_contexts)
