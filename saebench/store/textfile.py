"""The text file of a store: tokens, contexts and documents, shared by all SAEs of one text.

Shapes: C contexts, T positions, X tokens of a block of contexts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import CHUNK, Corpus, chunks
from saebench.store.database import insert, insert_meta, new_database
from saebench.store.schema import (
    CONTEXT,
    DOCUMENT,
    FORMAT_VERSION,
    TEXT_META,
    TEXT_TABLES,
    TOKEN,
    UNIT,
    UNIT_TABLES,
)
from saebench.store.statistics import list_column
from saebench.store.text import token_text


def write_text_file(path: Path, corpus: Corpus, *, name: str | None) -> None:
    """Write the tables token, context and document of ``corpus``; ``name`` is the name of the text."""
    with new_database(path, TEXT_TABLES.values()) as connection:
        vocab = corpus.vocab
        insert(
            connection,
            TOKEN,
            {
                "token": np.arange(len(vocab)),
                "bytes": vocab,
                "text": [token_text(token) for token in vocab],
                "n": corpus.token_counts,
            },
        )
        labels = (corpus.labels or [])[: corpus.n_documents]
        labels += [""] * (corpus.n_documents - len(labels))
        insert(
            connection,
            DOCUMENT,
            {
                "doc": np.arange(corpus.n_documents),
                "label": [label or None for label in labels],
            },
        )
        for contexts in chunks(corpus.n_contexts, CHUNK // corpus.ctx_len):
            insert(connection, CONTEXT, _contexts(corpus, contexts))
        insert_meta(
            connection,
            TEXT_META,
            {
                "format_version": FORMAT_VERSION,
                "text": name,
                "text_hash": corpus.hash,
                "n_tokens": corpus.n_rows,
                "n_contexts": corpus.n_contexts,
                "n_documents": corpus.n_documents,
            },
        )


def write_unit_file(path: Path, corpus: Corpus) -> None:
    """Write the table unit of ``corpus``, whose units are not texts."""
    own, of_rows = (
        np.stack(list(columns.values()), axis=1) if columns else np.zeros((n, 0))
        for columns, n in (
            (corpus.unit_columns, corpus.n_contexts),
            (corpus.row_columns, corpus.n_rows),
        )
    )
    with new_database(path, UNIT_TABLES.values()) as connection:
        for contexts in chunks(corpus.n_contexts, CHUNK // corpus.ctx_len):
            length_C = corpus.context_len[contexts].astype(np.int64)
            inside_CT = np.arange(corpus.ctx_len) < length_C[:, None]
            kept_CT = _kept(corpus, contexts)
            low, high = np.searchsorted(
                corpus.ctx, np.array([contexts.start, contexts.stop], dtype=corpus.ctx.dtype)
            )
            rows = {
                "ctx": np.arange(contexts.start, contexts.stop),
                "n_positions": length_C,
                "kept": list_column(kept_CT[inside_CT], length_C),
                "unit_values": list_column(own[contexts].reshape(-1), own.shape[1] + 0 * length_C),
                "row_values": list_column(
                    of_rows[low:high].reshape(-1), of_rows.shape[1] * kept_CT.sum(axis=1)
                ),
            }
            insert(connection, UNIT, rows)
        meta = {
            "format_version": FORMAT_VERSION,
            "modality": corpus.modality,
            "text": None,
            "text_hash": corpus.hash,
            "n_tokens": corpus.n_rows,
            "n_contexts": corpus.n_contexts,
            "n_documents": 0,
            "unit_columns": list(corpus.unit_columns),
            "row_columns": list(corpus.row_columns),
        }
        insert_meta(connection, TEXT_META, meta)


def _contexts(corpus: Corpus, contexts: slice) -> dict[str, Any]:
    length_C = corpus.context_len[contexts].astype(np.int64)
    inside_CT = np.arange(corpus.ctx_len) < length_C[:, None]
    context_X, pos_X = np.nonzero(inside_CT)
    return {
        "ctx": np.arange(contexts.start, contexts.stop),
        "n_tokens": length_C,
        "tokens": list_column(corpus.context_tokens[contexts][inside_CT], length_C),
        "docs": list_column(_documents(corpus, context_X + contexts.start, pos_X), length_C),
        "kept": list_column(_kept(corpus, contexts)[inside_CT], length_C),
    }


def _kept(corpus: Corpus, contexts: slice) -> NDArray[np.bool_]:
    """[C, T]: of which tokens the cache keeps a row."""
    kept_CT = np.zeros((contexts.stop - contexts.start, corpus.ctx_len), dtype=bool)
    low, high = np.searchsorted(corpus.ctx, np.array([contexts.start, contexts.stop], dtype=corpus.ctx.dtype))
    kept_CT[corpus.ctx[low:high] - contexts.start, corpus.pos[low:high]] = True
    return kept_CT


def _documents(corpus: Corpus, ctx_X: NDArray[np.int64], pos_X: NDArray[np.int64]) -> NDArray[np.int64]:
    """The document of each token; one that the cache keeps no row of goes with the row that follows it."""
    ends = np.array([ctx_X[0], ctx_X[-1] + 1], dtype=corpus.ctx.dtype)  # another type would copy all of ctx
    low, high = np.searchsorted(corpus.ctx, ends)
    if low == high:
        return np.zeros(len(ctx_X), dtype=np.int64)
    place_N = corpus.place(np.arange(low, high))
    following_X = np.minimum(np.searchsorted(place_N, ctx_X * corpus.ctx_len + pos_X), high - low - 1) + low
    before_X = np.maximum(following_X - 1, 0)
    elsewhere_X = corpus.ctx[following_X] != ctx_X
    doc_X: NDArray[np.int64] = corpus.doc[np.where(elsewhere_X, before_X, following_X)].astype(np.int64)
    return doc_X
