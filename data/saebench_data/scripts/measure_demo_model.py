"""Recompute the numbers of README.md: held-out losses of the demo model and of its baselines.

    python -m saebench_data.scripts.measure_demo_model corpus.parquet

Every loss is a mean over the same predictions, in nats per token: the held-out documents of a source are
concatenated with the end-of-text token between them and cut into contexts of N_CTX tokens, and every token
except the first of a context is predicted. The n-grams are counted on training documents; kappa is tuned on
training documents that are not counted. Without a corpus only the embedded State of the Union is measured.

Shape suffixes: C contexts, T positions of a context.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import saebench_data
from saebench_data.scripts.ngrams import Bigram
from saebench_data.scripts.packing import (
    CorpusDocument,
    encode_documents,
    pack,
    read_addresses,
    read_documents,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

N_CTX = 256


@dataclass(frozen=True)
class Losses:
    """Nats per token on the held-out documents of one source."""

    source: str
    documents: int
    predictions: int
    untrained: float
    unigram: float
    bigram: float  # counted on the training documents of all sources
    own_bigram: float  # counted on the training documents of this source
    model: float


def model_losses(model: Any, contexts_CT: np.ndarray, *, batch: int = 16) -> np.ndarray:
    """Loss [C, T - 1] of a Hugging Face model on every token except the first of each context."""
    pieces = []
    for tokens in torch.from_numpy(contexts_CT).long().split(batch):
        tokens = tokens.to(model.device)
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1]
        pieces.append(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        )
    return torch.cat(pieces).cpu().numpy()


def load(folder: Path, *, device: str = "cpu") -> tuple[Any, Any, Tokenizer]:
    """The saved model in fp32, the same model untrained, and its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    torch.manual_seed(0)
    untrained = GPT2LMHeadModel(model.config).eval()
    return model.to(device), untrained.to(device), Tokenizer.from_file(str(folder / "tokenizer.json"))


def count_bigram(tokenizer: Tokenizer, documents: Sequence[CorpusDocument]) -> Bigram:
    """A bigram model of these training documents, with kappa tuned on those reserved for tuning."""
    assert not any(document.held_out for document in documents)
    tokens = encode_documents(tokenizer, [document.text for document in documents])
    vocab_size = tokenizer.get_vocab_size()
    kept = [token for token, document in zip(tokens, documents, strict=True) if not document.tuning]
    aside = [token for token, document in zip(tokens, documents, strict=True) if document.tuning]
    kappa = Bigram(kept, vocab_size=vocab_size).tune_kappa(pack(aside, N_CTX))
    return Bigram(tokens, vocab_size=vocab_size, kappa=kappa)


def measure(documents: Sequence[CorpusDocument], folder: Path, *, device: str = "cpu") -> list[Losses]:
    """One line per source, and a last line "all" when there are several sources."""
    model, untrained, tokenizer = load(folder, device=device)
    training = [document for document in documents if not document.held_out]
    bigram = count_bigram(tokenizer, training)
    lines, columns = [], []
    for source in dict.fromkeys(document.source for document in documents):
        held_out = [
            document.text for document in documents if document.held_out and document.source == source
        ]
        contexts_CT = pack(encode_documents(tokenizer, held_out), N_CTX)
        own = count_bigram(tokenizer, [document for document in training if document.source == source])
        losses = (
            model_losses(untrained, contexts_CT),
            bigram.unigram_losses(contexts_CT),
            bigram.losses(contexts_CT),
            own.losses(contexts_CT),
            model_losses(model, contexts_CT),
        )
        means = [float(loss.mean()) for loss in losses]
        lines.append(Losses(source, len(held_out), losses[0].size, *means))
        columns.append(losses)
    if len(lines) > 1:
        means = [float(np.concatenate(column).mean()) for column in zip(*columns, strict=True)]
        lines.append(
            Losses(
                "all", sum(line.documents for line in lines), sum(line.predictions for line in lines), *means
            )
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, nargs="?", help="what make_corpus.py wrote")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; by default the embedded model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    documents = read_documents(arguments.corpus) if arguments.corpus else read_addresses()
    folder = arguments.model or saebench_data.path("demo_model")

    print("| source | held-out documents | predictions | untrained | unigram | bigram | own bigram | model |")
    print("|---|---|---|---|---|---|---|---|")
    for line in measure(documents, folder, device=arguments.device):
        losses = (line.untrained, line.unigram, line.bigram, line.own_bigram, line.model)
        numbers = " | ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {line.source} | {line.documents} | {line.predictions:,} | {numbers} |")


if __name__ == "__main__":
    main()
