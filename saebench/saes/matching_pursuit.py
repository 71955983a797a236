"""Matching pursuit SAE, MP-SAE (Costa, Fel, Lubana, Tolooshams and Ba 2025, arXiv 2506.03093).

Shapes: N rows, D = d_in, M = d_sae atoms, K picks per row, A dead atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.aux_k import AuxKSAE, AuxSpec
from saebench.saes.base import Batch, LossTerms
from saebench_kernels import (
    is_pursuit_fused,
    matching_pursuit_coefficients,
    matching_pursuit_encode,
    matching_pursuit_energy,
    orthogonal_pursuit_encode,
    residual_variance,
)


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitSpec(AuxSpec):
    """Settings of a matching pursuit SAE."""

    name: ClassVar[str] = "matching-pursuit"
    repeats: ClassVar[bool] = True

    selection: Literal["signed", "absolute"] = "signed"
    """Pick the largest r . d_i, or the largest |r . d_i| (codes may then be negative)."""
    tolerance: float | None = None
    """Stop a token when its residual norm is below this, in the units of training; by default it stops only
    after k picks."""
    stop_on_repeat: bool = False
    """Stop a token after it has picked one of its atoms again, as the authors' toy code and SAELens do."""
    orthogonal: bool = False
    """Solve for all coefficients again after every pick (orthogonal matching pursuit)."""
    k_aux: Annotated[int | None, AtLeast(1)] = None
    """Picks among the dead atoms that explain each token's residual in the auxiliary loss; k by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tolerance(self.tolerance)
        if self.k_aux is not None and self.k_aux > self.d_sae:
            raise UserError(
                f"k_aux is {self.k_aux} but d_sae is only {self.d_sae} latents; lower --k-aux or leave it out"
            )


class MatchingPursuitSAE(AuxKSAE):
    """Subtracts from the residual of a token the atom that explains most of it, k times.

    r_0 = x - b_dec;  i_t = argmax_i r_t . d_i,  c_t = max(0, r_t . d_{i_t}),  r_{t+1} = r_t - c_t d_{i_t};
    x_hat = sum_t c_t d_{i_t} + b_dec,  so that  x - x_hat = r_T  and  |x - b_dec|^2 = sum_t c_t^2 + |r_T|^2;
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * aux (see ``auxiliary_loss``).

    The dictionary D = W_dec, unit rows, is encoder and decoder: ``W_enc_MD`` is W_dec and ``b_enc`` is 0. A
    token ends after k picks, when |r| < ``tolerance`` (an absolute norm, as in the authors' code and in
    SAELens; it is checked before the first pick too), or when no correlation is positive beyond rounding (8
    eps |x - b_dec|, with the eps of float32). Codes are in the order of the picks, padding last: those with k
    are the beginning of those with k + 1. An atom may be picked again, which adds to its coefficient:
    ``to_dense`` sums the picks, ``l0`` counts the atom once. With ``stop_on_repeat``, that pick is the last.

    ``selection="absolute"`` takes the largest |r . d_i| and c = r . d_i. ``orthogonal=True`` is orthogonal
    matching pursuit: no atom is picked twice, and after every pick the coefficients are those of least
    squares on the atoms picked. They may become negative; overcomplete solves under c >= 0 instead. Ours
    keeps the residual orthogonal to every picked atom. With k + 1 it makes the same picks and one more, with
    other coefficients.

    Gradients go through the whole recursion, with the picks held fixed. In the orthogonal variant c
    minimizes |x - x_hat|, so by the envelope theorem the loss has the gradient that it has with c held
    fixed, -2 c r^T / (N D) for the picked atoms and -2 r / (N D) for b_dec.
    """

    Spec = MatchingPursuitSpec
    spec: MatchingPursuitSpec
    tied = True
    projects_gradients = False
    """Atoms get unit norm after every step, and their gradients are not projected. Where atoms are tied, the
    gradient along an atom is large when it is picked often or overshoots; Adam divides by it, which slows
    down just these atoms. On Zipf data, at the learning rate that suits both best (3e-2), this gains 1 point
    of explained variance and 6 of MCC; on real activations it makes no difference."""
    weight_names = ("W_dec", "b_dec", "tolerance")
    tolerance: Tensor
    """Scalar: ``spec.tolerance`` in the units of the activations that this SAE encodes; 0 is none."""

    def __init__(self, spec: MatchingPursuitSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("tolerance", torch.tensor(spec.tolerance or 0.0))

    @property
    def W_enc_MD(self) -> Tensor:  # type: ignore[override]
        return self.W_dec

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        return self.W_dec.new_zeros(self.d_sae)

    @torch.no_grad()
    def initialize(self, sample: Batch, *, seed: int) -> None:
        """Random unit atoms; b_dec the mean of the sample."""
        self.initialize_dictionary(sample, seed=seed)

    def encode_rows(
        self, x_ND: Tensor, *, k: int | None = None, tolerance: float | None = None
    ) -> SparseCodes:
        """Codes of rows [N, D], in the order of the picks.

        ``k`` and ``tolerance`` other than in training make more picks, or fewer; the tolerance is in the
        units of x. k may exceed d_sae, since atoms may be picked again.

        Raises:
            UserError: k is below 1, or the tolerance not a positive number.
        """
        if k is not None and k < 1:
            raise UserError(f"k is {k}; matching pursuit needs at least 1 pick")
        _check_tolerance(tolerance)
        return self.attach_gradients(x_ND, self.pursue(x_ND, k=k, tolerance=tolerance))

    def choose(self, batch: Batch) -> SparseCodes:
        return self.pursue(batch.x_ND)

    def loss(self, batch: Batch) -> LossTerms:
        if self.spec.orthogonal or self.spec.stop_on_repeat:
            codes = self.attach_gradients(batch.x_ND, self.choose(batch))
            x_hat_ND = self.decode(codes)
            return self.terms(batch, codes, x_hat_ND, (batch.x_ND - x_hat_ND).square().mean())
        energy, found = matching_pursuit_energy(
            batch.x_ND,
            self.W_dec,
            self.b_dec,
            self.k,
            tolerance=self._tolerance(),
            absolute=self.spec.selection == "absolute",
            scan_dtype=self.compute_dtype,
        )
        objective, auxiliary = energy / batch.x_ND.numel(), energy.new_zeros(())
        if self.spec.aux_coefficient > 0:
            auxiliary = self.auxiliary_loss(batch, found.residual_ND)
        codes = SparseCodes.from_topk(found.values_NK, found.indices_NK, d_sae=self.d_sae)
        return self.add_up(batch, codes, found.residual_ND, objective, auxiliary, objective)

    def trains_fused(self, n_rows: int) -> bool:
        if self.spec.orthogonal or self.spec.stop_on_repeat:
            return False
        device = self.W_dec.device
        return is_pursuit_fused(device, self.compute_dtype, n_rows=n_rows, d_sae=self.d_sae)

    @torch.no_grad()
    def pursue(self, x_ND: Tensor, *, k: int | None = None, tolerance: float | None = None) -> SparseCodes:
        """The picks and their coefficients, without gradients."""
        encode = orthogonal_pursuit_encode if self.spec.orthogonal else matching_pursuit_encode
        values_NK, indices_NK = encode(
            x_ND - self.b_dec,
            self.W_dec,
            self.k if k is None else k,
            tolerance=self._tolerance() if tolerance is None else tolerance,
            absolute=self.spec.selection == "absolute",
            scan_dtype=self.compute_dtype,
        )
        if self.spec.stop_on_repeat:
            values_NK = end_at_repeat(values_NK, indices_NK)
        return SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)

    def _tolerance(self) -> Tensor | float:
        return 0.0 if self.spec.tolerance is None else self.tolerance

    def attach_gradients(self, x_ND: Tensor, chosen: SparseCodes) -> SparseCodes:
        """``chosen`` with the gradients of the recursion; as it is in the orthogonal variant."""
        if self.spec.orthogonal:
            return chosen
        values_S = matching_pursuit_coefficients(chosen.values, chosen.entries, x_ND, self.W_dec, self.b_dec)
        return chosen.with_values(values_S)

    @property
    def k_aux(self) -> int:
        """Picks among the dead atoms per row."""
        return self.spec.k_aux or self.k

    def auxiliary_loss(self, batch: Batch, error_ND: Tensor) -> Tensor:
        """The share of the (detached) residual that is left after a pursuit of it by the dead atoms.

        This is our reading of AuxK for an SAE without pre-activations: e_hat are ``k_aux`` picks of matching
        pursuit among the dead atoms alone, and aux = sum |e - e_hat|^2 / sum |e - mean e|^2. Decoding the top
        k_aux correlations at once, as AuxK does, would overshoot: unit atoms have no scale to learn, and many
        of them correlate with the same residual. A pursuit never increases the residual. Its gradient reaches
        only the dead atoms that were picked. 0 without dead atoms.
        """
        fused = self.trains_fused(len(batch.x_ND))
        candidates = self.aux_candidates(batch, listed=fused)
        if candidates is None:
            return error_ND.new_zeros(())
        # Listed atoms that fire again become zeros, which are never picked.
        atoms_AD = self.W_dec[candidates.latents_A] * candidates.weights_A[:, None]
        left, _ = matching_pursuit_energy(
            error_ND,
            atoms_AD,
            torch.zeros_like(self.b_dec),
            candidates.k_aux,
            absolute=self.spec.selection == "absolute",
            fused=fused,
        )
        return torch.where((candidates.weights_A > 0).any(), left / residual_variance(error_ND), 0.0)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """As for every SAE; the tolerance is divided by ``scale``, as residuals are."""
        super().fold_scale(scale)
        self.tolerance.div_(scale)


def end_at_repeat(values_NK: Tensor, indices_NK: Tensor) -> Tensor:
    """``values_NK`` with zeros after each row's first pick of an atom that it has picked before."""
    sorted_NK, place_NK = indices_NK.sort(dim=1, stable=True)
    again_NK = torch.zeros_like(indices_NK, dtype=torch.bool)
    again_NK.scatter_(1, place_NK[:, 1:], sorted_NK[:, 1:] == sorted_NK[:, :-1])
    ended_NK = again_NK.int().cumsum(dim=1) - again_NK.int() > 0
    return values_NK.masked_fill(ended_NK, 0)


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise UserError(
            f"tolerance is {tolerance}; give a positive residual norm, or none to stop only after k picks"
        )
