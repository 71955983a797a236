"""Checkpoints: the whole state of a training at one step, in one safetensors file written atomically."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.files import make_directory, write_bytes_atomic
from saebench.core.tensors import check_tensors, checksum
from saebench.runs.checkpoints import CHECKSUM, checkpoint_path, checkpoints_of, read_checkpoint
from saebench.saes.base import SAE
from saebench.saes.scales import Scales

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADDED_LATER = ("sae.dead_when_looked",)
"""Tensors that checkpoints of earlier versions lack; they start as in a new SAE."""


@dataclass
class SaeInTraining:
    """An SAE, its optimizer, the factors of its input and target, and how many steps it has taken.

    The order of the rows is a function of the seed and ``step``, and nothing random happens after
    initialization, so these tensors are the whole state.
    """

    sae: SAE
    optimizer: torch.optim.Adam
    scales: Scales
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Weights, counters, both moments, the scales and the step, by name."""
        out = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            moments = self.optimizer.state[parameter]
            for moment in _MOMENTS:
                out[f"adam.{name}.{moment}"] = moments.get(moment, torch.zeros_like(parameter))
        out |= self.scales.tensors()
        out["step"] = torch.tensor(self.step, dtype=torch.int64)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in out.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``."""
        self.scales, self.step = Scales.from_tensors(tensors), int(tensors["step"])
        self.sae.load_state_dict({name: tensors[f"sae.{name}"] for name in self.sae.state_dict()})
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=parameter.device),
                **{m: tensors[f"adam.{name}.{m}"].to(parameter.device) for m in _MOMENTS},
            }


def save_checkpoint(directory: Path, current: SaeInTraining) -> None:
    """Write a checkpoint and then delete older checkpoints."""
    from safetensors.torch import save as serialize

    path = checkpoint_path(directory, current.step)
    make_directory(path.parent)
    tensors = current.tensors()
    write_bytes_atomic(path, serialize(tensors, metadata={CHECKSUM: checksum(tensors)}))
    keep_only(path)


def keep_only(path: Path) -> None:
    """Delete the other checkpoints of the run of ``path``."""
    for other in checkpoints_of(path.parent.parent):
        if other != path:
            other.unlink()


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step, if there is one."""
    return max(checkpoints_of(directory), default=None)


def restore_latest(directory: Path, current: SaeInTraining) -> bool:
    """Fill ``current`` from the newest checkpoint that is whole and delete the others; False without any.

    A process that was killed between a checkpoint and the removal of its predecessor leaves two. Then the
    older one serves if the newer one is damaged: both lead to the same weights.

    Raises:
        UserError: every checkpoint is damaged or belongs to other shapes; the error is that of the newest.
    """
    newest_first = checkpoints_of(directory)[::-1]
    first_error: UserError | None = None
    for path in newest_first:
        try:
            restore_checkpoint(path, current)
        except UserError as error:
            first_error = first_error or error
            continue
        if first_error is not None:
            print(f"warning: {first_error}; going on from the older {path.name}", file=sys.stderr)
        keep_only(path)
        return True
    if first_error is not None:
        raise first_error
    return False


def restore_checkpoint(path: Path, current: SaeInTraining) -> None:
    """Fill ``current`` from a checkpoint.

    Raises:
        UserError: the file is damaged or belongs to other shapes.
    """
    tensors = read_checkpoint(path, way_out="delete it to start this run again from zero")
    fresh = current.tensors()
    for name in _ADDED_LATER:
        if name in fresh:
            tensors.setdefault(name, fresh[name])
    check_tensors(tensors, {name: tuple(t.shape) for name, t in fresh.items()}, path)
    current.restore(tensors)
