"""``convert`` and ``write``: save an SAE of saebench in the format of SAELens.

Shapes: M = d_sae latents, D = d_in. SAELens stores ``W_enc`` [D, M].

Transcoders of SAELens do not subtract a bias from their input, so b_in is folded into the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.files import write_bytes_atomic, write_json_atomic
from saebench.core.settings import to_flat
from saebench.formats.saelens.names import CONFIG_FILE, VERSION, WEIGHTS_FILE
from saebench.formats.saelens.origin import origin_of
from saebench.formats.transcoders import check_transcoder, without_b_in
from saebench.runs.run import Run
from saebench.saes.base import SAE

_INPUT_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
"""Normalization of each row in saebench -> that of SAELens."""


@dataclass(frozen=True)
class Written:
    """An SAE in the format of SAELens."""

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    trained_as: str | None = None
    """Architecture during training, if its name differs."""
    note: str | None = None
    """What SAELens computes differently."""


def convert(sae: SAE) -> Written:
    """``sae`` in the format of SAELens.

    Raises:
        UserError: no architecture of SAELens computes what this SAE computes.
    """
    if sae.spec.sites or sae.spec.targets:
        check_transcoder(sae.spec, library="SAELens")
        return _transcoder(sae)
    if sae.spec.name not in _WRITERS:
        raise UserError(f"SAELens has no architecture for {sae.spec.name}; it can hold {', '.join(_WRITERS)}")
    return _WRITERS[sae.spec.name](sae)


def write(written: Written, directory: Path, sae: SAE, run: Run) -> None:
    """Write the folder of a converted ``sae``; ``run`` gives the metadata on its origin."""
    from safetensors.torch import save as serialize

    config = {
        "architecture": written.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": _INPUT_NORMS[sae.spec.input_norm],
        "reshape_activations": "none",
        **written.settings,
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "training_architecture": written.trained_as or written.architecture,
            "training_architecture_details": to_flat(sae.spec),
            **origin_of(run),
        },
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in written.tensors.items()}
    write_bytes_atomic(directory / WEIGHTS_FILE, serialize(tensors))
    write_json_atomic(directory / CONFIG_FILE, config)


def _linear(sae: SAE) -> dict[str, Tensor]:
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


def _topk(sae: SAE) -> Written:
    return Written("topk", _linear(sae), {"k": sae.k, "rescale_acts_by_decoder_norm": False})


def _gradient(sae: SAE) -> Written:
    note = "SAELens has no gradients at inference: it computes the inference mode 'plain' of saebench"
    return Written("topk", _linear(sae), _topk(sae).settings, "gradient_topk", note)


def _thresholded(trained_as: str) -> Callable[[SAE], Written]:
    """A writer of jumprelu SAEs; a single threshold is repeated, because SAELens needs one per latent."""

    def written(sae: SAE) -> Written:
        threshold_M = sae.state_dict()["threshold"].expand(sae.d_sae)
        return Written("jumprelu", {**_linear(sae), "threshold": threshold_M}, {}, trained_as)

    return written


def _transcoder(sae: SAE) -> Written:
    weights = without_b_in(sae)
    weights["W_enc"] = weights.pop("W_enc_MD").T
    kinds = ("jumprelu" if "threshold" in weights else "", "skip" if "W_skip" in weights else "")
    architecture = "_".join([kind for kind in kinds if kind] + ["transcoder"])
    settings = {"d_out": sae.d_out, "apply_b_dec_to_input": False}
    return Written(architecture, weights, settings, f"{sae.spec.name.replace('-', '_')}_transcoder")


def _standard(sae: SAE) -> Written:
    return Written("standard", _linear(sae))


def _gated(sae: SAE) -> Written:
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    return Written("gated", {name: getattr(sae, name) for name in names})


def _matching_pursuit(sae: SAE) -> Written:
    spec = to_flat(sae.spec)
    if spec["orthogonal"] or spec["selection"] != "signed":
        kind = "orthogonal" if spec["orthogonal"] else "absolute"
        raise UserError(
            f"SAELens has no {kind} matching pursuit; it can hold only the signed, not orthogonal one"
        )
    settings = {
        "max_iterations": sae.k,
        "residual_threshold": float(sae.state_dict()["tolerance"]),
        "stop_on_duplicate_support": spec["stop_on_repeat"],
    }
    return Written("matching_pursuit", {"W_dec": sae.W_dec, "b_dec": sae.b_dec}, settings)


_WRITERS: dict[str, Callable[[SAE], Written]] = {
    "topk": _topk,
    "gradient": _gradient,
    "mutual-choice": _thresholded("mutual_choice"),
    "feature-choice": _thresholded("feature_choice"),
    "matryoshka": _thresholded("matryoshka_mutual_choice"),
    "jumprelu": _thresholded("jumprelu"),
    "relu": _standard,
    "gated": _gated,
    "matching-pursuit": _matching_pursuit,
}
