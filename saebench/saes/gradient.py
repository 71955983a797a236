"""Gradient SAE (g-SAE): keeps the latents with the largest value times effect on the model's loss.

Olmo et al. 2024, arXiv 2411.10397.

Shapes: N rows, D = d_in, M = d_sae latents, K kept per row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.core.tensors import as_rows
from saebench.saes.aux_k import AuxKSAE, AuxSpec
from saebench.saes.base import Batch, LossTerms
from saebench.saes.spec import SaeSpec
from saebench_kernels import gradient_topk_encode, rounded, topk_encode

ORACLE = "oracle"
SAMPLED_ROWS = 256
"""Rows of each training batch that statistics are computed from: on all rows they would cost another scan."""
INFLUENCE_RATE = 0.01
"""Weight of a new batch in the running mean of the influence, which thus averages about 100 steps."""
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class GradientSpec(AuxSpec):
    """Settings of a gradient SAE."""

    name: ClassVar[str] = "gradient"

    beta: Annotated[float, AtLeast(0)] = 1.0
    """Weight of a latent's effect on the model's loss in the choice; 0 chooses as TopK does."""


class GradientSAE(AuxKSAE):
    """Keeps the k largest scores of each token, where the score is the latent's value times its influence.

    With z = relu(W_enc (x - b_dec) + b_enc), the atoms D = W_dec and the gradient g of the model's loss at x,

        score = z (1 + beta c |D g|),  kept are the k largest scores,  x_hat = W_dec^T z + b_dec,
        loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK.

    z_i (d_i . g) is the first-order change of the model's loss when latent i is removed: beta = 0 is TopK,
    and a large beta chooses by that effect alone. The gradient is used for the choice only. In our reading
    (the text of the paper was not available), the values kept are z, not the score, the score has no
    gradient, and the rest is a TopK SAE. c = ``gradient_scale`` makes the mean of |D g| over tokens and
    latents 1 at initialization, so that a beta means the same for every model and every scale of its loss.

    How latents are chosen at inference is our reading, too. ``encode(x, inference=...)``:

    - ``plain``: score = z. It uses x alone, as every other SAE does. - ``proxy``: |D g| is replaced by
    ``influence``, its running mean over tokens, one number per latent. - ``oracle``: as in training, from
    ``gradient``, which has the shape of x. The gradient depends on the next
      tokens: compare with other oracles only.
    """

    Spec = GradientSpec
    spec: GradientSpec
    uses_gradients = True
    inferences = ("plain", "proxy", ORACLE)
    weight_names = (*AuxKSAE.weight_names, "gradient_scale", "influence")
    gradient_scale: Tensor
    """c, float32 scalar, per nat per unit of activation."""
    influence: Tensor
    """[M] float32: running mean over tokens of |d_i . g|."""
    steps_seen: Tensor

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("gradient_scale", torch.zeros(()))
        self.register_buffer("influence", torch.zeros(spec.d_sae))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Tensor:
        """beta c, the factor of |D g| in the score."""
        return self.spec.beta * self.gradient_scale

    # Training -------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, sample: Batch, *, seed: int) -> None:
        """As for every SAE, and set ``gradient_scale`` and the first ``influence`` from the sample.

        Raises:
            UserError: the gradients of the sample are all zero, or not finite.
        """
        self.gradient_scale.zero_()
        super().initialize(sample, seed=seed)
        gradient_ND = _gradient_of(sample)
        sum_M = torch.zeros(self.d_sae, dtype=torch.float64, device=self.W_dec.device)
        for part_nM in self._influences(gradient_ND):
            sum_M += part_nM.double().sum(0)
        mean = (sum_M.mean() / len(gradient_ND)).item()
        if not 0 < mean < float("inf"):
            raise UserError(
                f"the mean effect of a latent on the model's loss is {mean} in this cache: its gradients are "
                "all zero or not finite; harvest them again with --gradients"
            )
        self.gradient_scale.fill_(1 / mean)
        self.influence.copy_(sum_M / len(gradient_ND))
        # Once more, with the same decoder, so that the scale of the encoder fits the choice made in training.
        super().initialize(sample, seed=seed)

    def graph_key(self, progress: float) -> Hashable | None:
        return self.n_candidates if self.is_fused else None

    def choose(self, batch: Batch) -> SparseCodes:
        """The k largest scores of each row and their values, without gradients."""
        return self._by_gradient(self.centered_rows(batch), _gradient_of(batch))

    def extra_metrics(self, batch: Batch, codes: SparseCodes) -> dict[str, Tensor]:
        """The share of active latents that TopK would not have chosen (on 256 rows)."""
        with torch.no_grad():
            rows = slice(SAMPLED_ROWS)
            indices_NK, values_NK = codes.rectangular()
            mine = SparseCodes.from_topk(values_NK[rows], indices_NK[rows], d_sae=self.d_sae)
            changed, picks = self.changed_picks(mine, self._plain(self.centered(batch.x_ND[rows])))
            return {"picks_changed": changed / picks.clamp_min(1)}

    @torch.no_grad()
    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        """Also update the running mean of each latent's influence, from 256 rows of each batch."""
        super().after_step(batch, terms)
        self.steps_seen += 1
        W_dec_MD = rounded(self.W_dec, self.compute_dtype)
        mean_M = (_gradient_of(batch[:SAMPLED_ROWS]).to(W_dec_MD) @ W_dec_MD.T).float().abs().mean(0)
        rate = (1 + self.steps_seen).float().reciprocal().clamp_min(INFLUENCE_RATE)
        self.influence.lerp_(mean_M, rate)

    # Inference ------------------------------------------------------------------------------------

    def needs_gradients(self, inference: str | None = None) -> bool:
        return inference == ORACLE

    def changed_picks(self, codes: SparseCodes, default: SparseCodes) -> tuple[Tensor, Tensor]:
        """As for every SAE; both codes are rectangular, and nothing waits for the GPU."""
        indices_NK, values_NK = codes.rectangular()
        default_indices_NK, default_values_NK = default.rectangular()
        sorted_NK = torch.where(default_values_NK != 0, default_indices_NK, -1).sort(dim=1).values
        place_NK = torch.searchsorted(sorted_NK, indices_NK.contiguous()).clamp_max(sorted_NK.shape[1] - 1)
        active_NK = values_NK != 0
        new_NK = active_NK & (sorted_NK.gather(1, place_NK) != indices_NK)
        return new_NK.sum(), active_NK.sum()

    def encode(self, x: Tensor, **how: Any) -> SparseCodes:
        """Codes of ``x`` [..., d_in]; ``inference`` and ``gradient`` as the class describes them.

        Raises:
            UserError: the last axis is not d_in, an unknown ``inference``, or a ``gradient`` that is
                missing, of another shape than ``x``, not finite, or given although only ``oracle`` reads it.
        """
        gradient = how.get("gradient")
        if gradient is not None:
            x = as_rows(x, "x", width=self.d_in, device=self.W_dec.device)
            wanted = (*x.shape[:-1], self.d_out)
            gradient = as_rows(gradient, "gradient", width=self.d_out, device=self.W_dec.device)
            how["gradient"] = gradient
            if gradient.shape != wanted:
                raise UserError(f"gradient has shape {tuple(gradient.shape)}; it must be {wanted}")
        if gradient is not None and not gradient.isfinite().all():
            raise UserError(
                "gradient holds NaN or infinity, so latents cannot be chosen by it; "
                "harvest again with --gradients"
            )
        return super().encode(x, **how)

    def encode_rows(
        self, x_ND: Tensor, *, inference: str = "plain", gradient: Tensor | None = None
    ) -> SparseCodes:
        """Codes of rows [N, D], chosen as ``inference`` says."""
        if inference not in self.inferences:
            raise UserError(f"inference is {inference!r}; give one of {', '.join(self.inferences)}")
        if (gradient is not None) != self.needs_gradients(inference):
            raise UserError(
                "inference='oracle' needs gradient=..., the model's gradient at x; the other modes take none"
            )
        with torch.no_grad():
            if gradient is not None:
                chosen = self._by_gradient(self.centered(x_ND), gradient.reshape(-1, self.d_out).to(x_ND))
            elif inference == "proxy":
                chosen = self._by_influence(x_ND)
            else:
                chosen = self._plain(self.centered(x_ND))
        return self.attach_gradients(x_ND, chosen)

    def _by_gradient(self, centered_ND: Tensor, gradient_ND: Tensor) -> SparseCodes:
        values_NK, indices_NK = gradient_topk_encode(
            centered_ND,
            gradient_ND,
            self.W_enc_MD,
            self.W_dec,
            self.b_enc,
            self.k,
            self.weight,
            scan_dtype=self.compute_dtype,
        )
        return SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)

    def _by_influence(self, x_ND: Tensor) -> SparseCodes:
        """TopK of scaled weights, since each latent's score has one factor."""
        factor_M = 1 + self.weight * self.influence
        values_NK, indices_NK = topk_encode(
            self.centered(x_ND),
            self.W_enc_MD * factor_M[:, None],
            self.b_enc * factor_M,
            self.k,
            scan_dtype=self.compute_dtype,
        )
        return SparseCodes.from_topk(values_NK / factor_M[indices_NK], indices_NK, d_sae=self.d_sae)

    def _plain(self, centered_ND: Tensor) -> SparseCodes:
        values_NK, indices_NK = topk_encode(
            centered_ND, self.W_enc_MD, self.b_enc, self.k, scan_dtype=self.compute_dtype
        )
        return SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)

    def _influences(self, gradient_ND: Tensor) -> Iterator[Tensor]:
        """|g D^T| [n, M], a few rows at a time."""
        for part_nD in torch.split(gradient_ND, max(1, _CHUNK_BYTES // (4 * self.d_sae))):
            yield (part_nD.to(self.W_dec) @ self.W_dec.T).abs_()


def _gradient_of(batch: Batch) -> Tensor:
    if batch.gradient_ND is None:
        raise ValueError("a gradient SAE needs batches with gradient_ND")
    return batch.gradient_ND
