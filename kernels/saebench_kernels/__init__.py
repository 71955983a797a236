"""Tensor operations that an SAE's step is made of; they know tensors and nothing of saebench."""

from saebench_kernels.center import center
from saebench_kernels.dispatch import is_fused
from saebench_kernels.feature_choice_encode import feature_choice_encode
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.gradient_topk_encode import gradient_topk_encode
from saebench_kernels.latent_sums import LatentGroups, group_by_latent, latent_sums
from saebench_kernels.matching_pursuit_encode import (
    matching_pursuit_encode,
    pursue_fused,
    pursues_fused,
)
from saebench_kernels.matching_pursuit_gradients import matching_pursuit_gradients
from saebench_kernels.mutual_choice_encode import mutual_choice_encode
from saebench_kernels.orthogonal_pursuit_encode import orthogonal_pursuit_encode
from saebench_kernels.rounded import kept_copy, rounded
from saebench_kernels.sparse_decode import sparse_decode
from saebench_kernels.threshold_encode import threshold_encode
from saebench_kernels.topk_encode import topk_encode

__all__ = [
    "LatentGroups",
    "center",
    "feature_choice_encode",
    "gathered_dots",
    "gradient_topk_encode",
    "group_by_latent",
    "is_fused",
    "kept_copy",
    "latent_sums",
    "matching_pursuit_encode",
    "matching_pursuit_gradients",
    "mutual_choice_encode",
    "orthogonal_pursuit_encode",
    "pursue_fused",
    "pursues_fused",
    "rounded",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]
