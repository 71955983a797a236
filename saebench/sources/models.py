"""Model and load_model: a language model whose activations can be read and replaced, with TransformerLens.

Shapes: B contexts, T positions, D width of a hook, V vocabulary.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from saebench.core.errors import UserError
from saebench.sources.bridge import load_bridge
from saebench.sources.gradients import contexts_at_once, gradients_of, summed_cross_entropy
from saebench.sources.hook_names import (
    is_between_blocks,
    is_residual,
    layers_needed,
    needs_change_in_place,
    unknown_hook,
)
from saebench.sources.model_info import ModelInfo, fetch_weights, peek_model
from saebench.sources.tokenizer import ModelTokenizer, open_tokenizer

__all__ = ["Model", "ModelInfo", "load_model", "peek_model"]

EditFunction = Callable[[Tensor], Tensor]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SWITCHED_OFF = re.compile(r"Cannot add hook (\S+) because (\S+) is False")


class Model:
    """A causal language model, for inference. Made by `load_model`.

    Hooks have TransformerLens names (blocks.2.hook_resid_post). The activations of
    several heads (attn.hook_z) are flattened to [B, T, n_heads * d_head].
    """

    def __init__(self, info: ModelInfo, bridge: Any, tokens: ModelTokenizer) -> None:
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
        """Raise a UserError, with the nearest names, when the model has no such hook."""
        self.info.check_hook(hook)
        if hook not in self._points:
            raise UserError(unknown_hook(hook, self.hook_names(), self.name))

    def hook_dim(self, hook: str) -> int:
        """Width of the activations at ``hook``, measured by running the model on two tokens."""
        return int(self.run_to(torch.zeros(1, 2, dtype=torch.long), [hook])[hook].shape[-1])

    def residual_hook(self, hook: str) -> bool:
        """True when ``hook`` is the residual stream, or what is added to it: what the unembedding reads."""
        return is_residual(hook)

    @torch.no_grad()
    def run_to(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Activations [B, T, D] at ``hooks``; layers after the last one needed are not computed.

        Raises:
            UserError: an unknown hook, or one that does not give one vector per token (attention patterns).
        """
        for hook in hooks:
            self.check_hook(hook)
        found: dict[str, Tensor] = {}

        def keep(hook: str) -> Callable[..., None]:
            def store(value: Tensor, hook_point: object = None, **_: object) -> None:
                found[hook] = value

            return store

        layers = [layers_needed(hook) for hook in hooks]
        stop = None if None in layers else max(layer for layer in layers if layer is not None)
        listeners = [(hook, keep(hook)) for hook in hooks]
        if stop == self.n_layers:  # the bridge can only stop before a layer, and none follows the last
            stop = None
            listeners.append(("ln_final.hook_in", _stop_here))
        self._run(tokens_BT, listeners, return_type=None, stop_at_layer=stop)
        return {hook: self._per_token(hook, found.get(hook), tokens_BT) for hook in hooks}

    def logits(self, tokens_BT: Tensor, *, edit: Mapping[str, EditFunction] | None = None) -> Tensor:
        """Logits [B, T, V]; each function in ``edit`` replaces the activations [B, T, D] at its hook."""

        def replace(name: str, function: EditFunction) -> Callable[..., Tensor]:
            def hook(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
                flat_BTD = rearrange(value, "b t ... -> b t (...)")
                new = function(flat_BTD).to(value.dtype).view_as(value)
                return value.copy_(new) if needs_change_in_place(name) else new

            return hook

        edits = edit or {}
        for name in edits:
            self.check_hook(name)
        listeners = [(name, replace(name, function)) for name, function in edits.items()]
        with torch.no_grad():
            logits: Tensor = self._run(tokens_BT, listeners, return_type="logits", stop_at_layer=None)
        return logits

    @torch.no_grad()
    def variants(self, tokens_1T: Tensor, hook: str, x_FTD: Tensor) -> Tensor:
        """Logits [F, T, V] of one context, with its activations at ``hook`` replaced by each of ``x_FTD``.

        At a residual stream hook between blocks the model runs once up to the hook, and F times after it.
        """
        self.check_hook(hook)
        if is_between_blocks(hook):

            def branch(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
                return x_FTD.to(value)

            logits: Tensor = self._run(tokens_1T, [(hook, branch)], return_type="logits", stop_at_layer=None)
            if len(logits) == len(x_FTD):
                return logits
        return self.logits(tokens_1T.expand(len(x_FTD), -1), edit={hook: lambda _: x_FTD})

    def gradients(
        self,
        tokens_BT: Tensor,
        length_B: Tensor,
        hooks: Sequence[str],
        *,
        of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations [B, T, D] at ``hooks``, and the gradient [B, T, D] of the model's loss at each.

        The loss is the SUM of the next-token cross entropies, in nats, over positions 0 .. length - 2 of each
        context. The gradient of a token therefore covers its own prediction and all later ones of its
        context, and depends neither on the context's length nor on the other contexts of the batch. It is
        the total derivative, through all later computation: the effect of `logits`' ``edit`` to first order.
        The last of the ``length_B`` tokens of a context predicts nothing, so its gradient in the residual
        stream is exactly 0; so is that of the padding after it.

        ``of`` replaces the loss by another scalar function of the logits [b, T, V] of some contexts.

        Contexts are processed in groups, one forward and one backward pass each, so that the logits stay
        within ``LOGIT_BYTES``.

        Raises:
            UserError: an unknown hook, one that does not give one vector per token, or one that the
                predictions do not depend on.
        """
        for hook in hooks:
            self.check_hook(hook)
        at_once = contexts_at_once(tokens_BT.shape[1], self.vocab_size)
        parts = [
            self._gradients(part_BT, part_B, hooks, of)
            for part_BT, part_B in zip(
                torch.split(tokens_BT, at_once), torch.split(length_B, at_once), strict=True
            )
        ]
        activations, gradients = (
            {hook: torch.cat([part[side][hook] for part in parts]) for hook in hooks} for side in (0, 1)
        )
        return activations, gradients

    def _gradients(
        self,
        tokens_BT: Tensor,
        length_B: Tensor,
        hooks: Sequence[str],
        of: Callable[[Tensor], Tensor] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def keep(hook: str) -> Callable[..., Tensor]:
            def store(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
                if not value.is_floating_point():
                    found[hook] = value
                elif needs_change_in_place(hook):
                    found[hook] = value if value.requires_grad else value.requires_grad_()
                else:  # a new tensor, so that only what reads the hook counts, as with an edit
                    found[hook] = (
                        value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
                    )
                return found[hook]

            return store

        listeners = [(hook, keep(hook)) for hook in hooks]
        with torch.enable_grad(), self._out_of_memory_as_user_error(tokens_BT):
            logits_BTV = self._run(tokens_BT, listeners, return_type="logits", stop_at_layer=None)
            flat = {hook: self._per_token(hook, found.get(hook), tokens_BT) for hook in hooks}
            loss = summed_cross_entropy(logits_BTV, tokens_BT, length_B) if of is None else of(logits_BTV)
            del logits_BTV
            gradients = gradients_of(loss, found)
        for hook in hooks:
            if hook not in gradients:
                raise UserError(
                    f"the predictions of {self.name} do not depend on --site {hook}, so it has no gradient; "
                    "choose another hook"
                )
        return (
            {hook: value.detach() for hook, value in flat.items()},
            {hook: rearrange(gradients[hook], "b t ... -> b t (...)") for hook in hooks},
        )

    def _per_token(self, hook: str, value: Tensor | None, tokens_BT: Tensor) -> Tensor:
        """The value at ``hook`` as [B, T, D]; raises a UserError when it is not one vector per token."""
        if value is None:
            raise UserError(f"--site {hook} was not reached in a forward pass of {self.name}; choose another")
        if value.shape[:2] != tokens_BT.shape or value.ndim < 3 or not value.is_floating_point():
            raise UserError(
                f"--site {hook} has shape {list(value.shape)} for {list(tokens_BT.shape)} tokens; "
                "choose a hook with one vector per token"
            )
        return rearrange(value, "b t ... -> b t (...)")

    def final_scale(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] float32: the number that the final norm divides by, the s of `unembedding`.

        It is the standard deviation of the residual stream (LayerNorm) or its root mean square (RMSNorm),
        with the norm's epsilon.
        """
        hook = "ln_final.hook_scale"
        return self.run_to(tokens_BT, [hook])[hook][..., 0].float()

    @torch.no_grad()
    def unembedding(self) -> Tensor:
        """The direct effect of a residual stream direction on the logits, [d_model, V] float32 on the CPU.

        A direction d in the residual stream adds d @ U / s to the logits, where s is the scale of the final
        norm in that context (see `final_scale`) and

            U = C diag(w) W_U, minus its mean over the vocabulary.

        w is the gain of the final norm. C subtracts the mean over d_model when that norm is a LayerNorm, and
        is the identity for RMSNorm. Subtracting the mean over the vocabulary changes no probability.
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

    def _run(self, tokens_BT: Tensor, listeners: list[tuple[str, Callable[..., Any]]], **options: Any) -> Any:
        tokens_BT = tokens_BT.to(self.device, torch.long)
        with self._out_of_memory_as_user_error(tokens_BT):
            try:
                return self._bridge.run_with_hooks(tokens_BT, fwd_hooks=listeners, **options)
            except ValueError as error:
                if found := _SWITCHED_OFF.search(str(error)):
                    raise UserError(
                        f"--site {found[1]} is computed only when TransformerLens sets {found[2]}, which "
                        "saebench does not; choose another"
                    ) from None
                raise

    @contextlib.contextmanager
    def _out_of_memory_as_user_error(self, tokens_BT: Tensor) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"the GPU ran out of memory running {self.name} on {list(tokens_BT.shape)} tokens; "
                "lower --batch-size"
            ) from None


def load_model(
    name: str, *, revision: str | None = None, device: str | torch.device = "cpu", dtype: str = "fp32"
) -> Model:
    """Load a causal language model for inference.

    ``name`` is 'demo', 'smollm2', a local Hugging Face folder, or a hub name. Weights are read from
    safetensors only, and no code of the model's repository runs. ``dtype`` ('fp32', 'bf16', 'fp16') is the
    type that the model computes in.

    >>> model = sb.load_model("demo")
    >>> model.n_layers, model.d_model
    (4, 256)

    Raises:
        UserError: no such model, missing or damaged files, a tokenizer with ids outside the model's
            vocabulary, a model that is not causal or that TransformerLens does not know, or too little GPU
            memory.
    """
    info = peek_model(name, revision=revision)
    tokens = open_tokenizer(info)
    folder = fetch_weights(info)
    bridge = load_bridge(str(folder), name, torch.device(device), _DTYPES[dtype])
    if getattr(bridge.cfg, "attention_dir", "causal") != "causal":
        raise UserError(
            f"model {name} is not causal (its attention is bidirectional); give a causal language model"
        )
    return Model(info, bridge, tokens)


def _stop_here(value: Tensor, hook_point: object = None, **_: object) -> None:
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    raise StopAtLayerException(value)
