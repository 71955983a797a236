"""A small activation cache with hostile tokens, an SAE, and their feature store, for tests.

``build_small_store(path)`` gives the same store every time: 24 latents of which two are dead (22, 23) and
one fires on most tokens (0), 10 contexts of up to 24 tokens, 4 documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from saebench.saes.base import SAE
from saebench.saes.topk import TopKSAE
from saebench.sources.modality import TEXT, UNIT
from saebench.store import publish
from saebench.store.build import IndexJob, Options, build_all

D_IN, D_SAE, K, CTX_LEN, N_CONTEXTS = 12, 24, 4, 24, 10
HOOK = "blocks.0.hook_resid_post"

VOCAB: list[bytes] = [
    b"<|endoftext|>", b" the", b" of", b"\n", b"\t", b"  ", b"", b"</script>",
    b"<img src=x onerror=alert(1)>",
    b"&lt;", b"&amp;", b'"', b"'", b"\\", b"${x}", b"{{", "\N{GRINNING FACE}".encode()[:2],
    "\N{GRINNING FACE}".encode()[2:], b"\xe2\x80", b"\x8d", "\u202eevil".encode(), "שלום".encode(),
    "é".encode(),
    b"\xff", b"\x00", "\u200b".encode(), b" Senate", b" nation", b"*bold*", b"_under_",
    b"[link](javascript:x)",
    b"$math$",
]  # fmt: skip
LABELS = ["1790 Washington", "1862 <b>Lincoln</b>", "1934 Roosevelt & co", "1980 Carter"]


class SmallCache:
    """An activation cache in memory, with the properties that a store is made from."""

    def __init__(self, seed: int = 0, *, n_contexts: int = N_CONTEXTS, text: bool = True) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(3, CTX_LEN + 1, n_contexts)
        lengths[0] = CTX_LEN
        tokens = np.zeros((n_contexts, CTX_LEN), dtype=np.int32)
        rows = []
        for ctx, length in enumerate(lengths):
            tokens[ctx, :length] = rng.integers(0, len(VOCAB), length)
            doc = min(ctx * len(LABELS) // n_contexts, len(LABELS) - 1)
            for pos in range(1, length):
                rows.append((tokens[ctx, pos], min(doc + (pos > 12), len(LABELS) - 1), ctx, pos))
        tokens[0, :8] = [1, 16, 17, 7, 8, 18, 19, 3]
        rows = [(tokens[ctx, pos], doc, ctx, pos) for _, doc, ctx, pos in rows]
        columns = [torch.from_numpy(np.array(column, dtype=np.int32)) for column in zip(*rows, strict=True)]
        self.path = Path("small-cache")
        self.hooks = [HOOK]
        self.n_rows = len(rows)
        self.dtype = torch.float32
        self.hash = f"{seed:064d}"
        self.manifest = {"made_from": {"text": {"name": "small"}}}
        embedding = torch.from_numpy(rng.normal(size=(len(VOCAB), D_IN)).astype(np.float32))
        noise = torch.from_numpy(rng.normal(size=(self.n_rows, D_IN)).astype(np.float32))
        self._x_ND = embedding[columns[0].long()] + 0.5 * noise
        self.held_out = torch.zeros(self.n_rows, dtype=torch.bool)
        self._text = text
        self.modality, self.unit = TEXT if text else UNIT, None
        self.model = {"name": "small"} if text else None
        self.tokens, self.doc, self.ctx, self.pos = columns if text else (None,) * 4
        self.context_tokens = torch.from_numpy(tokens) if text else None
        self.context_len = torch.from_numpy(lengths.astype(np.int32)) if text else None
        self.n_contexts = n_contexts if text else 0
        self.ctx_len = CTX_LEN if text else 0

    def d_in(self, hook: str | None = None) -> int:
        return D_IN

    def activations(self, hook: str | None = None) -> torch.Tensor:
        return self._x_ND

    verified = activations

    @property
    def models(self) -> list[dict[str, str]]:
        return [self.model] if self.model else []

    def model_of(self, hook: str | None = None) -> dict[str, str] | None:
        return self.model

    def hook_of(self, hook: str | None = None) -> str:
        return hook or HOOK

    def vocab(self) -> list[bytes] | None:
        return VOCAB if self._text else None

    def doc_labels(self) -> list[str] | None:
        return LABELS if self._text else None


def small_sae(seed: int = 0, *, d_sae: int = D_SAE, k: int = K, d_in: int = D_IN) -> TopKSAE:
    """A TopK SAE with random weights; the last two latents are dead and the first is dense."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKSAE.Spec(d_sae=d_sae, k=k), d_in)
    with torch.no_grad():
        for weight in (sae.W_enc_MD, sae.W_dec, sae.b_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator))
        sae.normalize_decoder()
        if d_sae >= 8:
            sae.b_enc[-2:] = -1e4
            sae.b_enc[0] = 4.0
    return sae.eval()


def small_unembedding(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_IN, len(VOCAB), generator=torch.Generator().manual_seed(seed + 1))


def small_options(**changes: object) -> Options:
    settings = {"name": "small", "hook": HOOK, "examples": 5, "window": 12, "batch_size": 13, "quiet": True}
    return Options(**settings | changes)


def build_store(out: Path, sae: SAE, cache: Any, options: Options, **others: Any) -> publish.Manifest:
    """Write one SAE into the store ``out`` and publish it; ``others`` are further arguments of IndexJob."""
    return build_all(out, [IndexJob(sae=sae, options=options, **others)], cache)


def build_small_store(
    path: Path, *, text: bool = True, name: str = "small", seed: int = 0, metrics: Path | None = None
) -> Path:
    """Build the small store at ``path``, or add an SAE with random weights from ``seed`` to it."""
    build_store(
        Path(path), small_sae(seed), SmallCache(text=text), small_options(name=name),
        W_U_DV=small_unembedding() if text else None,
        no_logits="" if text else "the cache has no tokens, so there is nothing to name logits by",
        evaluation={"sae": "topk", "d_sae": D_SAE, "k": K, "explained_variance": 0.5, "l0": 4.0},
        metrics=metrics,
    )  # fmt: skip
    return Path(path)
