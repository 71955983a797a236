"""A synthetic text and synthetic codes of any size: Zipf frequencies, log-normal values, fixed seed.

Shapes: N tokens, B tokens of a batch, M latents, K active latents per token, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saebench.core.hashing import hash_random
from saebench.saes.topk import TopKSAE

CTX_LEN = 128
VOCAB = 32_768
LABELS = 100
CONTEXTS_PER_DOCUMENT = 8
BATCH = 16_384
FLATNESS = 64
"""Latent i fires in proportion to 1 / (i + FLATNESS); of 16,384 with k 32, the first on 10% of tokens."""


class MadeUpCache:
    """The parts of an activation cache that a store reads, except the activations."""

    def __init__(self, n_tokens: int, d_in: int) -> None:
        self.path = Path("made-up")
        self.n_contexts = -(-n_tokens // CTX_LEN)
        self.n_rows, self.ctx_len, self._d_in = self.n_contexts * CTX_LEN, CTX_LEN, d_in
        self.hooks, self.hash, self.model = ["made-up"], "made-up", None
        self.manifest: dict[str, Any] = {}
        token_N = _zipf(np.random.default_rng(0).random(self.n_rows), VOCAB, 3).astype(np.int32)
        self.tokens = torch.from_numpy(token_N)
        row_N = torch.arange(self.n_rows, dtype=torch.int32)
        self.ctx, self.pos = row_N // CTX_LEN, row_N % CTX_LEN
        self.doc = self.ctx // CONTEXTS_PER_DOCUMENT
        self.context_tokens = self.tokens.view(-1, CTX_LEN)
        self.context_len = torch.full((self.n_contexts,), CTX_LEN, dtype=torch.int32)

    def d_in(self, hook: str | None = None) -> int:
        return self._d_in

    @property
    def models(self) -> list[dict[str, str]]:
        return []

    def model_of(self, hook: str | None = None) -> None:
        return None

    def vocab(self) -> list[bytes]:
        return [b" token%d" % number for number in range(VOCAB)]

    def doc_labels(self) -> list[str]:
        return [f"source {doc % LABELS}" for doc in range(int(self.doc[-1]) + 1)]


def made_up_sae(d_in: int, d_sae: int, k: int) -> TopKSAE:
    """An SAE with random directions."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(TopKSAE.Spec(d_sae=d_sae, k=k), d_in)
    with torch.no_grad():
        for weight in (sae.W_enc_MD, sae.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator))
        sae.normalize_decoder()
    return sae.eval()


def made_up_codes(
    cache: MadeUpCache, d_sae: int, k: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Batches of ``(latent, row, value)``; each token has k latents, which are nearly always different.

    Half of the latents are determined by the token, as in a real SAE; the others are random.
    """
    rng = np.random.default_rng(1)
    name_M = rng.permutation(d_sae)
    part_K = np.arange(k)
    for start in range(0, cache.n_rows, BATCH):
        token_B = cache.tokens[start : start + BATCH].numpy()
        drawn_BK = rng.random((len(token_B), k))
        fixed_BK = hash_random(token_B[:, None], part_K[None], 0).astype(np.float64) / 2.0**64
        share_BK = np.where(part_K % 2 == 0, fixed_BK, drawn_BK)
        latent_BK = name_M[_zipf((part_K + share_BK) / k, d_sae, FLATNESS)]
        value_BK = rng.lognormal(sigma=0.7, size=latent_BK.shape).astype(np.float32)
        row_BK = np.repeat(np.arange(start, start + len(token_B)), k)
        yield latent_BK.reshape(-1), row_BK, value_BK.reshape(-1)


def _zipf(share: NDArray[np.float64], n: int, flatness: int) -> NDArray[np.int64]:
    """Map uniform ``share`` to numbers i below n with probability proportional to 1 / (i + flatness)."""
    found: NDArray[np.int64] = np.minimum(np.searchsorted(_covered(n, flatness), share, side="right"), n - 1)
    return found


@functools.cache
def _covered(n: int, flatness: int) -> NDArray[np.float64]:
    covered: NDArray[np.float64] = np.cumsum(1 / (np.arange(n) + flatness))
    covered /= covered[-1]
    return covered
