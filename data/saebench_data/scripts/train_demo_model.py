"""Train the demo language model: a GPT-2 of 4 layers on 28 MB of freely licensed English.

    python -m saebench_data.scripts.make_corpus ... --out corpus.parquet
    python -m saebench_data.scripts.train_demo_model corpus.parquet --out data/demo_model

The defaults are the settings that made demo_model/; README.md has its losses. Schedules were compared with
--tune, which reserves training documents (packing.CorpusDocument.tuning), so that held-out documents are
measured only once, at the end.

Shape suffixes: B contexts in a batch, T positions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saebench_data.scripts.packing import (
    END_OF_TEXT,
    STATE_OF_THE_UNION,
    CorpusDocument,
    encode_documents,
    pack,
    read_documents,
)

VOCAB = 8192
N_CTX = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=2, help="how often the addresses are seen per epoch")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128, help=f"contexts of {N_CTX} tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tune", action="store_true", help="leave out the tuning documents and report their loss"
    )
    parser.add_argument(
        "--stop-after", type=int, default=None, help="stop after this many steps of the schedule, for a trial"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE like GPT-2's: it encodes every string, and tokens include their leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    documents: list[np.ndarray], order: np.random.Generator, *, epochs: int, batch: int, device: str
) -> Iterator[torch.Tensor]:
    """Batches [B, T + 1] of contexts; each epoch packs the documents in a new order."""
    for _ in range(epochs):
        shuffled = [documents[i] for i in order.permutation(len(documents))]
        packed = pack(shuffled, N_CTX + 1, step=N_CTX)
        contexts = torch.from_numpy(packed[order.permutation(len(packed))]).to(device)
        for start in range(0, len(contexts) - batch + 1, batch):
            yield contexts[start : start + batch].long()


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Linear warm-up over the first 2% of the steps, then a cosine down to a twentieth of the peak."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def main() -> None:
    arguments = parse()
    device = arguments.device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS repeatable
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    # 1. Documents: held-out ones are dropped here and not used below.
    learned = [document for document in read_documents(arguments.corpus) if not document.held_out]
    tuning = [document for document in learned if document.tuning]
    if arguments.tune:
        learned = [document for document in learned if not document.tuning]
    repeated = [
        document
        for document in learned
        for _ in range(arguments.repeats if document.source == STATE_OF_THE_UNION else 1)
    ]

    # 2. Tokens.
    tokenizer = train_tokenizer([document.text for document in repeated])
    token_documents = encode_documents(tokenizer, [document.text for document in repeated])
    steps_an_epoch = (sum(map(len, token_documents)) - 1) // N_CTX // arguments.batch
    steps = arguments.epochs * steps_an_epoch

    # 3. The model, its fp32 weights and optimizer; matrix products run in bf16.
    end = tokenizer.token_to_id(END_OF_TEXT)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=N_CTX,
            n_embd=256,
            n_layer=4,
            n_head=4,
            resid_pdrop=arguments.dropout,
            embd_pdrop=arguments.dropout,
            attn_pdrop=arguments.dropout,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": arguments.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=arguments.lr,
        betas=(0.9, 0.95),
        fused=device != "cpu",
    )
    compiled = torch.compile(model) if device != "cpu" else model

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = compiled(batch[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps:,} steps of "
        f"{arguments.batch * N_CTX:,} tokens, {sum(map(len, token_documents)):,} tokens an epoch",
        flush=True,
    )

    # 4. Training.
    order = np.random.default_rng(arguments.seed)
    started = time.monotonic()
    stream = batches(token_documents, order, epochs=arguments.epochs, batch=arguments.batch, device=device)
    for step, batch in enumerate(stream):
        if step == arguments.stop_after or step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=steps, peak=arguments.lr)
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % (steps_an_epoch * 2) == 0 or step == steps - 1:
            line = {
                "step": step,
                "epoch": round(step / steps_an_epoch, 2),
                "train_loss": round(loss.item(), 4),
            }
            if arguments.tune:
                model.eval()
                line |= tuning_losses(loss_of, tokenizer, tuning, arguments.batch, device)
                model.train()
            print(json.dumps(line | {"seconds": round(time.monotonic() - started, 1)}), flush=True)

    # 5. An ordinary Hugging Face folder, weights in bf16.
    # The same function as gelu_new of GPT-2, in one kernel: a forward pass on a CPU takes 30% less time.
    model.config.activation_function = "gelu_pytorch_tanh"
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=N_CTX,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(arguments.out)
    # transformers 5 writes a class name here that transformers 4 does not know; both know this one.
    settings = arguments.out / "tokenizer_config.json"
    written = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(written, indent=2) + "\n")


@torch.no_grad()
def tuning_losses(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Tokenizer,
    tuning: list[CorpusDocument],
    batch: int,
    device: str,
) -> dict[str, float]:
    """Mean loss of the tuning documents of each source, in nats per token."""
    losses = {}
    for source in dict.fromkeys(document.source for document in tuning):
        texts = [document.text for document in tuning if document.source == source]
        contexts = (
            torch.from_numpy(pack(encode_documents(tokenizer, texts), N_CTX + 1, step=N_CTX))
            .to(device)
            .long()
        )
        whole = contexts[: len(contexts) // batch * batch]
        pieces = whole.split(batch) if len(whole) else (contexts,)
        losses[source] = round(sum(loss_of(piece).item() for piece in pieces) / len(pieces), 4)
    return losses


if __name__ == "__main__":
    main()
