"""Loading a causal language model of transformers from a folder; every failure becomes a UserError."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saebench.core.errors import UserError
from saebench.core.reading import shown


def load_causal_model(folder: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model in ``folder``, with frozen weights, without dropout, on ``device``.

    Attention is computed by torch's scaled_dot_product_attention where the architecture allows it. ``name``
    is what error sentences call the model.

    Raises:
        UserError: missing or damaged weights, or too little GPU memory.
    """
    from transformers import AutoModelForCausalLM

    with errors_of_loading(folder, name):
        model = load_pretrained(AutoModelForCausalLM, folder, name, dtype=dtype).to(device)
    return model.eval().requires_grad_(False)


def load_pretrained(model_class: Any, folder: str | Path, name: str, **options: Any) -> Any:
    """``model_class.from_pretrained`` from safetensors alone, without remote code.

    A model that caps its attention scores is loaded with transformers' own attention: transformers 5.17 gives
    Gemma 2 torch's scaled_dot_product_attention, which leaves the cap out without a word.

    Raises:
        UserError: weights that the files lack; transformers itself fills them with random numbers.
    """
    from transformers import AutoConfig

    safe = {"local_files_only": True, "trust_remote_code": False}
    if caps_attention(AutoConfig.from_pretrained(folder, **safe)):
        options["attn_implementation"] = "eager"
    safe["use_safetensors"] = True
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **{**options, **safe})
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the *.safetensors files of model {name} in {folder} lack {len(missing)} "
            f"tensors that its config.json asks for ({missing[0]}); download config.json and all "
            "*.safetensors files of one revision of the model into that folder"
        )
    return model


def caps_attention(config: Any) -> bool:
    """Whether a config of transformers, or one that it holds, caps the scores of attention."""
    values = config.to_dict()
    nested = [part for part in values.values() if isinstance(part, dict)]
    return any(
        part.get(name)
        for part in (values, *nested)
        for name in ("attn_logit_softcapping", "attention_logit_cap")
    )


def architecture_of_type(folder: str) -> str | None:
    """The class name that transformers gives the model type of a config.json without ``architectures``."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.architectures:
        return None
    name: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return name


@functools.cache
def module_paths(folder: str) -> frozenset[str]:
    """The paths of all modules of the model in ``folder``, from its config alone; empty when unknown."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            skeleton = auto.from_config(config, trust_remote_code=False)
    except Exception:  # a config class raises errors of its own
        return frozenset()
    return frozenset(path for path, _ in skeleton.named_modules() if path)


@contextlib.contextmanager
def errors_of_loading(folder: str, name: str) -> Iterator[None]:
    """Turns what transformers and TransformerLens raise into UserErrors, and silences their logging."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"model {name} does not fit into the GPU's memory; use --device cpu") from None
    except Exception as error:  # each class of model raises errors of its own
        reason = shown(str(error) or type(error).__name__, 300)
        if "afetensor" in repr(error):
            raise UserError(
                f"the weights of model {name} in {folder} are damaged ({reason}); download the *.safetensors "
                "files again"
            ) from None
        raise UserError(
            f"model {name} cannot be loaded ({reason}); download all its files again, of one revision"
        ) from None
