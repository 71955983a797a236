"""How token texts are made visible: what has no shape gets one, what could reorder a line is named.

Letters, marks, emoji and their joiners stay as they are. The page shows the result as text nodes.
"""

from __future__ import annotations

import unicodedata

GLYPHS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u00a0": "⍽"}
JOINERS = {"\u200c", "\u200d"}  # shape the letters and emoji around them

CONTINUED = "◌"
"""Stands for a token whose bytes end a character that an earlier token began."""


def visible(text: str, *, edges: bool = False) -> str:
    """``text`` with a sign for each line break, tab and control character, and names for bidi controls.

    With ``edges``, spaces at both ends are shown as well: a table cell has nothing beside them.
    """
    if text == "":
        return CONTINUED
    if edges or text.isspace():
        inner = text.strip(" ")
        before = len(text) - len(text.lstrip(" "))
        after = len(text) - len(inner) - before
        return "␣" * before + "".join(_sign(c) for c in inner) + "␣" * after
    return "".join(_sign(c) for c in text)


def _sign(char: str) -> str:
    if char in GLYPHS:
        return GLYPHS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return char
    return f"⟨U+{ord(char):04X}⟩"
