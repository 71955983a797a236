"""Encoder: a text model of transformers that is not a causal language model (BERT), read at module paths.

Shapes: B contexts, T positions, D width of a site.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from saebench.core.errors import UserError
from saebench.sources.model_info import ModelInfo, fetch_weights
from saebench.sources.native import ModuleSites, find_module, parse_site
from saebench.sources.pretrained import errors_of_loading

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD = "pooler."
"""Begins the names of weights that folders of masked language models lack, and that no other site reads."""


def is_encoder(info: ModelInfo) -> bool:
    """True when config.json names a class that is not a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if info.family is not None:
        return False
    config = AutoConfig.from_pretrained(info.folder, local_files_only=True, trust_remote_code=False)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return bool(config.architectures) and not causal & set(config.architectures)


def check_encoder_site(info: ModelInfo, site: str) -> None:
    """Raise a UserError, with the nearest paths, when the encoder has no module ``site``."""
    find_module(_skeleton(str(info.folder)), parse_site(site).path, info.name)


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
