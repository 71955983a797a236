"""The one adapter to TransformerLens: a language model whose activations can be read and replaced.

Shapes: B contexts, T positions, D width of a hook, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from saebench.activations.model_source import ModelInfo, fetch_weights, peek_model, unknown_hook
from saebench.activations.tokens import Tokens
from saebench.errors import UserError

__all__ = ["Model", "ModelInfo", "load_model", "peek_model"]

Edit = Callable[[Tensor], Tensor]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out|hook_in|hook_out)")


class Model:
    """A causal language model, for inference. Made by `load_model`.

    Hooks have TransformerLens names (blocks.2.hook_resid_post). Activations of several heads
    (attn.hook_z) appear flat, [B, T, n_heads * d_head].
    """

    def __init__(self, info: ModelInfo, bridge: Any, tokens: Tokens) -> None:
        self.info = info
        self.tokens = tokens
        self._bridge = bridge
        self._points = bridge.hook_dict

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def hash(self) -> str:
        return self.info.hash

    @property
    def d_model(self) -> int:
        return self.info.d_model

    @property
    def n_layers(self) -> int:
        return self.info.n_layers

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self.tokens.tokenizer

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self._bridge.original_model.parameters())
        return parameter.device

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for, ``vocab_size`` of them."""
        return self.tokens.bytes()

    def hook_names(self) -> list[str]:
        return list(self._points)

    def check_hook(self, hook: str) -> None:
        """Raises UserError, with the nearest names, when the model has no such hook."""
        self.info.check_hook(hook)
        if hook not in self._points:
            raise UserError(unknown_hook(hook, self.hook_names(), self.name))

    def hook_dim(self, hook: str) -> int:
        """Width of the activations at ``hook``; found by running two tokens."""
        return int(self.run_to(torch.zeros(1, 2, dtype=torch.long), [hook])[hook].shape[-1])

    def residual_hook(self, hook: str) -> bool:
        """True when ``hook`` is the residual stream, or what is added to it: what the unembedding reads."""
        return _RESIDUAL.fullmatch(hook) is not None

    def run_to(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Activations [B, T, D] at ``hooks``; nothing beyond the last layer needed is computed.

        Raises:
            UserError: an unknown hook, or one without an activation for each token (attention patterns).
        """
        for hook in hooks:
            self.check_hook(hook)
        found: dict[str, Tensor] = {}

        def keep(hook: str) -> Callable[..., None]:
            def store(value: Tensor, hook_point: object = None, **_: object) -> None:
                found[hook] = value

            return store

        layers = [_layers_needed(hook) for hook in hooks]
        stop = None if None in layers else max(layer for layer in layers if layer is not None)
        listeners = [(hook, keep(hook)) for hook in hooks]
        if stop == self.n_layers:  # the bridge stops before a layer, and there is none after the last
            stop = None
            listeners.append(("ln_final.hook_in", _stop_here))
        self._run(tokens_BT, listeners, return_type=None, stop_at_layer=stop)
        n_positions = tokens_BT.shape
        for hook in hooks:
            if hook not in found:
                raise UserError(
                    f"--hook {hook} was not reached in a forward pass of {self.name}; choose another"
                )
            value = found[hook]
            if value.shape[:2] != n_positions or value.ndim < 3 or not value.is_floating_point():
                raise UserError(
                    f"--hook {hook} has shape {list(value.shape)} for {list(n_positions)} tokens; "
                    "choose a hook with a vector for each token"
                )
            found[hook] = rearrange(value, "b t ... -> b t (...)")
        return {hook: found[hook] for hook in hooks}

    def logits(self, tokens_BT: Tensor, *, edit: Mapping[str, Edit] | None = None) -> Tensor:
        """Logits [B, T, V]; each function in ``edit`` replaces the activations [B, T, D] at its hook."""

        def replace(function: Edit) -> Callable[..., Tensor]:
            def hook(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
                flat_BTD = rearrange(value, "b t ... -> b t (...)")
                return function(flat_BTD).to(value.dtype).view_as(value)

            return hook

        edits = edit or {}
        for name in edits:
            self.check_hook(name)
        listeners = [(name, replace(function)) for name, function in edits.items()]
        logits: Tensor = self._run(tokens_BT, listeners, return_type="logits", stop_at_layer=None)
        return logits

    @torch.no_grad()
    def unembedding(self) -> Tensor:
        """The direct effect of a residual direction on the logits, [d_model, V] float32 on the CPU.

        A direction d in the residual stream adds d @ U / s to the logits, where s is the scale of the final
        norm in that context (its standard deviation, or root mean square) and

            U = C diag(w) W_U, minus its mean over the vocabulary.

        w is the gain of the final norm; C subtracts the mean over d_model when that norm is a LayerNorm, and
        is the identity for RMSNorm. A logit's mean over the vocabulary does not change any probability.
        """
        cfg = self._bridge.cfg
        W_U_DV = self._bridge.original_model.get_output_embeddings().weight.T.float().cpu()
        gain = getattr(self._bridge.ln_final.original_component, "weight", None)
        if gain is not None:
            gain_D = gain.float().cpu() + float(getattr(cfg, "rmsnorm_uses_offset", False))
            W_U_DV = gain_D[:, None] * W_U_DV
        if not getattr(cfg, "uses_rms_norm", False):
            W_U_DV = W_U_DV - W_U_DV.mean(dim=0, keepdim=True)
        U_DV: Tensor = W_U_DV - W_U_DV.mean(dim=1, keepdim=True)
        return U_DV

    @torch.no_grad()
    def _run(self, tokens_BT: Tensor, listeners: list[tuple[str, Callable[..., Any]]], **options: Any) -> Any:
        tokens_BT = tokens_BT.to(self.device, torch.long)
        try:
            return self._bridge.run_with_hooks(tokens_BT, fwd_hooks=listeners, **options)
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"the GPU ran out of memory running {self.name} on {list(tokens_BT.shape)} tokens; "
                "lower --batch-size"
            ) from None


def load_model(
    name: str, *, revision: str | None = None, device: str | torch.device = "cpu", dtype: str = "fp32"
) -> Model:
    """Load a causal language model for inference.

    ``name`` is 'demo', 'smollm2', a local Hugging Face folder, or a hub name; weights are read from
    safetensors only and no code comes with a model. ``dtype`` ('fp32', 'bf16', 'fp16') is that of the
    computation.

    Raises:
        UserError: no such model, files missing or damaged, a tokenizer that does not fit, a model that is not
            causal or that TransformerLens does not know, or too little memory on the GPU.
    """
    info = peek_model(name, revision=revision)
    tokens = Tokens(info)
    folder = fetch_weights(info)
    bridge = _boot(str(folder), name, torch.device(device), _DTYPES[dtype])
    if getattr(bridge.cfg, "attention_dir", "causal") != "causal":
        raise UserError(f"model {name} reads its text in both directions; a causal language model is needed")
    return Model(info, bridge, tokens)


def _boot(folder: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        bridge = TransformerBridge.boot_transformers(
            folder, device=device, dtype=dtype, model_class=_Complete(folder, name)
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
            raise UserError(f"the weights of model {name} are damaged ({error}); get them again") from None
        raise
    bridge.eval()
    return bridge.requires_grad_(False)


class _Complete:
    """A model's transformers class that refuses gaps in the weights, which are else filled at random."""

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
                f"the weights of model {self._name} lack {len(missing)} tensors that its config.json "
                f"asks for ({missing[0]}); get both from one place"
            )
        return model


def _layers_needed(hook: str) -> int | None:
    """How many layers must run before ``hook`` has fired; None for all and what follows them."""
    if found := re.match(r"blocks\.(\d+)\.", hook):
        return int(found[1]) + 1
    return 0 if hook.startswith(("embed.", "pos_embed.", "hook_embed", "hook_pos_embed")) else None


def _stop_here(value: Tensor, hook_point: object = None, **_: object) -> None:
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    raise StopAtLayerException(value)
