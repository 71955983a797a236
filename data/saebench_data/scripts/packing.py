"""The training corpus: reading documents, tokenizing them and packing them into contexts.

Shape suffixes: C contexts, T positions of a context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saebench_data import path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
STATE_OF_THE_UNION = "state_of_the_union"


@dataclass(frozen=True)
class CorpusDocument:
    """A document of the corpus; ``source`` names the collection that it comes from."""

    source: str
    text: str
    held_out: bool

    @property
    def tuning(self) -> bool:
        """True for about one training document in 20.

        Schedules and baselines are tuned on these, never on held-out text. The final model and the final
        baselines use all training documents.
        """
        digest = hashlib.sha256(self.text.encode()).digest()
        return not self.held_out and int.from_bytes(digest[8:16], "big") % 20 == 0


def read_documents(corpus: Path) -> list[CorpusDocument]:
    """The documents that make_corpus.py wrote."""
    import pyarrow.parquet as pq

    rows = pq.read_table(corpus, columns=["source", "text", "held_out"]).to_pylist()
    return [CorpusDocument(**row) for row in rows]


def read_addresses() -> list[CorpusDocument]:
    """The part of the corpus that is embedded in the package: the State of the Union addresses."""
    import pyarrow.parquet as pq

    from saebench.sources.text import is_held_out

    texts = pq.read_table(path("text/state_of_the_union.parquet"), columns=["text"])["text"].to_pylist()
    return [CorpusDocument(STATE_OF_THE_UNION, text, is_held_out(text)) for text in texts]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [
        np.array([*encoding.ids, end], dtype=np.int32) for encoding in tokenizer.encode_batch(list(texts))
    ]


def pack(documents: Iterable[np.ndarray], width: int, *, step: int | None = None) -> np.ndarray:
    """Contexts of `width` tokens, [C, width], from the concatenated documents.

    A last partial context is dropped. With step = width - 1 neighboring contexts share one token, so that
    every token except the very first is predicted once.
    """
    stream = np.concatenate(list(documents))
    windows = np.lib.stride_tricks.sliding_window_view(stream, width)
    return windows[:: step or width].copy()
