"""Training steps of plain torch, and of other libraries that can be imported in this Python.

Each step does with a batch what the training loop of its library does: forward, loss, backward, optimizer,
decoder norms and counters. Products are in bfloat16 by autocast on a GPU, and in float32 on a CPU; master
weights are float32. A step returns its loss.

Shapes: B batches of N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from saebench.bench.gpu_sizes import Make, Once, Size
from saebench.bench.steps import LEARNING_RATE

MANY_STEPS = 1_000_000
"""Length of schedules; longer than any measurement."""
PLAIN, COMPILED = "plain torch step", "torch.compile step"
MODULES = {
    "sae-lens": "sae_lens",
    "eai-sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning",
}
"""Distribution -> its module."""


def versions() -> dict[str, str]:
    """Distribution -> version, or 'not installed'."""
    found = {}
    for name, module in MODULES.items():
        try:
            found[name] = version(name) if _importable(module) else "not installed"
        except PackageNotFoundError:
            found[name] = "version unknown"
    return found


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _mixed(device: torch.device) -> bool:
    return device.type == "cuda"


def _plain(*, compiled: bool) -> Make:
    """A TopK step with dense codes; ``compiled`` passes the loss to ``torch.compile``."""

    def make(size: Size, rows_BND: Tensor) -> Once:
        device, k, mixed = rows_BND.device, size.k, _mixed(rows_BND.device)
        W_enc_DM, W_dec_MD = (
            torch.nn.Parameter(torch.randn(shape, device=device) / size.d_in**0.5)
            for shape in ((size.d_in, size.d_sae), (size.d_sae, size.d_in))
        )
        b_enc_M, b_dec_D = (
            torch.nn.Parameter(torch.zeros(n, device=device)) for n in (size.d_sae, size.d_in)
        )
        parameters = [W_enc_DM, W_dec_MD, b_enc_M, b_dec_D]
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)

        def loss_of(
            x_ND: Tensor, W_enc_DM: Tensor, W_dec_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor
        ) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                pre_NM = ((x_ND - b_dec_D) @ W_enc_DM + b_enc_M).relu()
                top = pre_NM.topk(k, dim=1, sorted=False)
                code_NM = torch.zeros_like(pre_NM).scatter(1, top.indices, top.values)
                x_hat_ND = code_NM @ W_dec_MD + b_dec_D
            return (x_ND - x_hat_ND.float()).square().mean()

        loss_in_use = torch.compile(loss_of, dynamic=False, fullgraph=True) if compiled else loss_of
        batches = itertools.cycle(rows_BND)

        def once() -> Tensor:
            loss = loss_in_use(next(batches).float(), *parameters)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                W_dec_MD.div_(W_dec_MD.norm(dim=1, keepdim=True))
            return loss.detach()

        return once

    return make


def _sae_lens(settings: dict[str, Any], budget: str) -> Make:
    """`SAETrainer.step`, with its schedules, Adam (not fused) and gradients clipped to norm 1.

    SAELens does not normalize decoder rows; it multiplies their norms into TopK's codes. The AuxK loss cannot
    be turned off. Without dead latents, it only reads the counters.
    """

    def make(size: Size, rows_BND: Tensor) -> Once:
        from saebench.bench.saelens_peer import trainer

        device = rows_BND.device
        sae = {"d_in": size.d_in, "d_sae": size.d_sae, budget: size.k, "device": str(device), **settings}
        training = trainer(
            sae, iter(()), batch_size=size.batch_size, n_steps=MANY_STEPS,
            lr=LEARNING_RATE, device=str(device), autocast=_mixed(device),
        )  # fmt: skip
        batches = itertools.cycle(rows_BND)

        def once() -> Any:
            output = training.step(next(batches).float())
            training.n_training_steps += 1
            return output.loss.detach()

        return once

    return make


def _sparsify(optimizer_name: str) -> Make:
    """One step of `sparsify.Trainer.fit`, a loop that has no function for a single step.

    It calls the same functions of sparsify in the same order, without the model's forward pass and the
    selection of rows by a mask. ``optimizer_name`` is 'signum', the default of sparsify, which has no
    schedule, or 'adam', torch's Adam (not fused). Neither clips gradients. AuxK is off, as by default.
    """

    def make(size: Size, rows_BND: Tensor) -> Once:
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.trainer import ScheduleFreeWrapper, SignSGD, get_linear_schedule_with_warmup

        device = rows_BND.device
        config = SparseCoderConfig(num_latents=size.d_sae, k=size.k)
        coder = SparseCoder(size.d_in, config, device, dtype=torch.float32)
        coder.b_dec.data = rows_BND[0].mean(0).float()
        optimizer: Any
        schedulers = []
        if optimizer_name == "signum":
            lr = 5e-3 / (size.d_sae / 2**14) ** 0.5
            optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
            optimizer.train()
        else:
            optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
            schedulers.append(get_linear_schedule_with_warmup(optimizer, 0, MANY_STEPS))
        since_fired_M = torch.zeros(size.d_sae, dtype=torch.long, device=device)
        did_fire_M = torch.zeros(size.d_sae, dtype=torch.bool, device=device)
        batches = itertools.cycle(rows_BND)

        def once() -> float:
            x_ND = next(batches)
            with _float32_products("high"):
                coder.set_decoder_norm_to_unit_norm()
                total_variance = (x_ND - x_ND.mean(0)).pow(2).sum()
                out = coder(x=x_ND, y=x_ND, dead_mask=None, total_variance=total_variance)
                did_fire_M[out.latent_indices.flatten()] = True
                shown = float(out.fvu.detach())
                (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).div(1).backward()
                coder.remove_gradient_parallel_to_decoder_directions()
                optimizer.step()
                optimizer.zero_grad()
                for scheduler in schedulers:
                    scheduler.step()
                with torch.no_grad():
                    since_fired_M.add_(len(x_ND))
                    since_fired_M[did_fire_M] = 0
                    did_fire_M.zero_()
            return shown

        return once

    return make


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dictionary_learning(size: Size, rows_BND: Tensor) -> Once:
    """`TopKTrainer.update` as `trainSAE` calls it, with the AuxK loss turned off.

    It has Adam (not fused), projected gradients clipped to norm 1, and unit decoder rows.
    """
    with _same_fake_tensors():
        from dictionary_learning.trainers.top_k import TopKTrainer

    device = rows_BND.device
    with device:  # parameters are drawn on this device instead of the CPU
        training = TopKTrainer(
            steps=MANY_STEPS, activation_dim=size.d_in, dict_size=size.d_sae, k=size.k, layer=0,
            lm_name="none", lr=LEARNING_RATE, auxk_alpha=0, warmup_steps=0, device=str(device),
        )  # fmt: skip
    dtype = torch.bfloat16 if _mixed(device) else torch.float32
    batches = itertools.cycle(rows_BND)
    steps = 0

    def once() -> float:
        nonlocal steps
        x_ND = next(batches).to(dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=_mixed(device)):
            loss = training.update(steps, x_ND)
        steps += 1
        return float(loss)

    return once


@contextlib.contextmanager
def _same_fake_tensors() -> Iterator[None]:
    """Undo a change of nnsight to FakeTensor (at import of dictionary-learning) that breaks torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensor

    before = {name: FakeTensor.__dict__.get(name) for name in ("__new__", "__bool__")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                setattr(FakeTensor, name, value)
            elif name in FakeTensor.__dict__:
                delattr(FakeTensor, name)


def _encode(*, compiled: bool) -> Make:
    """relu(x W^T + b).topk(k) in bfloat16, without gradients."""

    def make(size: Size, rows_BND: Tensor) -> Once:
        x_ND, k = rows_BND[0], size.k
        W_MD = (torch.randn(size.d_sae, size.d_in, device=x_ND.device) / size.d_in**0.5).to(x_ND.dtype)
        b_M = torch.zeros(size.d_sae, device=x_ND.device, dtype=x_ND.dtype)

        def encode(x_ND: Tensor, W_MD: Tensor, b_M: Tensor) -> Any:
            return (x_ND @ W_MD.T + b_M).relu().topk(k, dim=1, sorted=False)

        encode_in_use = torch.compile(encode, dynamic=False, fullgraph=True) if compiled else encode

        @torch.no_grad()
        def once() -> object:
            return encode_in_use(x_ND, W_MD, b_M)

        return once

    return make


ENCODERS: dict[str, Make] = {
    "plain torch encode": _encode(compiled=False),
    "torch.compile encode": _encode(compiled=True),
}
PURSUIT = "sae-lens matching-pursuit step"
_PURSUIT: dict[str, Any] = {
    "architecture": "matching_pursuit",
    "residual_threshold": 0.0,
    "stop_on_duplicate_support": False,
    "decoder_init_norm": 1.0,
}
"""Settings with k picks for every row, as ours."""
_STEPS: dict[str, tuple[str | None, Make]] = {
    PLAIN: (None, _plain(compiled=False)),
    COMPILED: (None, _plain(compiled=True)),
    "sae-lens topk step": ("sae-lens", _sae_lens({"architecture": "topk"}, "k")),
    "eai-sparsify topk step, signum": ("eai-sparsify", _sparsify("signum")),
    "eai-sparsify topk step, Adam": ("eai-sparsify", _sparsify("adam")),
    "dictionary-learning topk step": ("dictionary-learning", _dictionary_learning),
    PURSUIT: ("sae-lens", _sae_lens(_PURSUIT, "max_iterations")),
}
STEPS: dict[str, Make] = {
    name: make for name, (peer, make) in _STEPS.items() if peer is None or _importable(MODULES[peer])
}
"""Steps that can be imported in this Python; the optimizer is Adam unless the name has another one."""
