"""Names of sites that are one attention head: blocks.0.attn.hook_z[3]."""

from __future__ import annotations

import re

_ONE_HEAD = re.compile(r"(.+\.attn\.hook_[qkvz])\[(\d+)\]")


def head_of(hook: str) -> tuple[str, int | None]:
    """``(blocks.0.attn.hook_z, 3)`` for blocks.0.attn.hook_z[3]; ``(hook, None)`` for all other names."""
    found = _ONE_HEAD.fullmatch(hook)
    return (found[1], int(found[2])) if found else (hook, None)
