"""``read``: convert an SAE that SAELens saved to an architecture of saebench.

Shapes: M = d_sae latents, D = d_in, E = d_out. SAELens stores ``W_enc`` [D, M]; saebench stores ``W_enc_MD``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.heads import head_of
from saebench.core.reading import read_json
from saebench.core.settings import Settings, from_flat
from saebench.core.shapes import Number, Shape
from saebench.formats import folding
from saebench.formats.folding import Weights
from saebench.formats.foreign import Foreign, assumed_k, read_tensors
from saebench.formats.saelens.names import CONFIG_FILE, SCALE_FILE, WEIGHTS_FILE
from saebench.formats.transcoders import sites_of

FINE_TUNED = "scaling_factor"
"""A tensor in some old files; it is all ones unless the SAE was fine-tuned."""

_ENCODER = ("W_enc", "b_enc")
_READABLE = {
    "topk": ("topk", _ENCODER),
    "batchtopk": ("jumprelu", (*_ENCODER, "topk_threshold")),
    "matryoshka_batchtopk": ("jumprelu", (*_ENCODER, "topk_threshold")),
    "jumprelu": ("jumprelu", (*_ENCODER, "threshold")),
    "standard": ("relu", _ENCODER),
    "gated": ("gated", ("W_enc", "b_gate", "b_mag", "r_mag")),
    "matching_pursuit": ("matching-pursuit", ()),
    "transcoder": ("relu", _ENCODER),
    "skip_transcoder": ("relu", (*_ENCODER, "W_skip")),
    "jumprelu_transcoder": ("jumprelu", (*_ENCODER, "threshold")),
    "jumprelu_skip_transcoder": ("jumprelu", (*_ENCODER, "threshold", "W_skip")),
}
"""Architecture of SAELens -> (architecture of saebench, tensors of SAELens besides W_dec and b_dec).
BatchTopK and its Matryoshka variant occur only in checkpoints."""
_INPUT_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
"""Normalization of each row in SAELens -> that of saebench; see saes/input_norm.py."""
_ORIGIN = (
    "hook_name", "hook_name_out", "hook_head_index", "model_name", "context_size", "prepend_bos",
    "seqpos_slice", "dataset_path", "sae_lens_version", "training_architecture", "l0",
)  # fmt: skip


class _Scale(Shape):
    scaling_factor: Annotated[Number, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class _Config(Settings):
    """The settings in ``cfg.json`` that change what an SAE computes, with the defaults of 6.54."""

    architecture: str
    d_in: Annotated[int, AtLeast(1)]
    d_sae: Annotated[int, AtLeast(1)]
    d_out: Annotated[int | None, AtLeast(1)] = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: float | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    residual_threshold: Annotated[float, AtLeast(0)] = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith("transcoder")

    @property
    def width_out(self) -> int:
        """Columns of the reconstruction."""
        return self.d_in if self.d_out is None or not self.is_transcoder else self.d_out

    @property
    def chooses_by_norm(self) -> bool:
        """Whether latents are selected by |d_i| z_i; by default, only BatchTopK does so."""
        default = "batchtopk" in self.architecture
        return default if self.rescale_acts_by_decoder_norm is None else self.rescale_acts_by_decoder_norm


def read(directory: Path, *, k: int | None = None) -> Foreign:
    """Read a folder that any version of SAELens wrote, or a checkpoint of its training.

    ``k`` is the mean number of active latents; it is used if the folder does not record it.

    Raises:
        UserError: the folder is missing, a file is damaged, no architecture of saebench computes this SAE, or
            ``k`` contradicts the k that the SAE computes with.
    """
    config = _read_config(directory / CONFIG_FILE)
    ours, encoder = _READABLE[config.architecture]
    weights = _read_weights(directory / WEIGHTS_FILE, encoder, config)
    scale = _input_scale(config, directory)
    input_norm = _INPUT_NORMS.get(config.normalize_activations)
    notes: list[str] = []
    if ours == "matching-pursuit":
        settings = _pursuit_settings(weights, config, scale)
        _require_same(k, settings["k"], directory)
    else:
        settings = {"k": _active(config, k, notes)}
        if config.architecture == "topk":
            _require_same(k, settings["k"], directory)
        weights = _fold_encoder(weights, config, notes)
    if config.is_transcoder:
        settings |= _sites(config, skip="W_skip" in weights)
        weights["b_in"] = torch.zeros(config.d_in)
    facts = {name: config.metadata[name] for name in _ORIGIN if _is_plain(config.metadata.get(name))}
    if (head := config.metadata.get("hook_head_index")) is not None:
        facts["hook_name"] = _of_head(config, head, directory / CONFIG_FILE)
    if input_norm is not None:
        settings["input_norm"] = input_norm
        notes.append(
            f"each row is normalized ({config.normalize_activations}); codes are in the units of the "
            "activations: those of SAELens times the scale of the row"
        )
    return Foreign(
        sae=ours,
        d_in=config.d_in,
        spec={"d_sae": config.d_sae, **settings},
        weights=folding.in_float32(folding.fold_input_scale(weights, scale)),
        facts={**facts, "architecture": config.architecture},
        notes=tuple(notes),
    )


def _is_plain(value: object) -> bool:
    """Whether a metadata value can be copied: text, a finite number, or a short list of these and None."""
    if isinstance(value, list):
        return len(value) <= 3 and all(item is None or _is_plain(item) for item in value)
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _fold_encoder(weights: Weights, config: _Config, notes: list[str]) -> Weights:
    """Make an encoder of x - b_dec with one threshold per latent, and unit decoder rows where exact."""
    threshold_M = None
    if "topk_threshold" in weights:
        threshold_M = weights.pop("topk_threshold").expand(config.d_sae)
    if not config.apply_b_dec_to_input and not config.is_transcoder:
        weights = folding.fold_input_bias(weights)
    if config.chooses_by_norm:
        # The threshold of BatchTopK is already in units of |d_i| z_i, so it is added after folding.
        weights = folding.fold_decoder_norms(weights)
        return weights if threshold_M is None else {**weights, "threshold": threshold_M}
    if threshold_M is not None:
        weights["threshold"] = threshold_M
    if folding.norms_are_one(weights):
        return weights
    if config.architecture != "topk" or folding.norms_are_equal(weights):
        return folding.fold_decoder_norms(weights)
    notes.append("decoder rows keep norms other than 1, because this top-k SAE selects latents without them")
    return weights


def _of_head(config: _Config, head: object, file: Path) -> str:
    """The site of an SAE of one attention head."""
    site = f"{config.metadata.get('hook_name')}[{head}]"
    if config.is_transcoder or type(head) is not int or head_of(site)[1] is None:
        raise UserError(
            f"{file} has hook_head_index {head!r:.60} at {config.metadata.get('hook_name')!r:.60}; saebench "
            "reads SAEs of single heads at attn.hook_q, hook_k, hook_v and hook_z"
        )
    return site


def _sites(config: _Config, *, skip: bool) -> dict[str, Any]:
    """What a transcoder reads and writes."""
    names = {name: config.metadata.get(name) for name in ("hook_name", "hook_name_out")}
    for name, hook in names.items():
        if not isinstance(hook, str) or not hook:
            raise UserError(
                f"the metadata in {CONFIG_FILE} have no {name}, which says what the transcoder "
                f"{'writes' if name.endswith('out') else 'reads'}; add it, such as blocks.0.hook_mlp_out"
            )
    site, target = names.values()
    return sites_of(str(site), config.d_in, str(target), config.width_out, skip=skip)


def _pursuit_settings(weights: Weights, config: _Config, scale: float) -> dict[str, Any]:
    """k and the tolerance. Decoder rows keep their norms: both libraries select by r . d_i."""
    if not config.apply_b_dec_to_input:
        weights["b_dec"].zero_()  # SAELens does not add it to the reconstruction either.
    tolerance = config.residual_threshold / scale
    weights["tolerance"] = torch.tensor(tolerance)
    return {
        "k": config.d_in if config.max_iterations is None else config.max_iterations,
        "tolerance": tolerance or None,
        "stop_on_repeat": config.stop_on_duplicate_support,
    }


def _require_same(asked: int | None, known: int, directory: Path) -> None:
    if asked is not None and asked != known:
        raise UserError(f"--k {asked} is not the k = {known} of the SAE in {directory}; leave --k out")


def _active(config: _Config, k: int | None, notes: list[str]) -> int:
    """For topk, the k of the SAE; otherwise the mean number of active latents, if it is known."""
    if config.architecture == "topk":
        if config.k is None:
            raise UserError(f"{CONFIG_FILE} has no k, which a topk SAE needs; copy the whole folder again")
        if not float(config.k).is_integer():
            raise UserError(
                f"k in {CONFIG_FILE} is {config.k}; a topk SAE needs a whole number; copy the folder again"
            )
        return int(config.k)
    if k is not None and k > config.d_sae:
        raise UserError(f"--k {k} is more than the SAE's {config.d_sae} latents; give a smaller one")
    details = config.metadata.get("training_architecture_details")
    trained = details.get("k") if isinstance(details, dict) else None
    for known in (k, config.metadata.get("l0"), config.k, trained):
        if isinstance(known, int | float) and 0.5 <= known <= config.d_sae:
            return round(known)
    return assumed_k(config.d_sae, notes)


# Files ------------------------------------------------------------------------------------------------


def _read_config(file: Path) -> _Config:
    """The settings in ``cfg.json`` under the names of 6.x, with checked types."""
    raw = read_json(file, what="the SAELens description", nonfinite=True, way_out="copy it again")
    if not isinstance(raw, dict) or not isinstance(raw.get("metadata", {}), dict):
        raise UserError(f"{file} is not the description of an SAE; name a folder that SAELens wrote")
    version = raw.get("metadata", {}).get("sae_lens_version") or raw.get("sae_lens_version")
    if not version or str(version).split(".")[0] in {"0", "1", "2", "3", "4", "5"}:
        raw = _since_6(raw, file)
    if not isinstance(raw.get("architecture"), str) or raw["architecture"] not in _READABLE:
        raise UserError(
            f"{file} has architecture {raw.get('architecture')!r:.60}; saebench reads {', '.join(_READABLE)}"
        )
    known = {f.name for f in dataclasses.fields(_Config)}
    config = from_flat(_Config, {name: v for name, v in raw.items() if name in known}, source=str(file))
    if config.is_transcoder and config.apply_b_dec_to_input:
        raise UserError(
            f"{file} subtracts b_dec from the input (apply_b_dec_to_input), which SAELens refuses for a "
            "transcoder; copy the folder again"
        )
    return config


def _since_6(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Convert the settings of a folder from before 6.0 to those of 6.0."""
    kind = raw.get("activation_fn_str", raw.get("activation_fn", "relu"))
    arguments = raw.get("activation_fn_kwargs") or {}
    new = {"architecture": "standard", **raw}
    if kind == "topk" and isinstance(arguments, dict) and "k" in arguments:
        new |= {"architecture": "topk", "k": arguments["k"]}
    elif kind != "relu":
        raise UserError(f"{file} has activation function {kind!r:.60}; saebench reads relu and topk")
    scaled = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if scaled is True else scaled
    hook = raw.get("hook_name", raw.get("hook_point"))
    new["metadata"] = {**{name: raw[name] for name in _ORIGIN if name in raw}, "hook_name": hook}
    return new


def _read_weights(file: Path, encoder: tuple[str, ...], config: _Config) -> Weights:
    """The tensors under the names and in the orientation of saebench."""
    shapes = {
        "W_enc": (config.d_in, config.d_sae),
        "topk_threshold": (),
        "W_skip": (config.width_out, config.d_in),
    }
    expected = {"W_dec": (config.d_sae, config.width_out), "b_dec": (config.width_out,)}
    expected |= {name: shapes.get(name, (config.d_sae,)) for name in encoder}
    weights = read_tensors(file, expected, optional=(FINE_TUNED,))
    if (weights.pop(FINE_TUNED, torch.ones(1)) != 1).any():
        raise UserError(
            f"{file} has a fine-tuned factor on its output, which saebench cannot represent; "
            "import the SAE from before fine-tuning"
        )
    if "W_enc" in weights:
        weights["W_enc_MD"] = weights.pop("W_enc").T
    return weights


def _input_scale(config: _Config, directory: Path) -> float:
    """The factor by which inputs are multiplied before the encoder.

    Raises:
        UserError: the factor is not recorded, or inputs are normalized in another way.
    """
    how = config.normalize_activations
    if how == "none" or (how in _INPUT_NORMS and not config.is_transcoder):
        return 1.0
    if how != "expected_average_only_in" or config.is_transcoder:
        readable = ", ".join(map(repr, ("expected_average_only_in", *_INPUT_NORMS)))
        raise UserError(
            f"{directory / CONFIG_FILE} has normalize_activations {how!r}; saebench reads 'none' and, of "
            f"SAEs, {readable}"
        )
    if not (directory / SCALE_FILE).exists():
        raise UserError(
            f"the SAE in {directory} scales its inputs, but {SCALE_FILE} with the factor is missing; "
            "copy it from the checkpoint"
        )
    scaler = read_json(
        directory / SCALE_FILE, what="the scale of the inputs", shape=_Scale, way_out="copy it again"
    )
    return float(scaler["scaling_factor"])
