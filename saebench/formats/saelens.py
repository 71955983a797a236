"""The folder that SAELens reads and writes: ``cfg.json`` and ``sae_weights.safetensors``.

Read and written as sae-lens 6.54.12 does. Its loader takes exactly the tensors of an architecture, casts
them to ``cfg.dtype``, ignores settings that it does not know, and takes a folder whose metadata has no
``sae_lens_version`` for one from before 6.0. What exists only while training is saved as something else:
BatchTopK as ``jumprelu``, with its one threshold for every latent.

Shapes: M = d_sae latents, D = d_in. SAELens keeps ``W_enc`` [D, M] where we keep ``W_enc_MD``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.config import SaeSpec
from saebench.errors import UserError
from saebench.fields import at_least, from_flat, to_flat
from saebench.files import read_json, write_bytes_atomic, write_json_atomic
from saebench.formats import folding
from saebench.formats.folding import Weights
from saebench.formats.foreign import Foreign, read_tensors
from saebench.saes.base import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALE_FILE = "activation_scaler.json"
"""Beside the weights of a checkpoint: what its inputs are multiplied by."""
VERSION = "6.54.12"
FINE_TUNED = "scaling_factor"
"""A tensor in some old files; all ones unless the SAE was fine-tuned."""


# Writing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """An SAE as SAELens has it."""

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    trained_as: str | None = None
    """What it was while it was trained, where that has another name."""
    note: str | None = None
    """What the other side will do differently."""


def write(sae: SAE, directory: Path, metadata: Mapping[str, Any]) -> Written:
    """Write ``sae`` into ``directory``; ``metadata`` says what it was trained on.

    Raises:
        UserError: SAELens has nothing that computes what this SAE does.
    """
    from safetensors.torch import save as serialize

    if sae.spec.name not in _WRITERS:
        raise UserError(f"SAELens has no form for {sae.spec.name}; it can hold {', '.join(_WRITERS)}")
    written = _WRITERS[sae.spec.name](sae)
    config = {
        "architecture": written.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **written.settings,
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "training_architecture": written.trained_as or written.architecture,
            "training_architecture_details": to_flat(sae.spec),
            **metadata,
        },
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in written.tensors.items()}
    write_bytes_atomic(directory / WEIGHTS_FILE, serialize(tensors))
    write_json_atomic(directory / CONFIG_FILE, config)
    return written


def _linear(sae: SAE) -> dict[str, Tensor]:
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


def _topk(sae: SAE) -> Written:
    return Written("topk", _linear(sae), {"k": sae.k, "rescale_acts_by_decoder_norm": False})


def _gradient(sae: SAE) -> Written:
    note = "SAELens has no gradients at inference: what it computes is our inference mode 'plain'"
    return Written("topk", _linear(sae), _topk(sae).settings, "gradient_topk", note)


def _thresholded(trained_as: str) -> Callable[[SAE], Written]:
    """One threshold, or one a latent: SAELens wants [M] in any case."""

    def written(sae: SAE) -> Written:
        threshold_M = sae.state_dict()["threshold"].expand(sae.d_sae)
        return Written("jumprelu", {**_linear(sae), "threshold": threshold_M}, {}, trained_as)

    return written


def _standard(sae: SAE) -> Written:
    return Written("standard", _linear(sae))


def _gated(sae: SAE) -> Written:
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    return Written("gated", {name: getattr(sae, name) for name in names})


_WRITERS: dict[str, Callable[[SAE], Written]] = {
    "topk": _topk,
    "gradient": _gradient,
    "mutual-choice": _thresholded("mutual_choice"),
    "feature-choice": _thresholded("feature_choice"),
    "matryoshka": _thresholded("matryoshka_mutual_choice"),
    "jumprelu": _thresholded("jumprelu"),
    "relu": _standard,
    "gated": _gated,
}


# Reading ----------------------------------------------------------------------------------------------

_ENCODER = ("W_enc", "b_enc")
_READABLE = {
    "topk": ("topk", _ENCODER),
    "batchtopk": ("jumprelu", (*_ENCODER, "topk_threshold")),
    "matryoshka_batchtopk": ("jumprelu", (*_ENCODER, "topk_threshold")),
    "jumprelu": ("jumprelu", (*_ENCODER, "threshold")),
    "standard": ("relu", _ENCODER),
    "gated": ("gated", ("W_enc", "b_gate", "b_mag", "r_mag")),
}
"""Architecture of SAELens -> ours, and its tensors beside W_dec and b_dec. The two kinds of BatchTopK are
in checkpoints alone."""
_ORIGIN = (
    "hook_name", "hook_head_index", "model_name", "context_size", "prepend_bos", "seqpos_slice",
    "dataset_path", "sae_lens_version", "training_architecture", "l0",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The settings in ``cfg.json`` on which it depends what an SAE computes, with the defaults of 6.54."""

    architecture: str
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: float | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, d_in=1, d_sae=1)

    @property
    def chooses_by_norm(self) -> bool:
        """Whether the choice among latents is by |d_i| z_i; only BatchTopK does so by default."""
        default = "batchtopk" in self.architecture
        return default if self.rescale_acts_by_decoder_norm is None else self.rescale_acts_by_decoder_norm


def read(directory: Path, *, k: int | None = None) -> Foreign:
    """Read a folder of SAELens, of any version, or a checkpoint of its training.

    ``k`` is the mean number of active latents, for a folder that does not say it.

    Raises:
        UserError: no such folder, a damaged file, or an SAE that none of ours computes.
    """
    config = _read_config(directory / CONFIG_FILE)
    ours, encoder = _READABLE[config.architecture]
    weights = _read_weights(directory / WEIGHTS_FILE, encoder, config)
    scale = _input_scale(config, directory)
    notes: list[str] = []
    settings = {"k": _active(config, k, notes)}
    weights = _fold_encoder(weights, config, notes)
    facts = {name: config.metadata[name] for name in _ORIGIN if config.metadata.get(name) is not None}
    return Foreign(
        sae=ours,
        d_in=config.d_in,
        spec={"d_sae": config.d_sae, **settings},
        weights=folding.in_float32(folding.fold_input_scale(weights, scale)),
        facts={**facts, "architecture": config.architecture},
        notes=tuple(notes),
    )


def _fold_encoder(weights: Weights, config: _Config, notes: list[str]) -> Weights:
    """Pre-activations of x - b_dec, decoder rows of norm 1 where that is exact, one threshold a latent."""
    threshold_M = None
    if "topk_threshold" in weights:
        threshold_M = weights.pop("topk_threshold").expand(config.d_sae)
    if not config.apply_b_dec_to_input:
        weights = folding.fold_input_bias(weights)
    if config.chooses_by_norm:
        # So is the threshold of BatchTopK in units of |d_i| z_i already.
        weights = folding.fold_decoder_norms(weights)
        return weights if threshold_M is None else {**weights, "threshold": threshold_M}
    if threshold_M is not None:
        weights["threshold"] = threshold_M
    if folding.norms_are_one(weights):
        return weights
    if config.architecture != "topk" or folding.norms_are_equal(weights):
        return folding.fold_decoder_norms(weights)
    notes.append("decoder rows have norms other than 1, which a top-k that chooses without them has to keep")
    return weights


def _active(config: _Config, k: int | None, notes: list[str]) -> int:
    """k where it decides what is computed; elsewhere the mean number of active latents, if that is known."""
    if config.architecture == "topk":
        if config.k is None:
            raise UserError(f"a topk SAE needs k, which its {CONFIG_FILE} does not say")
        return int(config.k)
    details = config.metadata.get("training_architecture_details")
    trained = details.get("k") if isinstance(details, dict) else None
    for known in (k, config.metadata.get("l0"), config.k, trained):
        if isinstance(known, int | float) and 0.5 <= known <= config.d_sae:
            return round(known)
    assumed = min(SaeSpec.k, config.d_sae)
    notes.append(
        f"the folder does not say how many latents are active, so k is noted as {assumed}, on which nothing "
        "that is computed depends; --k puts it right"
    )
    return assumed


# Files ------------------------------------------------------------------------------------------------


def _read_config(file: Path) -> _Config:
    """``cfg.json`` in the names of 6.x, its types checked."""
    raw = read_json(file, what="the SAELens description")
    if not isinstance(raw, dict) or not isinstance(raw.get("metadata", {}), dict):
        raise UserError(f"{file} is not the description of an SAE; name a folder that SAELens wrote")
    version = raw.get("metadata", {}).get("sae_lens_version") or raw.get("sae_lens_version")
    if not version or str(version).split(".")[0] in {"0", "1", "2", "3", "4", "5"}:
        raw = _since_6(raw, file)
    if raw.get("architecture") not in _READABLE:
        raise UserError(
            f"{file} says architecture {raw.get('architecture')!r}; saebench reads {', '.join(_READABLE)}"
        )
    known = {f.name for f in dataclasses.fields(_Config)}
    return from_flat(_Config, {name: v for name, v in raw.items() if name in known}, source=str(file))


def _since_6(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings of a folder from before 6.0 as 6.0 would write them."""
    kind = raw.get("activation_fn_str", raw.get("activation_fn", "relu"))
    arguments = raw.get("activation_fn_kwargs") or {}
    new = {"architecture": "standard", **raw}
    if kind == "topk" and isinstance(arguments, dict) and "k" in arguments:
        new |= {"architecture": "topk", "k": arguments["k"]}
    elif kind != "relu":
        raise UserError(f"{file} says activation function {kind!r}; saebench reads relu and topk")
    scaled = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if scaled is True else scaled
    hook = raw.get("hook_name", raw.get("hook_point"))
    new["metadata"] = {**{name: raw[name] for name in _ORIGIN if name in raw}, "hook_name": hook}
    return new


def _read_weights(file: Path, encoder: tuple[str, ...], config: _Config) -> Weights:
    """The tensors in our names and orientation."""
    shapes = {"W_enc": (config.d_in, config.d_sae), "topk_threshold": ()}
    expected = {"W_dec": (config.d_sae, config.d_in), "b_dec": (config.d_in,)}
    expected |= {name: shapes.get(name, (config.d_sae,)) for name in encoder}
    weights = read_tensors(file, expected, optional=(FINE_TUNED,))
    if (weights.pop(FINE_TUNED, torch.ones(1)) != 1).any():
        raise UserError(f"{file} has a fine-tuned factor on its output, which no SAE of saebench has")
    if "W_enc" in weights:
        weights["W_enc_MD"] = weights.pop("W_enc").T
    return weights


def _input_scale(config: _Config, directory: Path) -> float:
    """What inputs are multiplied by before this SAE sees them.

    Raises:
        UserError: it is not known, or more is done to inputs than that.
    """
    how = config.normalize_activations
    if how == "none":
        return 1.0
    if how != "expected_average_only_in":
        raise UserError(
            f"{directory / CONFIG_FILE} says normalize_activations {how!r}, which cannot be folded into the "
            "weights; saebench reads 'none' and 'expected_average_only_in'"
        )
    if not (directory / SCALE_FILE).exists():
        raise UserError(
            f"{directory} says that its inputs are scaled and has no {SCALE_FILE} that says by how much; "
            "copy it from the checkpoint"
        )
    scaler = read_json(directory / SCALE_FILE, what="the scale of the inputs")
    scale = scaler.get("scaling_factor") if isinstance(scaler, dict) else None
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise UserError(f"{directory / SCALE_FILE} gives no positive scaling_factor; copy it again")
    return float(scale)
