"""Model and load_model: a language model whose activations can be read and replaced.

A hook that families.py has for the model's architecture, and a module path, are read from the modules of
transformers (`NativePath`). All else goes through TransformerLens's bridge (`BridgePath`).

Shapes: B contexts, T positions, D width of a hook, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.heads import head_of
from saebench.sources.bridge import BridgePath, load_bridge, share_with_bridge
from saebench.sources.dispatch import Dispatcher, PathName
from saebench.sources.encoder import require_causal
from saebench.sources.gradients import contexts_at_once, gradients_of, summed_cross_entropy
from saebench.sources.hook_names import is_residual, layer_of
from saebench.sources.model_info import ModelInfo, fetch_weights, peek_model
from saebench.sources.native import EditFunction
from saebench.sources.native_path import NativePath
from saebench.sources.pretrained import load_causal_model
from saebench.sources.tokenizer import ModelTokenizer, open_tokenizer
from saebench.sources.unembedding import Readout, bridge_readout, native_readout, require_linear

__all__ = ["Model", "ModelInfo", "load_model", "peek_model"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Model:
    """A causal language model, for inference. Made by `load_model`.

    Hooks have TransformerLens names (blocks.2.hook_resid_post), or are module paths (model.layers.2.mlp, and
    model.layers.2.mlp:in for its input). The activations of several heads (attn.hook_z) are flattened to
    [B, T, n_heads * d_head]; blocks.2.attn.hook_z[3] are those of head 3 alone.
    """

    def __init__(
        self, info: ModelInfo, tokens: ModelTokenizer, native: NativePath, bridge: BridgePath
    ) -> None:
        self.info = info
        self.tokens = tokens
        self._native = native
        self._bridge_path = bridge
        self._dispatcher = Dispatcher(info, native, bridge)

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
    def module(self) -> Any:
        """The model of transformers. TransformerLens's bridge, where it is needed, shares its weights."""
        return self._native.module if self.info.family else self._bridge_path.bridge.original_model

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.module.parameters())
        return parameter.device

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for, ``vocab_size`` of them."""
        return self.tokens.bytes()

    def hook_names(self) -> list[str]:
        """All TransformerLens names that the model has."""
        return self._dispatcher.hook_names()

    def check_hook(self, hook: str) -> None:
        """Raise a UserError, with the nearest names, when the model has no such hook."""
        self.path_of(hook)

    def path_of(self, hook: str) -> PathName:
        """'native' for a hook read from the modules of transformers, 'bridge' for one of TransformerLens.

        Raises:
            UserError: a hook that the model does not have.
        """
        self.info.check_hook(hook)
        return self._dispatcher.path_of(head_of(hook)[0])

    def hook_dim(self, hook: str) -> int:
        """Width of the activations at ``hook``, measured by running the model on two tokens."""
        return int(self.run_to(torch.zeros(1, 2, dtype=torch.long), [hook])[hook].shape[-1])

    def residual_hook(self, hook: str) -> bool:
        """True when ``hook`` is the residual stream, or what is added to it: what the unembedding reads."""
        if head_of(hook)[1] is not None:
            return False
        hook = self._native.hook_name(hook)
        if self.info.family is not None and self.info.family.post_norm:  # later blocks normalize the stream
            return hook.endswith("hook_resid_post") and layer_of(hook) == self.n_layers - 1
        return is_residual(hook)

    @torch.no_grad()
    def run_to(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Activations [B, T, D] at ``hooks``; layers after the last one needed are not computed.

        Raises:
            UserError: an unknown hook, or one that does not give one vector per token (attention patterns).
        """
        found: dict[str, Tensor] = {}
        with self._on_device(tokens_BT) as tokens_BT:
            for path, own in self._dispatcher.by_path(self._whole(hooks)):
                found |= path.read(tokens_BT, own)
        return {hook: self._per_token(hook, found, tokens_BT) for hook in hooks}

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, *, edit: Mapping[str, EditFunction] | None = None) -> Tensor:
        """Logits [B, T, V]; each function in ``edit`` replaces the activations [B, T, D] at its hook.

        Raises:
            UserError: an unknown hook, or edits at a module path and at a hook that only TransformerLens has.
        """

        def flat(function: EditFunction) -> EditFunction:
            def edited(value: Tensor) -> Tensor:
                return function(_flat(value, tokens_BT)).to(value.dtype).reshape(value.shape)

            return edited

        whole: dict[str, EditFunction] = {}
        for hook, function in (edit or {}).items():
            place, head = head_of(hook)
            if head is not None:
                function = _of_head(function, self._columns(hook), before=whole.get(place))
            whole[place] = function
        self._whole(edit or ())
        edits = {hook: flat(function) for hook, function in whole.items()}
        with self._on_device(tokens_BT) as tokens_BT:
            return self._dispatcher.path_for(list(edits)).logits(tokens_BT, edits)

    @torch.no_grad()
    def variants(self, tokens_1T: Tensor, hook: str, x_FTD: Tensor) -> Tensor:
        """Logits [F, T, V] of one context, with its activations at ``hook`` replaced by each of ``x_FTD``.

        At a residual stream hook between blocks the model runs once up to the hook, and F times after it.
        """
        if head_of(hook)[1] is None:
            with self._on_device(tokens_1T) as tokens_1T:
                logits_FTV = self._dispatcher.path_for([hook]).variants(tokens_1T, hook, x_FTD)
            if logits_FTV is not None:
                return logits_FTV
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
        activations: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for path, own in self._dispatcher.by_path(self._whole(hooks)):
            with torch.enable_grad(), self._on_device(tokens_BT) as moved_BT:
                logits_BTV, found = path.tracked_logits(moved_BT, own)
                activations |= {hook: self._per_token(hook, found, tokens_BT) for hook in own}
                loss = summed_cross_entropy(logits_BTV, tokens_BT, length_B) if of is None else of(logits_BTV)
                del logits_BTV
                gradients |= gradients_of(loss, found)
        for hook in self._whole(hooks):
            if hook not in gradients:
                raise UserError(
                    f"the predictions of {self.name} do not depend on --site {hook}, so it has no gradient; "
                    "choose another hook"
                )
        return (
            {hook: self._per_token(hook, activations, tokens_BT).detach() for hook in hooks},
            {hook: self._per_token(hook, gradients, tokens_BT) for hook in hooks},
        )

    def _whole(self, hooks: Iterable[str]) -> list[str]:
        """The hooks of all heads for those of one; raises a UserError for a head that there is not."""
        for hook in hooks:
            if head_of(hook)[1] is not None:
                self.info.check_hook(hook)
        return list(dict.fromkeys(head_of(hook)[0] for hook in hooks))

    def _columns(self, hook: str) -> slice:
        """The columns of the head that ``hook`` names among those of all heads."""
        _, head = head_of(hook)
        assert head is not None
        return slice(head * self.info.d_head, (head + 1) * self.info.d_head)

    def _per_token(self, hook: str, values: Mapping[str, Tensor], tokens_BT: Tensor) -> Tensor:
        """The value at ``hook`` as [B, T, D]; raises a UserError when it is not one vector per token."""
        whole, head = head_of(hook)
        if head is not None:
            return self._per_token(whole, values, tokens_BT)[..., self._columns(hook)]
        value = values.get(hook)
        if value is None:
            raise UserError(f"--site {hook} was not reached in a forward pass of {self.name}; choose another")
        if not _is_per_token(value, tokens_BT):
            raise UserError(
                f"--site {hook} has shape {list(value.shape)} for {list(tokens_BT.shape)} tokens; "
                "choose a hook with one vector per token"
            )
        return _flat(value, tokens_BT)

    @cached_property
    def _readout(self) -> Readout:
        if self.info.family is not None:
            return native_readout(self._native)
        return bridge_readout(self._bridge_path.bridge, self.name)

    def final_scale(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] float32: the number that the final norm divides by, the s of `unembedding`.

        It is the standard deviation of the residual stream (LayerNorm) or its root mean square (RMSNorm),
        with the norm's epsilon; 1 for a model without a final norm.
        """
        hook = self._last_hook()
        return self._readout.scale(self.run_to(tokens_BT, [hook])[hook])

    def _last_hook(self) -> str:
        return (
            f"blocks.{self.n_layers - 1}.hook_resid_post"
            if self._readout.norm is None
            else "ln_final.hook_in"
        )

    @torch.no_grad()
    def unembedding(self, *, before_cap: bool = False) -> Tensor:
        """The direct effect of a residual stream direction on the logits, [d_model, V] float32 on the CPU.

        A direction d in the residual stream adds d @ U / s to the logits, where s is the scale of the final
        norm in that context (see `final_scale`) and

            U = c C diag(w) W_U, minus its mean over the vocabulary.

        w is the gain of the final norm. C subtracts the mean over d_model when that norm is a LayerNorm, and
        is the identity for RMSNorm. c is the model's own factor of its logits (Cohere, Granite), 1 in most.
        Subtracting the mean over the vocabulary changes no probability. With ``before_cap`` the logits are
        those before a soft cap (Gemma 2), which keeps their order.

        Raises:
            UserError: a model whose logits are not linear in the residual stream given s: one with a soft
                cap, without ``before_cap``; found out by running it on a few tokens.
        """
        readout = self._readout
        U_DV = readout.unembedding()
        if readout.soft_cap is None:
            tokens_1T = torch.arange(min(8, self.vocab_size))[None]
            hook = self._last_hook()
            x_1TD = self.run_to(tokens_1T, [hook])[hook]
            require_linear(U_DV, readout, x_1TD[0], self.logits(tokens_1T)[0], self.name)
        elif not before_cap:
            raise UserError(
                f"{self.name} caps its logits at {readout.soft_cap:g}, so they are not linear in the "
                "residual stream; use what runs the model instead, such as attribution by='gradient'"
            )
        return U_DV

    @contextlib.contextmanager
    def _on_device(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The tokens as the model reads them; says which setting to lower when memory runs out."""
        try:
            yield tokens_BT.to(self.device, torch.long)
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
    require_causal(info)
    tokens = open_tokenizer(info)
    folder, place, type_ = str(fetch_weights(info)), torch.device(device), _DTYPES[dtype]
    native = NativePath(name, info.family, lambda: load_causal_model(folder, name, place, type_))
    if info.family is not None:
        bridge = BridgePath(name, lambda: share_with_bridge(native.module, folder, name))
        config = native.module.config.get_text_config()
        causal = not getattr(config, "use_bidirectional_attention", False)
    else:
        bridge = BridgePath(name, lambda: load_bridge(folder, name, place, type_))
        causal = getattr(bridge.bridge.cfg, "attention_dir", "causal") == "causal"
    if not causal:
        raise UserError(
            f"model {name} is not causal (its attention is bidirectional); give a causal language model"
        )
    return Model(info, tokens, native, bridge)


def _is_per_token(value: Tensor, tokens_BT: Tensor) -> bool:
    """True for [B, T, ...] and for [B * T, D], which OPT's MLP reads."""
    fits = value.ndim >= 3 and value.shape[:2] == tokens_BT.shape
    return value.is_floating_point() and (fits or (value.ndim == 2 and len(value) == tokens_BT.numel()))


def _of_head(function: EditFunction, columns: slice, before: EditFunction | None) -> EditFunction:
    """An edit of all heads [B, T, D] that is ``before`` and then ``function`` of the columns of one head."""

    def edited(value_BTD: Tensor) -> Tensor:
        value_BTD = value_BTD.clone() if before is None else before(value_BTD).clone()
        value_BTD[..., columns] = function(value_BTD[..., columns]).to(value_BTD)
        return value_BTD

    return edited


def _flat(value: Tensor, tokens_BT: Tensor) -> Tensor:
    """[B, T, heads, ...] or [B * T, D] -> [B, T, D]."""
    if value.ndim == 2:
        return value.view(*tokens_BT.shape, -1)
    return rearrange(value, "b t ... -> b t (...)")
