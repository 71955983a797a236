"""A process that runs SAELens: it reads one JSON request per line from stdin and writes answers to stdout.

It runs in an environment with sae-lens and without saebench, so it does not import saebench. Arrays are
exchanged as .npy files, SAEs as folders in the format of SAELens.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer


def versions(threads: int) -> dict[str, Any]:
    """Set the number of threads, and return the versions."""
    torch.set_num_threads(threads)
    return {"sae-lens": sae_lens.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


class Steps:
    """Training steps of several SAEs on the same rows, one step at a time, with SAELens's trainer."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.trainers: dict[str, SAETrainer[Any, Any]] = {}

    def begin(self, data: str, batch_size: int, saes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Make the trainers of ``saes``: name -> architecture and its settings."""
        rows_ND = torch.from_numpy(np.load(data))
        self.batches = [rows_ND[i : i + batch_size] for i in range(0, len(rows_ND), batch_size)]
        for name, settings in saes.items():
            self.trainers[name] = trainer(settings, iter(()), batch_size=batch_size, n_steps=10**6)
        return {}

    def step(self, name: str, batch: int) -> dict[str, Any]:
        """Take one step and return its seconds."""
        rows_ND = self.batches[batch % len(self.batches)]
        start = time.perf_counter()
        self.trainers[name].step(rows_ND)
        seconds = time.perf_counter() - start
        self.trainers[name].n_training_steps += 1
        return {"seconds": seconds}


def trainer(
    settings: dict[str, Any], data: Iterator[torch.Tensor], *, batch_size: int, n_steps: int, **how: Any
) -> SAETrainer[Any, Any]:
    """A trainer with the settings ``how``; ``settings`` are those of the SAE, with ``architecture``."""
    settings = dict(settings)
    sae_class, config_class = get_sae_training_class(settings.pop("architecture"))
    config = SAETrainerConfig(
        **{
            "total_training_samples": n_steps * batch_size,
            "train_batch_size_samples": batch_size,
            "lr_end": 1e-8,
            **how,
        }
    )
    return SAETrainer(config, sae_class(config_class(**settings)), data)


def train(
    data: str, folder: str, sae: dict[str, Any], batch_size: int, n_steps: int, seed: int, **how: Any
) -> dict[str, Any]:
    """Train on the rows of a file, shuffled with ``seed`` in every epoch, and save the SAE."""
    torch.manual_seed(seed)
    rows_ND = torch.from_numpy(np.load(data))

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order_N = torch.randperm(len(rows_ND))
            for start in range(0, len(rows_ND) - batch_size + 1, batch_size):
                yield rows_ND[order_N[start : start + batch_size]]

    made = trainer(sae, batches(), batch_size=batch_size, n_steps=n_steps, **how)
    start = time.perf_counter()
    made.fit().save_inference_model(folder)
    return {"seconds": time.perf_counter() - start}


def make(
    folder: str, sae: dict[str, Any], seed: int, training: bool, inference: str | None = None
) -> dict[str, Any]:
    """Save an SAE whose tensors are SAELens's initial ones plus noise.

    With ``training``, it is a training SAE, which can also be saved for inference, into ``inference``.
    """
    settings = dict(sae)
    torch.manual_seed(seed)
    classes = get_sae_training_class if training else get_sae_class
    sae_class, config_class = classes(settings.pop("architecture"))
    made = sae_class(config_class(**settings))
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            spread = 0.3 * tensor.double().std(correction=0) + 0.05
            tensor.add_((spread * torch.randn(tensor.shape)).to(tensor.dtype))
            if "threshold" in name:
                tensor.abs_()
    made.cfg.metadata.hook_name = "blocks.0.hook_mlp_in"
    if hasattr(made.cfg, "d_out"):
        made.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out"
    made.save_model(folder)
    if inference is not None:
        made.save_inference_model(inference)
    return {"tensors": {name: list(t.shape) for name, t in made.state_dict().items()}}


@torch.no_grad()
def encode(folder: str, data: str, out: str, fold_norms: bool = False) -> dict[str, Any]:
    """Load a folder with SAELens; write ``out/codes.npy`` [N, M] and ``out/x_hat.npy`` [N, D].

    For a transcoder, ``x_hat`` is what it writes.
    """
    sae = sae_lens.SAE.load_from_disk(folder, fold_W_dec_norm=fold_norms)
    x_ND = torch.from_numpy(np.load(data))
    codes_NM = sae.encode(x_ND)
    x_hat_ND = sae(x_ND) if hasattr(sae.cfg, "d_out") else sae.decode(codes_NM)
    Path(out).mkdir(parents=True, exist_ok=True)
    np.save(Path(out) / "codes.npy", codes_NM.numpy())
    np.save(Path(out) / "x_hat.npy", x_hat_ND.numpy())
    answer = {"architecture": sae.cfg.architecture(), "hook_name": sae.cfg.metadata.hook_name}
    target = sae.cfg.metadata.hook_name_out
    return answer if target is None else {**answer, "hook_name_out": target}


def main() -> None:
    """Answer requests until stdin ends. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    steps = Steps()
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "versions": versions, "begin": steps.begin, "step": steps.step,
        "train": train, "make": make, "encode": encode,
    }  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request.pop("command")](**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
