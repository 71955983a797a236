"""The formats of activations that `saebench cache import` reads.

Another package adds one with an entry point of the group ``saebench.activation_formats``, whose object is a
function ``(ImportConfig) -> ActivationCache``.
"""

from __future__ import annotations

from saebench.core.registry import Registry

IMPORT_FORMATS = Registry(
    kind="a format of activations",
    group="saebench.activation_formats",
    built_in={
        "array": "saebench.activations.importing:import_activations",
        "vllm": "saebench.activations.vllm:import_vllm",
    },
)
