"""Operations of an SAE's training step: contract, plain torch reference, gradients and fused kernels.

They know tensors only, and nothing of saebench.
"""

from saebench_kernels.adam_step import adam_step, normalize_rows_
from saebench_kernels.aux_k import AuxCandidates, aux_k, residual_variance
from saebench_kernels.center import center
from saebench_kernels.dispatch import is_fused
from saebench_kernels.entries import Entries, Pursuit
from saebench_kernels.feature_choice_encode import feature_choice_encode
from saebench_kernels.gather_latents import gather_latents
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.gradient_topk_encode import gradient_topk_encode
from saebench_kernels.jump_relu import jump_relu
from saebench_kernels.latent_sums import LatentGroups, group_by_latent, latent_sums
from saebench_kernels.matching_pursuit_coefficients import (
    matching_pursuit_coefficients,
    matching_pursuit_gradients,
)
from saebench_kernels.matching_pursuit_encode import is_pursuit_fused, matching_pursuit_encode
from saebench_kernels.matching_pursuit_energy import matching_pursuit_energy
from saebench_kernels.mutual_choice_encode import mutual_choice_encode
from saebench_kernels.orthogonal_pursuit_encode import orthogonal_pursuit_encode
from saebench_kernels.reconstruction_loss import (
    ReconstructionLoss,
    SaeWeights,
    is_reconstruction_loss_fused,
    reconstruction_loss,
)
from saebench_kernels.rounded import kept_copy, rounded
from saebench_kernels.sparse_decode import sparse_decode
from saebench_kernels.sparse_encode import sparse_encode
from saebench_kernels.threshold_encode import threshold_encode
from saebench_kernels.topk_encode import topk_encode

__all__ = [
    "AuxCandidates",
    "Entries",
    "LatentGroups",
    "Pursuit",
    "ReconstructionLoss",
    "SaeWeights",
    "adam_step",
    "aux_k",
    "center",
    "feature_choice_encode",
    "gather_latents",
    "gathered_dots",
    "gradient_topk_encode",
    "group_by_latent",
    "is_fused",
    "is_pursuit_fused",
    "is_reconstruction_loss_fused",
    "jump_relu",
    "kept_copy",
    "latent_sums",
    "matching_pursuit_coefficients",
    "matching_pursuit_encode",
    "matching_pursuit_energy",
    "matching_pursuit_gradients",
    "mutual_choice_encode",
    "normalize_rows_",
    "orthogonal_pursuit_encode",
    "reconstruction_loss",
    "residual_variance",
    "rounded",
    "sparse_decode",
    "sparse_encode",
    "threshold_encode",
    "topk_encode",
]
