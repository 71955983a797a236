"""Transcoder sets of circuit-tracer: a folder with ``config.yaml`` and ``layer_0.safetensors``, and so on.

A set has a transcoder for each layer from 0 on, all of one input hook, one output hook and one shape. Its
transcoders compute z = W_enc x + b_enc where that is above ``activation_function.threshold``, or, without
thresholds, where it is positive, and y = W_dec^T z + b_dec, plus W_skip x where there is ``W_skip``. The
layout is that of circuit-tracer 0.5.

Shapes: M = d_sae latents, D = d_in = d_out, the width of the residual stream. ``W_enc`` and ``W_dec`` are
[M, D].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from saebench.core.errors import UserError
from saebench.core.files import write_bytes_atomic
from saebench.core.reading import read_bytes
from saebench.core.tensors import read_safetensors
from saebench.formats import folding
from saebench.formats.folding import Weights
from saebench.formats.foreign import Foreign, assumed_k, check_foreign
from saebench.formats.transcoders import check_transcoder, sites_of, without_b_in
from saebench.runs.run import Run
from saebench.saes.base import SAE

CONFIG_FILE = "config.yaml"
KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_HOOKS = ("feature_input_hook", "feature_output_hook")
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")
_WAY_OUT = "copy the whole folder"


@dataclass(frozen=True)
class ConvertedSet:
    """The transcoders of a set, before they are written."""

    runs: tuple[Run, ...]
    """By layer."""
    config: dict[str, Any]
    """The contents of ``config.yaml``."""
    architecture: str = KIND
    note: str | None = None


# Export -----------------------------------------------------------------------------------------------


def convert_set(runs: Sequence[Run]) -> ConvertedSet:
    """The transcoders of ``runs``, one per layer, in any order, as a set.

    Raises:
        UserError: a run holds no transcoder that a set can hold, a layer is missing or named twice, or the
            transcoders differ in what a set has once.
    """
    by_layer: dict[int, Run] = {}
    kinds: list[dict[str, Any]] = []
    for run in runs:
        layer, kind = _placed(run.load(), run)
        if layer in by_layer:
            raise UserError(f"{by_layer[layer]} and {run} are both of layer {layer}; name one run per layer")
        by_layer[layer] = run
        kinds.append(kind)
        for name, value in kind.items():
            if value != kinds[0][name]:
                raise UserError(
                    f"{run} has {name} {value}, but {runs[0]} has {kinds[0][name]}; name runs that agree, "
                    "since a transcoder set has one value for all"
                )
    missing = sorted(set(range(max(by_layer))) - set(by_layer))
    if missing:
        raise UserError(
            f"a transcoder set needs every layer from 0 to the last, and no run is of layer "
            f"{', '.join(map(str, missing))}; train these too, with --site blocks.{missing[0]}."
            f"{kinds[0][_HOOKS[0]]} --target blocks.{missing[0]}.{kinds[0][_HOOKS[1]]}"
        )
    config = {
        "model_name": kinds[0]["model"],
        "model_kind": KIND,
        **{name: kinds[0][name] for name in _HOOKS},
    }
    return ConvertedSet(tuple(by_layer[layer] for layer in sorted(by_layer)), config)


def write_set(converted: ConvertedSet, directory: Path) -> None:
    """Write the folder of a set, one transcoder after the other."""
    from safetensors.torch import save as serialize

    for layer, run in enumerate(converted.runs):
        tensors = without_b_in(run.load())
        tensors["W_enc"] = tensors.pop("W_enc_MD")
        if "threshold" in tensors:
            tensors[THRESHOLD] = tensors.pop("threshold")
        write_bytes_atomic(directory / f"layer_{layer}.safetensors", serialize(tensors))
    config = {**converted.config, "scan": directory.resolve().name}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_bytes_atomic(directory / CONFIG_FILE, text.encode())


def _placed(sae: SAE, run: Run) -> tuple[int, dict[str, Any]]:
    """The layer of a transcoder, and what all transcoders of a set must share."""
    if not (sae.spec.sites or sae.spec.targets):
        raise UserError(
            f"a transcoder set holds transcoders, and {run} is an SAE; train with --target, or export it "
            "with --format saelens"
        )
    check_transcoder(sae.spec, library="circuit-tracer")
    site, target = sae.spec.sites[0], sae.spec.targets[0]
    read, written = _HOOK.fullmatch(site.name), _HOOK.fullmatch(target.name)
    if read is None or written is None or read[1] != written[1]:
        raise UserError(
            f"a transcoder set reads and writes hooks blocks.LAYER.NAME of one layer, and {run} reads "
            f"{site.name} and writes {target.name}; train on such hooks"
        )
    if sae.d_in != sae.d_out:
        raise UserError(
            f"a transcoder set reads and writes as many columns, and {run} reads {sae.d_in} and writes "
            f"{sae.d_out}; use --format saelens"
        )
    model = run.description().get("model") or {}
    return int(read[1]), {
        _HOOKS[0]: read[2],
        _HOOKS[1]: written[2],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "skip": sae.spec.skip,
        "model": model.get("name"),
    }


# Import -----------------------------------------------------------------------------------------------


def read_set(directory: Path, *, k: int | None) -> Iterator[tuple[str, Foreign]]:
    """The transcoders of a set as (``layer_0``, transcoder), ..., one in memory at a time.

    Raises:
        UserError: the folder holds no set, or a file is damaged or of a transcoder that saebench does not
            compute.
    """
    config = _read_config(directory / CONFIG_FILE)
    found = {int(m[1]) for path in directory.iterdir() if (m := _LAYER_FILE.fullmatch(path.name))}
    if not found and "transcoders" in config:
        raise UserError(
            f"{directory / CONFIG_FILE} names files elsewhere ({str(config['transcoders'])[:60]}); copy them "
            f"to {directory} as layer_0.safetensors, layer_1.safetensors, ..."
        )
    missing = sorted(set(range(max(found, default=0) + 1)) - found)
    if missing:
        raise UserError(f"{directory / f'layer_{missing[0]}.safetensors'} does not exist; {_WAY_OUT}")
    for layer in sorted(found):  # all are checked before the first is saved
        _read_layer(directory, layer, config, k)
    return ((f"layer_{layer}", _read_layer(directory, layer, config, k)) for layer in sorted(found))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(
            read_bytes(
                file, what="the description", way_out="name the folder of a transcoder set", at_most=2**24
            )
        )
    except UserError:
        raise
    except Exception as error:  # PyYAML raises many kinds for dates, numbers and nesting
        reason = type(error).__name__
        raise UserError(f"{file} is damaged or not YAML ({reason}); {_WAY_OUT}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(name), str) for name in _HOOKS):
        raise UserError(f"{file} has no {' or '.join(_HOOKS)}; name the folder of a transcoder set")
    if config.get("model_kind") != KIND:
        raise UserError(
            f"{file} has model_kind {config.get('model_kind')!r:.60}; saebench reads {KIND}, transcoders of "
            "one layer each"
        )
    return config


def _read_layer(directory: Path, layer: int, config: dict[str, Any], k: int | None) -> Foreign:
    file = directory / f"layer_{layer}.safetensors"
    weights: Weights = read_safetensors(file, way_out=_WAY_OUT)
    d_sae, d_in = (weights[name].numel() if name in weights else 0 for name in ("b_enc", "b_dec"))
    shapes: dict[str, tuple[int, ...]] = {
        "b_enc": (d_sae,), "b_dec": (d_in,), "W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in),
        THRESHOLD: (d_sae,), "W_skip": (d_in, d_in),
    }  # fmt: skip
    optional = {THRESHOLD, "W_skip"} - set(weights)
    check_foreign(weights, {name: shape for name, shape in shapes.items() if name not in optional}, file)
    weights["W_enc_MD"] = weights.pop("W_enc")
    if THRESHOLD in weights:
        weights["threshold"] = weights.pop(THRESHOLD)
        if (weights["threshold"] < 0).any():
            raise UserError(
                f"{file} has thresholds below 0, with which circuit-tracer computes negative activations; "
                "saebench has positive ones"
            )
    if not folding.norms_are_one(weights):
        weights = folding.fold_decoder_norms(weights)
    weights["b_in"] = torch.zeros(d_in)
    notes: list[str] = []
    if k is not None and k > d_sae:
        raise UserError(f"--k {k} is more than the {d_sae} latents of {file}; give a smaller one")
    site, target = (f"blocks.{layer}.{config[name]}" for name in _HOOKS)
    facts = {name: config[name] for name in ("model_name", "scan") if isinstance(config.get(name), str)}
    return Foreign(
        sae="jumprelu" if "threshold" in weights else "relu",
        d_in=d_in,
        spec={
            "d_sae": d_sae,
            "k": k or assumed_k(d_sae, notes),
            **sites_of(site, d_in, target, d_in, skip="W_skip" in weights),
        },
        weights=folding.in_float32(weights),
        facts={"hook_name": site, "architecture": KIND, **facts},
        notes=tuple(notes),
    )
