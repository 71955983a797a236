"""An SAE on disk: ``sae.json`` says what it is, ``sae.safetensors`` holds its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import make_directory, write_bytes_atomic, write_json_atomic
from saebench.core.reading import check_shape, read_json
from saebench.core.settings import from_flat, to_flat
from saebench.core.shapes import ContextFacts, ModelName, Name, Positive, Sha256, Shape, Text
from saebench.saes.registry import architecture

if TYPE_CHECKING:
    import torch

    from saebench.saes.base import SAE

SPEC_FILE = "sae.json"
WEIGHTS_FILE = "sae.safetensors"
FORMAT_VERSION = 2
"""Of transcoders, crosscoders and SAEs that normalize rows. Other SAEs of one site are written as version 1,
which earlier readers know."""
WEIGHTS_SHA256 = "weights_sha256"
"""Key of the checksum of ``sae.safetensors`` in ``sae.json``; versions before 0.2 did not write it."""
_WAY_OUT = "train it again or restore a copy"


class _Description(Shape):
    """What is read of a description again."""

    sae: Name
    d_in: Positive
    spec: dict[str, Any]
    hook_name: Text | None = None
    model: ModelName | None = None
    imported: dict[str, Any] | None = None
    contexts: ContextFacts | None = None
    cache_hash: Text | None = None
    weights_sha256: Sha256 | None = None


def save_sae(sae: SAE, directory: Path, facts: Mapping[str, object]) -> None:
    """Write ``sae.safetensors`` and then ``sae.json`` into ``directory``, each atomically.

    ``facts`` (hook_name, model, contexts, ...) are kept in the JSON file beside the spec.
    """
    from safetensors.torch import save as serialize

    make_directory(directory)
    weights = {name: getattr(sae, name).detach().cpu().contiguous() for name in sae.weight_names}
    data = serialize(weights)
    write_bytes_atomic(directory / WEIGHTS_FILE, data)
    description = {
        "format_version": FORMAT_VERSION if sae.spec.sites or sae.spec.input_norm != "none" else 1,
        "sae": sae.spec.name,
        "d_in": sae.d_in,
        "spec": to_flat(sae.spec),
        **facts,
        WEIGHTS_SHA256: hashlib.sha256(data).hexdigest(),
    }
    write_json_atomic(directory / SPEC_FILE, description)


def load_sae(directory: Path, *, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a folder with ``sae.json`` and ``sae.safetensors``, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged (the weights do not have the checksum that ``sae.json`` says),
            or its format is newer.
    """
    from saebench.core.tensors import check_tensors, read_safetensors

    description = read_description(directory)
    sae_class, d_in = architecture(description["sae"]), description["d_in"]
    spec = from_flat(sae_class.Spec, description["spec"], source=str(directory / SPEC_FILE), strict=True)
    file = directory / WEIGHTS_FILE
    weights = read_safetensors(file, way_out=_WAY_OUT, sha256=description.get(WEIGHTS_SHA256))
    d_out = sum(site.width for site in spec.targets) or d_in
    check_tensors(weights, {"W_dec": (spec.d_sae, d_out)}, file)  # before memory of that size is taken
    sae: SAE = sae_class(spec, d_in)
    check_tensors(weights, {name: tuple(getattr(sae, name).shape) for name in sae.weight_names}, file)
    sae.load_state_dict(weights, strict=False)
    return sae.to(device).eval()


def read_description(directory: Path) -> dict[str, Any]:
    """The contents of ``sae.json``: sae, d_in, spec, and the facts it was saved with."""
    file = directory / SPEC_FILE
    description = read_json(file, what="the SAE description")
    version = description.get("format_version") if isinstance(description, dict) else None
    if type(version) is not int or not {"sae", "d_in", "spec"} <= set(description):
        raise UserError(f"{file} is not the description of an SAE; train it again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this saebench reads up to {FORMAT_VERSION}: update saebench"
        )
    check_shape(description, _Description, source=str(file), way_out=_WAY_OUT)
    return dict(description)


def weights_hash(sae: SAE) -> str:
    """SHA-256 of the architecture's name and the float32 weights: what identifies an SAE in a store."""
    digest = hashlib.sha256(sae.spec.name.encode())
    if sae.spec.input_norm != "none":
        digest.update(f"input_norm {sae.spec.input_norm}".encode())
    for name in sae.weight_names:
        weight: torch.Tensor = getattr(sae, name)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
