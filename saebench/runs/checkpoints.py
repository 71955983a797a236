"""Loading SAEs from the checkpoints of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.core.settings import from_flat
from saebench.runs.layout import CHECKPOINT_FOLDER, RUN_FILE, read_run
from saebench.saes.registry import architecture

if TYPE_CHECKING:
    import torch

    from saebench.saes.base import SAE

PREFIX = "sae."
CHECKSUM = "sha256"
"""Key of a checkpoint's metadata: `saebench.core.tensors.checksum` of all of its tensors."""


def checkpoint_path(run: Path, step: int) -> Path:
    """The path of the checkpoint of a step; the file need not exist."""
    return run / CHECKPOINT_FOLDER / f"step-{step:09d}.safetensors"


def checkpoints_of(run: Path) -> list[Path]:
    """The existing checkpoints of a run, in the order of steps."""
    return sorted((run / CHECKPOINT_FOLDER).glob("step-*.safetensors"))


def run_of(checkpoint: Path) -> Path:
    """The run directory of ``RUN/checkpoints/step-NNNNNNNNN.safetensors``.

    Raises:
        UserError: the file is not in the checkpoints folder of a run.
    """
    run = checkpoint.parent.parent
    if not (run / RUN_FILE).is_file():
        raise UserError(
            f"{checkpoint} is a file but not a checkpoint of a run ({run / RUN_FILE} does not exist); "
            "name a run directory, or a file in the checkpoints folder of one"
        )
    return run


def read_checkpoint(file: Path, *, way_out: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, compared with the checksum that versions from 0.2 on write into it.

    ``way_out`` is the end of the error sentence.

    Raises:
        UserError: the file is missing or damaged.
    """
    from saebench.core.tensors import checksum, read_metadata, read_safetensors

    tensors = read_safetensors(file, way_out=way_out)
    expected = read_metadata(file).get(CHECKSUM)
    if expected is not None and (seen := checksum(tensors)) != expected:
        raise UserError(
            f"{file} is damaged: the SHA-256 of its tensors is {seen[:12]}... where {expected[:12]}... "
            f"was written; {way_out}"
        )
    return tensors


def load_checkpoint_sae(file: Path, *, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a checkpoint, with the input scale folded into its weights.

    Thresholds that are set only at the end of a training (`SAE.calibrate`) are not calibrated.

    Raises:
        UserError: the file is not a checkpoint of a run, or it is damaged.
    """
    from saebench.core.tensors import check_tensors
    from saebench.saes.scales import Scales

    run = run_of(file)
    facts = read_run(run)
    d_in = facts.get("d_in")
    if d_in is None:
        raise UserError(f"{run / RUN_FILE} is damaged: it has no d_in; restore a copy")
    settings = {name: value for name, value in facts["sae"].items() if name != "name"}
    sae_class = architecture(facts["sae"]["name"])
    spec = from_flat(sae_class.Spec, settings, source=str(run / RUN_FILE), strict=True)
    tensors = read_checkpoint(file, way_out="name another checkpoint")
    d_out = sum(site.width for site in spec.targets) or d_in
    shapes = {name: tuple(t.shape) for name, t in Scales.ones(spec).tensors().items()}
    check_tensors(tensors, {f"{PREFIX}W_dec": (spec.d_sae, d_out), **shapes}, file)
    sae: SAE = sae_class(spec, d_in)
    check_tensors(
        tensors, {PREFIX + name: tuple(getattr(sae, name).shape) for name in sae.weight_names}, file
    )
    sae.load_state_dict({name: tensors[PREFIX + name] for name in sae.weight_names}, strict=False)
    scales = Scales.from_tensors(tensors)
    sae.fold_scales(scales.sites, scales.targets)
    return sae.to(device).eval()
