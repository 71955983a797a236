"""Faithfulness metrics: how the model's loss changes when an SAE's reconstruction replaces its activations.

Shapes: B contexts, T positions, D = d_in, E = d_out, V vocabulary, P replaced positions, S scored
predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saebench.core.errors import UserError
from saebench.evaluation.splice import Edit, Splice, all_edits

if TYPE_CHECKING:
    from saebench.saes.base import SAE
    from saebench.sources.models import Model

SCORED_BYTES = 2**25
"""Memory for one block of fp32 logits while scoring."""


@dataclass(frozen=True)
class Contexts:
    """Token sequences, and the positions at which activations are replaced.

    ``tokens_BT`` int [B, T]; ``length_B`` int [B], the number of real tokens of each context (the rest is
    padding); ``keep_BT`` bool [B, T], the positions whose activations are replaced.
    """

    tokens_BT: Tensor
    length_B: Tensor
    keep_BT: Tensor

    def __post_init__(self) -> None:
        assert self.tokens_BT.shape == self.keep_BT.shape, (self.tokens_BT.shape, self.keep_BT.shape)
        assert self.length_B.shape == self.tokens_BT.shape[:1], self.length_B.shape
        assert self.keep_BT.dtype == torch.bool

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def batches(self, size: int) -> Iterable[Contexts]:
        """The same contexts, at most ``size`` at a time, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Contexts(self.tokens_BT[part], self.length_B[part], self.keep_BT[part])

    def scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(context, position, next token)``, each int64 [S], of the predictions that are scored.

        A prediction is scored if its position is replaced and its next token is real (not padding).
        """
        n_positions = self.tokens_BT.shape[1]
        has_next_BT = torch.arange(n_positions) + 1 < self.length_B[:, None]
        context_S, position_S = (self.keep_BT & has_next_BT).nonzero(as_tuple=True)
        return context_S, position_S, self.tokens_BT[context_S, position_S + 1].long()


@dataclass(frozen=True)
class FaithfulnessMetrics:
    """Measured over ``n_tokens`` next-token predictions, in nats per token, with equal weight for each.

    A prediction is scored if its position was replaced and the token that it predicts is not padding. Other
    positions are not measured. CE = mean of -log p(next token):

    - ``ce_clean``: for the unchanged model.
    - ``ce_spliced``: with the SAE's reconstructions at the replaced positions.
    - ``ce_zero``: with zeros at the replaced positions.
    - ``ce_mean``: with the mean activation at the replaced positions.
    - ``kl`` = mean of KL(clean || spliced) = sum_v p_clean(v) (log p_clean(v) - log p_spliced(v)).
    """

    n_tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl: float

    @property
    def ce_delta(self) -> float:
        """ce_spliced - ce_clean, in nats per token."""
        return self.ce_spliced - self.ce_clean

    @property
    def ce_loss_score(self) -> float | None:
        """(ce_zero - ce_spliced) / (ce_zero - ce_clean); None if zeros do not increase the loss.

        It is 1 if the reconstruction does not increase the loss, and 0 if it is as bad as zeros. If zeros do
        not increase the loss, as in an untrained model, there is no loss to recover and no ratio.
        """
        if self.ce_zero <= self.ce_clean:
            return None
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce_clean)


@dataclass(frozen=True)
class Spliced:
    """An SAE in the model.

    Args:
        splice: where it reads and writes.
        reconstruct: rows [P, d_in] -> y_hat [P, d_out].
        mean_activation: [d_out], the replacement in ce_mean.
        gradients: call ``reconstruct`` with a second argument [P, d_out], the gradient of the clean model's
            loss at the targets (`Model.gradients`). This takes one more forward and backward pass per batch.
    """

    splice: Splice
    reconstruct: Callable[..., Tensor]
    mean_activation: Tensor
    gradients: bool = False

    def edits(self, model: Model, batch: Contexts) -> dict[str, dict[str, Edit]]:
        """The edits of a batch's forward pass by ablation: spliced, zero, mean."""
        splice, reconstruct = self.splice, self.reconstruct
        if self.gradients:
            names = [target.name for target in splice.targets]
            gradient_BTE = splice.target_of(model.gradients(batch.tokens_BT, batch.length_B, names)[1])
            gradient_PE = gradient_BTE[batch.keep_BT.to(gradient_BTE.device)]
        clean_BTD = splice.read(model, batch.tokens_BT)[0] if splice.needs_clean else None

        def through_sae(x_PD: Tensor, _: Tensor) -> Tensor:
            return reconstruct(x_PD, gradient_PE) if self.gradients else reconstruct(x_PD)

        def zeros(_: Tensor, y_PE: Tensor) -> Tensor:
            return torch.zeros_like(y_PE)

        def mean(_: Tensor, y_PE: Tensor) -> Tensor:
            return self.mean_activation.to(y_PE).expand_as(y_PE)

        return {
            name: splice.edits(batch.keep_BT, new, clean_BTD=clean_BTD)
            for name, new in (("spliced", through_sae), ("zero", zeros), ("mean", mean))
        }


@torch.no_grad()
def faithfulness_metrics(
    sae: SAE,
    model: Model,
    hook: str | Splice,
    batches: Iterable[Contexts],
    *,
    mean_activation: Tensor,
    reconstruct: Callable[..., Tensor] | None = None,
    gradients: bool = False,
    beside: Sequence[Spliced] = (),
) -> FaithfulnessMetrics:
    """Run ``model`` four times over each batch of contexts: clean, spliced, with zeros, with the mean.

    Activations at positions that are not kept do not change.

    Args:
        hook: where the SAE was trained, or where it reads and writes.
        mean_activation: see `Spliced`.
        reconstruct: see `Spliced`; by default ``sae(rows)``. A caller that also measures the rows passes a
            function such as ``ReconstructionMeter.update``.
        gradients: see `Spliced`.
        beside: further SAEs that are in the model in the same passes.

    Raises:
        UserError: there is no prediction to score, two SAEs write one site, or the model's loss is not
            finite.
    """

    def through_sae(x_PD: Tensor) -> Tensor:
        y_hat: Tensor = sae(x_PD.to(sae.W_dec.device, torch.float32))
        return y_hat

    assert reconstruct is not None or not gradients, "gradients needs reconstruct"
    splice = hook if isinstance(hook, Splice) else Splice.at(hook, len(mean_activation))
    together = [Spliced(splice, reconstruct or through_sae, mean_activation, gradients), *beside]
    targets = [one.splice.target_names for one in together]
    ce = dict.fromkeys(("clean", "spliced", "zero", "mean"), 0.0)
    kl, n_tokens = 0.0, 0
    for batch in batches:
        scored = batch.scored()
        n_tokens += len(scored[0])
        clean_BTV = model.logits(batch.tokens_BT)
        ce["clean"] += cross_entropies(clean_BTV, scored).sum().item()
        made = [one.edits(model, batch) for one in together]
        for name in ("spliced", "zero", "mean"):
            edit = all_edits([edits[name] for edits in made], targets)
            logits_BTV = model.logits(batch.tokens_BT, edit=edit)
            ce[name] += cross_entropies(logits_BTV, scored).sum().item()
            if name == "spliced":
                kl += kl_divergences(clean_BTV, logits_BTV, scored).sum().item()
            del logits_BTV
    if n_tokens == 0:
        raise UserError(
            "there is no prediction to score: no context has a kept position that is followed by a token; "
            "evaluate on more tokens or on longer contexts"
        )
    for name, total in ce.items():
        if not math.isfinite(total):
            raise UserError(
                f"the model's {name} loss on these contexts is {total}, not finite; check the model's weights"
            )
    return FaithfulnessMetrics(
        n_tokens=n_tokens, kl=kl / n_tokens, **{f"ce_{name}": total / n_tokens for name, total in ce.items()}
    )


def cross_entropies(logits_BTV: Tensor, scored: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[S] float64: -log p(next token) of every scored prediction (see `Contexts.scored`), in nats."""
    return torch.cat(
        [
            cross_entropy(logits_BTV[context, position].float(), target, reduction="none").double()
            for context, position, target in _blocks(logits_BTV, scored)
        ]
    )


def kl_divergences(clean_BTV: Tensor, other_BTV: Tensor, scored: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[S] float64: KL(clean || other) of every scored prediction, in nats."""
    found = []
    for context, position, _ in _blocks(clean_BTV, scored):
        clean = clean_BTV[context, position].float().log_softmax(-1)
        other = other_BTV[context, position].float().log_softmax(-1)
        found.append((clean.exp() * (clean - other)).sum(-1).double())
    return torch.cat(found)


def _blocks(
    logits_BTV: Tensor, scored: tuple[Tensor, Tensor, Tensor]
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Split ``scored`` into blocks on the device of the logits, to bound the memory for logits."""
    size = max(1, SCORED_BYTES // (4 * logits_BTV.shape[-1]))
    blocks = (torch.split(part.to(logits_BTV.device), size) for part in scored)
    yield from zip(*blocks, strict=True)
