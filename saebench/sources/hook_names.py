"""What a TransformerLens hook name says: the layer that it is in, and the kind of activation."""

from __future__ import annotations

import difflib
import re

_IN_BLOCK = re.compile(r"blocks\.(\d+)\..+")
_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out|hook_in|hook_out)")
_BETWEEN_BLOCKS = re.compile(r"blocks\.\d+\.hook_(resid_(pre|post)|in|out)")
_RESID_MID = re.compile(r"blocks\.\d+\.hook_resid_mid")
_RARE = re.compile(
    r"blocks\.\d+\.(hook_(in|out|attn_in|mlp_in)|[a-z]\w*(\.\w+)*\.hook_\w+)"
    r"|hook_(embed|pos_embed|tokens)|(embed|pos_embed|ln_final|unembed|rotary_emb)\.hook_\w+"
)
_BEFORE_BLOCKS = ("embed.", "pos_embed.", "hook_embed", "hook_pos_embed")


def layer_of(hook: str) -> int | None:
    """The number of the block that ``hook`` is in; None for a hook before or after all blocks."""
    found = _IN_BLOCK.fullmatch(hook)
    return int(found[1]) if found else None


def layers_needed(hook: str) -> int | None:
    """How many blocks must run before ``hook`` is reached; None for all blocks and what follows them."""
    layer = layer_of(hook)
    if layer is not None:
        return layer + 1
    return 0 if hook.startswith(_BEFORE_BLOCKS) else None


def is_residual(hook: str) -> bool:
    """True when ``hook`` is the residual stream, or what is added to it: what the unembedding reads."""
    return _RESIDUAL.fullmatch(hook) is not None


def is_between_blocks(hook: str) -> bool:
    """True when all that follows ``hook`` depends on its activation and the token positions alone."""
    return _BETWEEN_BLOCKS.fullmatch(hook) is not None


def is_between_parts(hook: str) -> bool:
    """True for the residual stream between attention and MLP, which the skip connection reads as well."""
    return _RESID_MID.fullmatch(hook) is not None


def is_rare(hook: str) -> bool:
    """True for names that some models have; only the loaded model can tell."""
    return _RARE.fullmatch(hook) is not None


def unknown_hook(hook: str, known: list[str], model: str, what: str = "hook") -> str:
    """The error sentence for a ``hook`` (or module path) that ``model`` does not have."""
    near = difflib.get_close_matches(hook, known, n=3, cutoff=0.5) or [known[0], known[-1]]
    return f"--site {hook} is not a {what} of {model}; did you mean {' or '.join(near)}?"
