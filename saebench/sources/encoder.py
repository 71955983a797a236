"""Encoder: a text model of transformers that is not a causal language model (BERT), read at module paths.

Shapes: B contexts, T positions, D width of a site.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from saebench.core.errors import UserError
from saebench.sources.model_info import ModelInfo, fetch_weights
from saebench.sources.native import ModuleSites, parse_site
from saebench.sources.pretrained import errors_of_loading

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD = "pooler."
"""Begins the names of weights that folders of masked language models lack, and that no other site reads."""


def is_encoder(info: ModelInfo) -> bool:
    """True when config.json describes a model that is not a causal language model.

    It names its classes in ``architectures``. Without them the model type decides: one with a masked
    language model is an encoder unless ``is_decoder`` is set. In a family that is read natively, a class that
    transformers does not have is taken for a causal language model under another name.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    config = AutoConfig.from_pretrained(info.folder, local_files_only=True, trust_remote_code=False)
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = set(config.architectures or ())
    if info.family is not None:
        named = {name for name in named if hasattr(transformers, name)}
    if named or info.family is not None:
        return bool(named) and not named & set(causal.values())
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    is_decoder = bool(getattr(config, "is_decoder", False))
    return not is_decoder and (config.model_type in masked or config.model_type not in causal)


def require_causal(info: ModelInfo) -> None:
    """Raise a UserError for a model without predictions: an encoder, or a base model without its head."""
    if is_encoder(info):
        raise UserError(
            f"model {info.name} is not a causal language model with an unembedding, so it has no predictions "
            "and no logits; leave the model out (eval without --model measures the reconstruction of a "
            "cache, index takes --model none)"
        )


def check_encoder_site(info: ModelInfo, site: str) -> None:
    """Raise a UserError, with the nearest paths, when the encoder has no module ``site``."""
    paths = [path for path, _ in _skeleton(str(info.folder)).named_modules()]
    if (path := parse_site(site).path) not in paths:
        near = difflib.get_close_matches(path, paths, n=3) or [paths[len(paths) // 2]]
        raise UserError(
            f"--site {site}: {info.name} is not a causal language model, so a site is a module path, "
            f"and it has no module {path!r}; did you mean {' or '.join(near)}?"
        )


@functools.cache
def _skeleton(folder: str) -> Any:
    """The modules without weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto: Any = AutoModel
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False)


class Encoder:
    """A bidirectional text model; ``load_model`` is for causal language models.

    Raises:
        UserError: missing or damaged weights, or a model that does not run on token ids alone.
    """

    def __init__(self, info: ModelInfo, device: torch.device, dtype: str) -> None:
        from transformers import AutoModel

        self.info, self.device = info, device
        folder = str(fetch_weights(info))
        with errors_of_loading(folder, info.name):
            auto: Any = AutoModel
            model, report = auto.from_pretrained(
                folder, dtype=_DTYPES[dtype], output_loading_info=True, use_safetensors=True,
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
        self._missing = sorted(report["missing_keys"])
        if lacking := [key for key in self._missing if not key.startswith(_HEAD)]:
            raise UserError(
                f"the *.safetensors files of model {info.name} lack {len(lacking)} tensors that its "
                f"config.json asks for ({lacking[0]}); download all files of one revision of the model"
            )
        self._module = model.to(device).eval().requires_grad_(False)

    def path_of(self, site: str) -> Literal["native"]:
        return "native"

    def hook_dim(self, site: str) -> int:
        """Width of the activations at ``site``, measured by running the model on two tokens."""
        return int(self.run_to(torch.zeros(1, 2, dtype=torch.long), [site])[site].shape[-1])

    @torch.no_grad()
    def run_to(
        self, tokens_BT: Tensor, sites: Sequence[str], length_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations [B, T, D]; positions from ``length_B`` on are padding, which no position attends to.

        Raises:
            UserError: a site without weights or without one vector per token, or a model that does not run.
        """
        for site in sites:
            if self._missing and site.startswith(_HEAD.rstrip(".")):
                raise UserError(
                    f"the files of {self.info.name} have no weights of {site}; choose another site"
                )
        tokens_BT = tokens_BT.to(self.device, torch.long)
        mask_BT = torch.ones_like(tokens_BT)
        if length_B is not None:
            mask_BT = (torch.arange(tokens_BT.shape[1]) < length_B[:, None]).to(self.device, torch.long)
        places = ModuleSites(self._module, {site: parse_site(site) for site in sites}, name=self.info.name)
        try:
            found = places.read(lambda: self._module(input_ids=tokens_BT, attention_mask=mask_BT))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"model {self.info.name} does not run on token ids alone ({reason}); harvest it in "
                "Python with sb.ModuleSource"
            ) from None
        for site, value in found.items():
            if value.ndim < 3 or value.shape[:2] != tokens_BT.shape or not value.is_floating_point():
                raise UserError(
                    f"--site {site} has shape {list(value.shape)} for {list(tokens_BT.shape)} tokens; "
                    "choose a site with one vector per token"
                )
        return {site: rearrange(value, "b t ... -> b t (...)") for site, value in found.items()}
