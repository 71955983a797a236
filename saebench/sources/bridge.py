"""BridgePath: a language model read through TransformerLens's bridge, for sites that families.py has not.

Shapes: B contexts, T positions, D width of a hook, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saebench.core.errors import UserError
from saebench.sources.hook_names import is_between_blocks, is_between_parts, layers_needed
from saebench.sources.model_info import has_tokenizer
from saebench.sources.native import EditFunction
from saebench.sources.pretrained import architecture_of_type, errors_of_loading, load_pretrained

_SWITCHES = {"attn_in": "use_attn_in", "mlp_in": "use_hook_mlp_in"}
_SWITCHED_OFF = re.compile(r"Cannot add hook (\S+) because (\S+) is False")

Listener = tuple[str, Callable[..., Any]]


class BridgePath:
    """Reads and replaces activations at TransformerLens hooks.

    ``load`` makes the bridge when it is first needed. ``name`` is what error sentences call the model.
    """

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self._load = load

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge."""
        return self._load()

    def names(self) -> list[str]:
        return list(self.bridge.hook_dict)

    def is_stand_in(self, hook: str) -> bool:
        """True for neurons of a mixture of experts: the bridge gives the MLP's input or output instead."""
        points, mlp = self.bridge.hook_dict, hook.rpartition(".")[0]
        others = (f"{mlp}.hook_in", f"{mlp}.hook_out") if mlp.endswith("mlp") else ()
        return any(other != hook and points.get(other) is points[hook] for other in others)

    def read(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """The value at each hook that is reached; layers after the last one needed are not computed."""
        found: dict[str, Tensor] = {}
        n_layers = self.bridge.cfg.n_layers
        layers = [layers_needed(hook) for hook in hooks]
        stop = None if None in layers else max(layer for layer in layers if layer is not None)
        listeners = [(hook, _keep(hook, found)) for hook in hooks]
        if stop == n_layers:  # the bridge can only stop before a layer, and none follows the last
            stop = None
            if "ln_final.hook_in" in self.bridge.hook_dict:
                listeners.append(("ln_final.hook_in", _stop_here))
        self._run(tokens_BT, listeners, return_type=None, stop_at_layer=stop)
        return found

    def logits(self, tokens_BT: Tensor, edits: Mapping[str, EditFunction]) -> Tensor:
        """Logits [B, T, V]; each function replaces the activations at its hook."""

        listeners = self._replacing(edits)
        logits_BTV: Tensor = self._run(tokens_BT, listeners, return_type="logits", stop_at_layer=None)
        return logits_BTV

    def variants(self, tokens_1T: Tensor, hook: str, x_FTD: Tensor) -> Tensor | None:
        """Logits [F, T, V] with one pass up to the hook; None where the model cannot branch at it."""
        if not is_between_blocks(hook):
            return None

        def branch(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
            return x_FTD.to(value)

        logits_FTV: Tensor = self._run(tokens_1T, [(hook, branch)], return_type="logits", stop_at_layer=None)
        return logits_FTV if len(logits_FTV) == len(x_FTD) else None

    def tracked_logits(self, tokens_BT: Tensor, hooks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, T, V], and the value at each hook as a tensor of their graph."""
        found: dict[str, Tensor] = {}

        def track(hook: str) -> EditFunction:
            def tracked(value: Tensor) -> Tensor:
                if not value.is_floating_point():
                    found[hook] = value
                    return value
                # A new tensor, so that only what reads the hook counts.
                found[hook] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
                return found[hook]

            return tracked

        listeners = self._replacing({hook: track(hook) for hook in hooks})
        return self._run(tokens_BT, listeners, return_type="logits", stop_at_layer=None), found

    def _replacing(self, edits: Mapping[str, EditFunction]) -> list[Listener]:
        """Listeners that replace the value at each hook by what its function returns."""

        def replace(hook: str, function: EditFunction) -> Callable[..., Tensor]:
            def listener(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
                new = function(_one_head(hook, value)).to(value.dtype)
                return _for_each_head(hook, new, value)

            return listener

        at_once = [(hook, replace(hook, edit)) for hook, edit in edits.items() if not is_between_parts(hook)]
        after = [self._replacing_mid(hook, edit) for hook, edit in edits.items() if is_between_parts(hook)]
        return [*at_once, *(listener for listeners in after for listener in listeners)]

    def _replacing_mid(self, hook: str, edit: EditFunction) -> list[Listener]:
        """Replaces hook_resid_mid, x + attn_out, by changing attn_out.

        The bridge shows it as the input of the MLP's norm, but the skip connection reads it as well, and not
        in every architecture the same tensor.
        """
        block = hook.removesuffix("hook_resid_mid")
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook_point: object = None, **_: object) -> None:
            seen["before"] = value

        def replace(value: Tensor, hook_point: object = None, **_: object) -> Tensor:
            seen["mid"] = edit(seen["before"] + value).to(value.dtype)
            return seen["mid"] - seen["before"]

        def check(value: Tensor, hook_point: object = None, **_: object) -> None:
            mid = seen.get("mid")
            difference = None if mid is None else (value.reshape(mid.shape) - mid).detach().float().norm()
            if mid is None or difference > 0.02 * mid.detach().float().norm():
                raise UserError(
                    f"--site {hook} of {self.name} is not the sum of hook_resid_pre and hook_attn_out, so "
                    "saebench cannot replace it or take its gradient; choose one of those or hook_resid_post"
                )

        names = (block + "hook_resid_pre", block + "hook_attn_out", hook)
        return list(zip(names, (keep, replace, check), strict=True))

    def _run(self, tokens_BT: Tensor, listeners: list[Listener], **options: Any) -> Any:
        try:
            with self._switched_on([hook for hook, _ in listeners]):
                return self.bridge.run_with_hooks(tokens_BT, fwd_hooks=listeners, **options)
        except ValueError as error:
            if found := _SWITCHED_OFF.search(str(error)):
                raise UserError(
                    f"--site {found[1]} is computed only when TransformerLens sets {found[2]}, which "
                    "saebench does not; choose another"
                ) from None
            raise
        except RuntimeError as error:
            if "Original component not set" in str(error):  # such as a model without a final norm
                raise UserError(
                    f"{self.name} lacks a module that TransformerLens needs ({error}); give another model"
                ) from None
            raise

    @contextlib.contextmanager
    def _switched_on(self, hooks: Sequence[str]) -> Iterator[None]:
        """Sets what TransformerLens needs for hook_attn_in and hook_mlp_in, which it computes only then."""
        needed = {switch for end, switch in _SWITCHES.items() if any(hook.endswith(end) for hook in hooks)}
        for switch in needed:
            with contextlib.suppress(Exception):  # models without it; _run then says so
                getattr(self.bridge, f"set_{switch}")(True)
        try:
            yield
        finally:
            for switch in needed:
                getattr(self.bridge, f"set_{switch}")(False)


def share_with_bridge(module: nn.Module, folder: str, name: str) -> Any:
    """A TransformerBridge around a copy of ``module`` that shares its weights.

    Raises:
        UserError: a model that the bridge does not know.
    """
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    twin: Any = copy.deepcopy(module, shared)
    if not twin.config.architectures:
        twin.config.architectures = [type(module).__name__]
    return _boot(folder, name, hf_model=twin, device=next(module.parameters()).device)


def load_bridge(folder: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The TransformerBridge of the model in ``folder``, with frozen weights and without dropout.

    Raises:
        UserError: missing or damaged weights, a model that the bridge does not know, or too little GPU
            memory.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "model_class": _AllWeights(folder, name)}
    if architecture := architecture_of_type(folder):
        options["hf_config_overrides"] = {"architectures": [architecture]}
    return _boot(folder, name, **options)


def _boot(folder: str, name: str, **options: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with errors_of_loading(folder, name):
        if not has_tokenizer(Path(folder)):
            options["tokenizer"] = _placeholder_tokenizer()
        bridge = TransformerBridge.boot_transformers(folder, **options)
    bridge.eval()
    return bridge.requires_grad_(False)


def _placeholder_tokenizer() -> Any:
    """The bridge does not load without a tokenizer; a model without one reads token ids only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast  # it has no types
    return made(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))


class _AllWeights:
    """A stand-in for a transformers model class that refuses missing weights."""

    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._name = folder, name

    def from_pretrained(self, folder: str, **options: Any) -> Any:
        from transformer_lens.model_bridge.sources import transformers as source

        architecture = source.determine_architecture_from_hf_config(options["config"])  # type: ignore[no-untyped-call]
        real: Any = source.get_hf_model_class_for_architecture(architecture)
        return load_pretrained(real, folder, self._name, **options)


def _keep(hook: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def store(value: Tensor, hook_point: object = None, **_: object) -> None:
        found[hook] = _one_head(hook, value)

    return store


def _one_head(hook: str, value: Tensor) -> Tensor:
    """TransformerLens gives hook_attn_in as one equal copy [B, T, H, D] per head; one of them says all."""
    return value[:, :, 0] if hook.endswith("hook_attn_in") and value.ndim == 4 else value


def _for_each_head(hook: str, new: Tensor, value: Tensor) -> Tensor:
    if hook.endswith("hook_attn_in") and value.ndim == 4:
        return new[:, :, None].expand_as(value)
    return new


def _stop_here(value: Tensor, hook_point: object = None, **_: object) -> None:
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    raise StopAtLayerException(value)
