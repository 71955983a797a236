"""Text for harvesting: where documents come from, and which of them are held out."""

from __future__ import annotations

import hashlib

HELD_OUT_ONE_IN = 20


def is_held_out(text: str) -> bool:
    """True for the one document in 20 that neither a demo model nor an SAE is trained on.

    The choice is a hash of the document's own bytes, so it is the same in every cache, on every
    machine and in whatever order documents are read: 8 bytes of SHA-256 of the UTF-8 text, as a
    big-endian integer, divisible by 20.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
