"""Forecast of the disk space, memory and time of a harvest, made before the model is loaded.

Shapes: B contexts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saebench.activations.manifest import gradient_dtype
from saebench.activations.settings import HarvestConfig
from saebench.activations.shards import row_bytes
from saebench.core.files import human_bytes, require_disk
from saebench.sources.gradients import LOGIT_BYTES
from saebench.sources.hook_names import layer_of
from saebench.sources.models import ModelInfo

_FLOPS_PER_SECOND = {"cpu": 4e10, "cuda": 2e13}  # a core, a GPU
_BASE_BYTES = 5e8
_COLUMN_BYTES = 17  # token, doc, ctx, pos, held_out


def forecast(config: HarvestConfig, infos: Sequence[ModelInfo], device: torch.device) -> str:
    """A sentence with the size, memory and time of a harvest; raises when it does not fit on the disk.

    Raises:
        UserError: the disk has too little free space.
    """
    widths = [info.usual_hooks().get(hook, info.d_model) for info in infos for hook in config.hook]
    row = sum(row_bytes(config.dtype, (width,)) for width in widths) + _COLUMN_BYTES
    if config.gradients:
        row += sum(row_bytes(gradient_dtype(config.dtype), (width,)) for width in widths)
    contexts = -(-config.tokens // max(config.ctx - 1 - config.gradients, 1))
    disk = config.tokens * row + contexts * (config.ctx + 1) * 4
    multiplications, held = (sum(amounts) for amounts in zip(*(_work(config, i) for i in infos), strict=True))
    weights = sum(
        _block_weights(info) * _layers(config, info)[1] + 2 * info.vocab_size * info.d_model for info in infos
    )
    memory = 4 * weights + 2 * min(config.shard_rows, config.tokens) * row
    speed = _FLOPS_PER_SECOND[device.type] * (torch.get_num_threads() if device.type == "cpu" else 1)
    minutes = 2 * multiplications * config.tokens / speed / 60
    time = f"{minutes:.0f} min" if minutes >= 1 else "a minute"
    require_disk(config.out, disk, what=f"the activation cache of {config.tokens:,} tokens")
    return (
        f"harvest: up to {config.tokens:,} rows of {' + '.join(map(str, widths))} values"
        f"{' and as many gradients' if config.gradients else ''} from {' and '.join(i.name for i in infos)}; "
        f"disk {human_bytes(disk)}, memory about {human_bytes(memory + held + _BASE_BYTES)}, "
        f"time about {time} on {device}"
    )


def _block_weights(info: ModelInfo) -> int:
    return info.d_model * (4 * info.d_model + 3 * info.d_mlp)


def _layers(config: HarvestConfig, info: ModelInfo) -> tuple[int, int]:
    """The first layer with a hook, and the number of layers that are computed."""
    layers = [layer_of(hook) for hook in config.hook]
    first = min(layer or 0 for layer in layers)
    end = max(info.n_layers if layer is None else layer + 1 for layer in layers)
    return first, info.n_layers if config.gradients else end


def _work(config: HarvestConfig, info: ModelInfo) -> tuple[int, int]:
    """Multiplications per token, and bytes that a forward pass keeps for the backward pass.

    With gradients all layers and the logits are computed. The backward pass, from the logits to the first
    hook, needs as many multiplications as the forward pass over these layers, and its intermediate results.
    """
    first, end = _layers(config, info)
    forward = _block_weights(info) * end
    if not config.gradients:
        return forward, 0
    unembedding = info.d_model * info.vocab_size
    back = _block_weights(info) * (end - first) + unembedding
    for_one_token = 4 * (end - first) * (10 * info.d_model + 4 * info.d_mlp)
    held = config.batch_size * config.ctx * for_one_token
    logits = min(4 * config.batch_size * config.ctx * info.vocab_size, LOGIT_BYTES)
    return forward + unembedding + back, held + 4 * logits
