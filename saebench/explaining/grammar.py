"""The grammar of rules: a JSON description of the tokens on which a latent fires, and its evaluation.

A rule is an OR of terms, a term is an AND of atoms:

    {"version": 1, "any": [{"all": [ATOM, ...]}, ...]}

    {"at": 0, "in": [262, 464]}   the token is one of these ids
    {"at": -1, "is": "number"}    the token before belongs to a class (CLASSES)
    {"at": 0, "word": "the"}      its text without white space around it, in lower case
    {"at": 0, "begins": "con"}    that text is longer than this and begins so
    {"at": 0, "ends": "ing"}      likewise, ends so
    {"position": [0, 3]}          its position in the context, 0-based, both ends included; null is no end
    {"repeated": true}            the same token stands earlier in the context

``at`` is 0 for the token itself, -1 and -2 for those before it in the context; where there is none, the atom
is false. `apply_rule` is the definition; token_index.py computes the same over a whole corpus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from saebench.core.errors import UserError
from saebench.store.text import token_text

VERSION = 1
OFFSETS = (0, -1, -2)
Atom = dict[str, Any]
Rule = dict[str, Any]

CLASSES = {
    "number": r"\s*\d+",
    "year": r"\s*(1[5-9]|20)\d\d",
    "punctuation": r"\s*[^\w\s]+",
    "end of sentence": r"\s*[.!?]+[\"'\u201d\u2019)\]]*\s*",
    "comma": r"\s*,",
    "opening bracket or quote": r"\s*[(\[{<\"'\u201c\u2018]+",
    "white space": r"\s+",
    "line break": r"[^\n]*\n[\s\S]*",
    "capitalised": r"\s*[A-Z][a-z]*",
    "upper case": r"\s*[A-Z]{2,}",
    "lower case": r"\s*[a-z]+",
    "start of a word": r"\s+\w+",
    "continuation of a word": r"[a-z]+",
    "single letter": r"\s*[A-Za-z]",
    "not ASCII": r"[\s\S]*[^\x00-\x7f][\s\S]*",
    "special": r"<[|/]?\w+[|]?>",
}
"""Name -> regular expression that the whole text of a token matches. A change makes a new VERSION."""

AFFIXES = {"begins": (3,), "ends": (2, 3)}
"""Lengths of the prefixes and suffixes that induction tries; rules may have any length."""


def word_of(text: str) -> str:
    return text.strip().lower()


def text_of(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def apply_rule(rule: Rule, tokens: Sequence[int], vocab: Sequence[bytes]) -> list[bool]:
    """Whether the rule holds at each token of one context, given whole and from its position 0.

    >>> rule = {"version": 1, "any": [{"all": [{"at": -1, "word": "the"}]}]}
    >>> apply_rule(rule, [0, 1, 0], [b" The", b" cat"])
    [False, True, False]
    """
    check_rule(rule)
    return [
        any(all(_holds(atom, tokens, at, vocab) for atom in term["all"]) for term in rule["any"])
        for at in range(len(tokens))
    ]


def _holds(atom: Atom, tokens: Sequence[int], at: int, vocab: Sequence[bytes]) -> bool:
    if "position" in atom:
        low, high = atom["position"]
        return (low is None or at >= low) and (high is None or at <= high)
    if "repeated" in atom:
        return tokens[at] in tokens[:at]
    at += atom["at"]
    if at < 0:
        return False
    if "in" in atom:
        return bool(tokens[at] in atom["in"])
    return holds_for_text(atom, text_of(vocab[tokens[at]]))


def holds_for_text(atom: Atom, text: str) -> bool:
    """Whether an atom about the text of one token holds."""
    if "is" in atom:
        return re.fullmatch(CLASSES[atom["is"]], text) is not None
    word = word_of(text)
    if "word" in atom:
        return bool(word == atom["word"])
    if "begins" in atom:
        return len(word) > len(atom["begins"]) and word.startswith(atom["begins"])
    return len(word) > len(atom["ends"]) and word.endswith(atom["ends"])


def check_rule(rule: Any) -> None:
    """Raise a UserError when ``rule`` does not follow this grammar."""
    try:
        if rule["version"] != VERSION:
            raise UserError(
                f"the rule has version {rule['version']!r} and this saebench knows {VERSION}; "
                "install a newer saebench or explain again"
            )
        valid = set(rule) == {"version", "any"} and all(
            set(term) == {"all"} and term["all"] and all(map(_is_atom, term["all"])) for term in rule["any"]
        )
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(
            f"{json.dumps(rule, default=str)[:200]} is not a rule; see saebench.explaining.grammar"
        )


def _is_atom(atom: Atom) -> bool:
    kinds = set(atom) - {"at"}
    if len(kinds) != 1:
        return False
    kind = kinds.pop()
    value = atom[kind]
    if kind == "position":
        ends = [end is None or type(end) is int for end in value]
        return "at" not in atom and len(ends) == 2 and all(ends)
    if kind == "repeated":
        return "at" not in atom and value is True
    if atom.get("at") not in OFFSETS:
        return False
    if kind == "in":
        return isinstance(value, list) and all(type(token) is int for token in value)
    if kind == "is":
        return value in CLASSES
    return kind in ("word", "begins", "ends") and isinstance(value, str)


SHOWN_TOKENS = 5
_WHERE = {0: "on", -1: "after", -2: "two after"}


def describe(rule: Rule, vocab: Sequence[bytes]) -> str:
    """The rule in words: "fires on ' the' after punctuation"."""
    return "fires " + "; or ".join(_describe_term(term["all"], vocab) for term in rule["any"])


def _describe_term(atoms: list[Atom], vocab: Sequence[bytes]) -> str:
    parts = {offset: [_describe_atom(a, vocab) for a in atoms if a.get("at") == offset] for offset in OFFSETS}
    said = [f"{_WHERE[offset]} {' that is '.join(names)}" for offset, names in parts.items() if names]
    if not parts[0]:
        said.insert(0, "on what comes" if said else "on tokens")
    for atom in atoms:
        if "position" in atom:
            said.append(_describe_position(*atom["position"]))
        if "repeated" in atom:
            said.append("seen earlier in the context")
    return " ".join(said)


def _describe_atom(atom: Atom, vocab: Sequence[bytes]) -> str:
    if "in" in atom:
        names = [repr(token_text(vocab[token])) for token in atom["in"]]
        more = len(names) - SHOWN_TOKENS
        return ", ".join(names[:SHOWN_TOKENS]) + (f" and {more} more" if more > 0 else "")
    if "is" in atom:
        return str(atom["is"])
    if "word" in atom:
        return f"the word {atom['word']!r}"
    return f"words in {atom['begins']!r}-" if "begins" in atom else f"words in -{atom['ends']!r}"


def _describe_position(low: int | None, high: int | None) -> str:
    if low == high:
        return f"at position {low}"
    if low is None or low == 0:
        return f"up to position {high}"
    return f"from position {low}" if high is None else f"at positions {low} to {high}"
