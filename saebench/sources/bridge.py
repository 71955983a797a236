"""Loading a model folder with TransformerLens's bridge; every failure becomes a UserError."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from saebench.core.errors import UserError
from saebench.sources.model_info import has_tokenizer


def load_bridge(folder: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The TransformerBridge of the model in ``folder``, with frozen weights and without dropout.

    ``name`` is what error sentences call the model.

    Raises:
        UserError: missing or damaged weights, a model that the bridge does not know, or too little GPU
            memory.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        bridge = TransformerBridge.boot_transformers(
            folder,
            device=device,
            dtype=dtype,
            model_class=_AllWeights(folder, name),
            tokenizer=None if has_tokenizer(Path(folder)) else _placeholder_tokenizer(),
        )
    except UserError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"model {name} does not fit into the GPU's memory; use --device cpu") from None
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {name} cannot be loaded ({reason})") from None
    except Exception as error:
        if type(error).__module__.startswith(("safetensors", "builtins")) and "afetensor" in repr(error):
            raise UserError(
                f"the weights of model {name} in {folder} are damaged ({error}); download the *.safetensors "
                "files again"
            ) from None
        raise
    bridge.eval()
    return bridge.requires_grad_(False)


def _placeholder_tokenizer() -> Any:
    """The bridge does not load without a tokenizer; a model without one reads token ids only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast  # it has no types
    return made(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))


class _AllWeights:
    """A stand-in for a transformers model class that refuses missing weights.

    transformers itself fills them with random numbers.
    """

    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._name = folder, name

    def from_pretrained(self, folder: str, **options: Any) -> Any:
        from transformer_lens.model_bridge.sources import transformers as source
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        architecture = source.determine_architecture_from_hf_config(config)  # type: ignore[no-untyped-call]
        real: Any = source.get_hf_model_class_for_architecture(architecture)
        model, report = real.from_pretrained(folder, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"the *.safetensors files of model {self._name} in {self._folder} lack {len(missing)} "
                f"tensors that its config.json asks for ({missing[0]}); download config.json and all "
                "*.safetensors files of one revision of the model into that folder"
            )
        return model
