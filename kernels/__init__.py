"""Tensor operations that an SAE's step is made of; they know tensors and nothing of saebench."""

from saebench_kernels.latent_sums import group_by_latent, latent_sums
from saebench_kernels.sparse_decode import sparse_decode, sparse_decode_values_grad
from saebench_kernels.topk_encode import topk_encode

__all__ = ["group_by_latent", "latent_sums", "sparse_decode", "sparse_decode_values_grad", "topk_encode"]
