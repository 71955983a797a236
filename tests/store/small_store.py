"""A small world for tests: a cache with hostile tokens, an SAE, and the feature store of the two.

``build_small_store(path)`` gives the same store every time: 24 latents of which two are dead (22, 23) and
one fires on most tokens (0), 10 contexts of up to 24 tokens, 4 documents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from saebench.saes.topk import TopKSAE

D_IN, D_SAE, K, CTX_LEN, N_CONTEXTS = 12, 24, 4, 24, 10
HOOK = "blocks.0.hook_resid_post"

VOCAB: list[bytes] = [
    b"<|endoftext|>", b" the", b" of", b"\n", b"\t", b"  ", b"", b"</script>", b"<img src=x onerror=alert(1)>",
    b"&lt;", b"&amp;", b'"', b"'", b"\\", b"${x}", b"{{", "\N{GRINNING FACE}".encode()[:2],
    "\N{GRINNING FACE}".encode()[2:], b"\xe2\x80", b"\x8d", "\u202eevil".encode(), "שלום".encode(), "é".encode(),
    b"\xff", b"\x00", "\u200b".encode(), b" Senate", b" nation", b"*bold*", b"_under_", b"[link](javascript:x)",
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
        self.manifest = {"text": {"name": "small"}}
        embedding = torch.from_numpy(rng.normal(size=(len(VOCAB), D_IN)).astype(np.float32))
        noise = torch.from_numpy(rng.normal(size=(self.n_rows, D_IN)).astype(np.float32))
        self._x_ND = embedding[columns[0].long()] + 0.5 * noise
        self.held_out = torch.zeros(self.n_rows, dtype=torch.bool)
        self._text = text
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


def build_small_store(path: Path, *, text: bool = True) -> Path:
    """Write the small world's store at ``path`` row by row from the reference computation."""
    from saebench.store import publish, schema
    from saebench.store.database import insert, insert_meta, new_database
    from saebench.store.text import token_text
    from tests.store import reference

    path = Path(path)
    cache, sae = SmallCache(text=text), small_sae()
    codes_NM = sae.encode(cache.activations()).to_dense().detach().numpy()
    near = reference.neighbors(sae.W_dec.detach().numpy(), schema.NEIGHBORS_PER_FEATURE)
    logits = (sae.W_dec @ small_unembedding()).detach().numpy()
    encoder = sae.W_enc_MD.detach().numpy()
    tables: dict[str, list[dict]] = {name: [] for name in schema.SAE_TABLES | schema.TEXT_TABLES if name != "meta"}
    for row in reference.feature_rows(codes_NM, cache):
        feature = row["feature"]
        column, decoder = codes_NM[:, feature], sae.W_dec.detach().numpy()[feature]
        order = np.argsort(-logits[feature], kind="stable")
        row |= {
            "dec_norm": float(np.linalg.norm(decoder)),
            "enc_dec_cos": float(decoder @ encoder[feature] / np.linalg.norm(encoder[feature])),
            "dec_max_cos": near[feature][1][0], "dec_nn": near[feature][0][0],
            "logit_top": token_text(VOCAB[order[0]]) if text else None,
        }  # fmt: skip
        tables["feature"].append(row)
        for rank, (other, cosine) in enumerate(zip(*near[feature], strict=True)):
            tables["neighbor"].append({"feature": feature, "rank": rank, "other": other, "cosine": cosine})
        for at in np.flatnonzero(column):
            where = (int(cache.ctx[at]), int(cache.pos[at])) if text else (int(at), 0)
            tables["act"].append({"feature": feature, "ctx": where[0], "pos": where[1], "value": column[at]})
        if histogram := reference.histogram(column):
            tables["hist"].append({"feature": feature, **dict(zip(("lo", "hi", "counts"), histogram, strict=True))})
        random = np.random.default_rng(feature).permutation(np.flatnonzero(column))[:5]
        for group, rows in (("top", reference.top_rows(column, cache, 5)), ("random", random)):
            for rank, at in enumerate(rows):
                around = {"ctx": at, "pos": 0, "doc": None, "start": 0, "tokens": [], "acts": []}
                if text:
                    around = reference.window(feature, at, codes_NM, cache, 12)
                example = {"feature": feature, "grp": schema.GROUPS[group], "rank": rank, "value": column[at]}
                tables["example"].append(example | around)
        if text:
            for sign, best in ((1, order[:10]), (-1, order[::-1][:10])):
                for rank, token in enumerate(best):
                    value = logits[feature, token]
                    tables["logit"].append(
                        {"feature": feature, "sign": sign, "rank": rank, "token": token, "value": value}
                    )
            for rank, token_row in enumerate(reference.token_rows(column, cache)):
                tables["feature_token"].append({"feature": feature, "rank": rank, **token_row})
    absent = {"logit", "feature_token", "token", "context", "document"} if not text else set()
    meta = {
        "format_version": schema.FORMAT_VERSION, "name": "small", "sae": "topk", "d_in": D_IN, "d_sae": D_SAE,
        "k": K, "hook_name": HOOK, "model": "small" if text else None, "text": "small" if text else None,
        "n_tokens": cache.n_rows, "n_contexts": cache.n_contexts, "n_documents": len(LABELS) if text else 0,
        "n_activations": len(tables["act"]), "eval": {"explained_variance": 0.5, "l0": 4.0},
        "missing": dict.fromkeys(sorted(absent), "the cache was imported without tokens"),
        "sae_hash": "0" * 64, "cache_hash": cache.hash, "examples": 5, "window": 12, "seed": 0,
    }  # fmt: skip
    path.mkdir(parents=True)
    current, building = publish.begin(path)

    def write(name: str, kind: str, wanted: dict[str, schema.Table]) -> publish.StoredFile:
        file = building / name
        present = {key: table for key, table in wanted.items() if key not in absent}
        with new_database(file, present.values()) as connection:
            insert_meta(connection, wanted["meta"], meta)
            for key, table in present.items():
                if key != "meta" and tables[key]:
                    insert(connection, table, {c: [row[c] for row in tables[key]] for c in table.names})
        return publish.describe(file)

    stored_text = None
    if text:
        n_rows = np.bincount(cache.tokens.numpy(), minlength=len(VOCAB))
        tables["token"] = [
            {"token": i, "bytes": b, "text": token_text(b), "n": int(n_rows[i])} for i, b in enumerate(VOCAB)
        ]
        for ctx in range(cache.n_contexts):
            length = int(cache.context_len[ctx])
            docs = cache.doc.numpy()[cache.ctx.numpy() == ctx].tolist()
            tokens = cache.context_tokens[ctx, :length].tolist()
            tables["context"].append({"ctx": ctx, "n_tokens": length, "tokens": tokens, "docs": [docs[0], *docs]})
        tables["document"] = [{"doc": i, "label": label} for i, label in enumerate(LABELS)]
        stored_text = write("text-small.duckdb", "text", schema.TEXT_TABLES)
    file = write("sae-small.duckdb", "sae", schema.SAE_TABLES)
    stored = publish.StoredSae(name="small", file=file, text="small" if text else None)
    publish.publish(path, current, stored, stored_text)
    return path
