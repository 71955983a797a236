"""Reference implementation of every table of a store, computed by brute force from dense codes."""

from __future__ import annotations

import numpy as np

from saebench.store import schema
from saebench.store.text import token_text


def feature_rows(codes_NM, cache) -> list[dict]:
    """One dict per latent, with the columns that depend on activations only."""
    rows = []
    for feature, column in enumerate(codes_NM.T):
        at = np.flatnonzero(column)
        values = column[at].astype(np.float64)
        row = {
            "feature": feature,
            "n_act": len(at),
            "density": len(at) / len(column),
            "max_act": values.max() if len(at) else 0.0,
            "mean_act": values.mean() if len(at) else 0.0,
            "std_act": values.std() if len(at) else 0.0,
            **moments(values),
            **{f"p{q}": np.quantile(values, q / 100) if len(at) else 0.0 for q in (10, 25, 50, 75, 90, 99)},
            "dead": len(at) == 0,
            "dense": len(at) / len(column) > schema.DENSE_ABOVE,
            **dict.fromkeys(OF_TEXT),
        }
        if cache.tokens is not None:
            row["n_ctx_act"] = len(set(cache.ctx.numpy()[at]))
            row["n_doc_act"] = len(set(cache.doc.numpy()[at]))
            tokens = token_rows(column, cache)
            if tokens:
                ctx = cache.ctx.numpy()
                row["mean_pos"] = float(cache.pos.numpy()[at].mean())
                row["first_pos_share"] = float(np.mean([a == 0 or ctx[a - 1] != ctx[a] for a in at]))
                row["top_token_p_fire"] = tokens[0]["p_fire_given_token"]
                shares = np.array([one["p_token_given_fire"] for one in tokens])
                row["top_token"] = token_text(cache.vocab()[tokens[0]["token"]])
                row["top_token_share"] = shares[0]
                row["entropy_tok"] = float(-(shares * np.log2(shares)).sum())
        rows.append(row)
    return rows


OF_TEXT = (
    "n_ctx_act",
    "n_doc_act",
    "mean_pos",
    "first_pos_share",
    "top_token",
    "top_token_share",
    "top_token_p_fire",
    "entropy_tok",
)


def moments(values) -> dict:
    """Skewness and excess kurtosis, 0 for values that are all equal."""
    centered = values - values.mean() if len(values) else values
    variance = (centered**2).mean() if len(values) else 0.0
    if variance <= 1e-12:
        return {"skew": 0.0, "kurtosis": 0.0}
    return {
        "skew": (centered**3).mean() / variance**1.5,
        "kurtosis": (centered**4).mean() / variance**2 - 3,
    }


def tokens_at(cache, role: int):
    """The token before (-1), at (0) or after (1) each row of the cache; -1 beyond the context's ends."""
    found = []
    for ctx, pos in zip(cache.ctx.tolist(), cache.pos.tolist(), strict=True):
        at = pos + role
        inside = 0 <= at < int(cache.context_len[ctx])
        found.append(int(cache.context_tokens[ctx, at]) if inside else -1)
    return np.array(found)


def token_rows(column, cache, role: int = 0) -> list[dict]:
    """All tokens on which a latent fires (or next to which, see tokens_at), most often first."""
    tokens = cache.tokens.numpy() if role == 0 else tokens_at(cache, role)
    fired = tokens[column != 0]
    rows = []
    for token in set(fired.tolist()) - {-1}:
        n, total = int((fired == token).sum()), int((tokens == token).sum())
        rows.append(
            {
                "token": token,
                "n": n,
                "p_token_given_fire": n / len(fired),
                "p_fire_given_token": n / total,
                "lift": (n / len(fired)) / (total / len(tokens)),
            }
        )
    return sorted(rows, key=lambda row: (-row["n"], row["token"]))


def histogram(column) -> tuple[float, float, list[int]] | None:
    values = column[column != 0].astype(np.float64)
    if not len(values):
        return None
    lo, hi = min(0.0, values.min()), max(0.0, values.max())
    bins = np.minimum((values - lo) / (hi - lo) * schema.HIST_BINS, schema.HIST_BINS - 1).astype(int)
    return lo, hi, np.bincount(bins, minlength=schema.HIST_BINS).tolist()


def together(codes_NM) -> dict[tuple[int, int], tuple[int, float, float]]:
    """(latent, other) -> number of tokens on which both fire, Jaccard index, correlation."""
    found = {}
    for a in range(codes_NM.shape[1]):
        for b in range(codes_NM.shape[1]):
            x, y = codes_NM[:, a].astype(np.float64), codes_NM[:, b].astype(np.float64)
            both = int(((x != 0) & (y != 0)).sum())
            if a != b and both:
                spread = x.std() * y.std()
                correlation = ((x * y).mean() - x.mean() * y.mean()) / spread if spread > 1e-6 else None
                found[a, b] = both, both / int(((x != 0) | (y != 0)).sum()), correlation
    return found


def top_rows(column, cache, n: int) -> list[int]:
    """Rows of the largest activations of the ``n`` contexts in which a latent has the largest activations."""
    ctx = np.arange(len(column)) if cache.ctx is None else cache.ctx.numpy()
    best: dict[int, int] = {}
    for row in np.flatnonzero(column):
        if ctx[row] not in best or column[row] > column[best[ctx[row]]]:
            best[ctx[row]] = row
    return [int(row) for row in sorted(best.values(), key=lambda row: (-column[row], row))[:n]]


def window(feature: int, row: int, codes_NM, cache, size: int) -> dict:
    """The window around a row: where it starts, its tokens, and the latent's activation at each."""
    ctx, pos = int(cache.ctx[row]), int(cache.pos[row])
    length = int(cache.context_len[ctx])
    start = max(0, min(pos - 2 * size // 3, length - size))
    where = range(start, min(start + size, length))
    values = {}
    for other in np.flatnonzero(cache.ctx.numpy() == ctx):
        values[int(cache.pos[other])] = float(codes_NM[other, feature])
    return {
        "ctx": ctx,
        "pos": pos,
        "doc": int(cache.doc[row]),
        "start": start,
        "tokens": [int(cache.context_tokens[ctx, p]) for p in where],
        "acts": [values.get(p, 0.0) for p in where],
    }


def neighbors(W_dec_MD, n: int) -> list[tuple[list[int], list[float]]]:
    unit = W_dec_MD / np.maximum(np.linalg.norm(W_dec_MD, axis=1, keepdims=True), 1e-30)
    cosine = unit @ unit.T
    found = []
    for feature, row in enumerate(cosine):
        others = sorted((other for other in range(len(row)) if other != feature), key=lambda o: (-row[o], o))[
            :n
        ]
        found.append((others, [float(row[o]) for o in others]))
    return found
