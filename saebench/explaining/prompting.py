"""Prompts: versioned templates, the questions made from them, and parsing of the answers.

A prompt that is changed gets a new number. Each explanation in a store names the prompts it was made with.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from importlib import resources

from saebench.explaining.provider import Question
from saebench.explaining.sampling import Window
from saebench.store.text import pieces

EXPLAIN, DETECTION, FUZZING = "explain-1", "detection-1", "fuzzing-1"
EXPLANATION_TOKENS = 80
MOST_CHARACTERS = 400


def version() -> str:
    """Names of the prompts, and a hash of their text."""
    digest = hashlib.sha256("\0".join(_read(name) for name in (EXPLAIN, DETECTION, FUZZING)).encode())
    return f"{EXPLAIN} {DETECTION} {FUZZING} {digest.hexdigest()[:12]}"


def explain(windows: Sequence[Window], vocab: Sequence[bytes]) -> Question:
    """The question for an explanation of the windows, whose firings are marked."""
    shown = "\n".join(f"{i}. {one_line(marked(w, w.fires, vocab))}" for i, w in enumerate(windows, 1))
    return _question(EXPLAIN, yes_or_no=False, examples=shown)


def detection(explanation: str, window: Window, vocab: Sequence[bytes]) -> Question:
    """The question whether an explanation fits a window, without marks."""
    return _question(
        DETECTION, yes_or_no=True, explanation=explanation, text=one_line(marked(window, (), vocab))
    )


def fuzzing(explanation: str, window: Window, marks: Sequence[int], vocab: Sequence[bytes]) -> Question:
    """The question whether an explanation fits the marked tokens of a window."""
    text = one_line(marked(window, marks, vocab))
    return _question(FUZZING, yes_or_no=True, explanation=explanation, text=text)


def marked(window: Window, marks: Sequence[int], vocab: Sequence[bytes]) -> str:
    """The window's text, with the tokens at the positions ``marks`` between << and >>."""
    shown = pieces([vocab[token] for token in window.tokens])
    chosen = set(marks)
    return "".join(
        f"<<{piece}>>" if window.start + i in chosen else piece for i, piece in enumerate(shown)
    ).replace(">><<", "")


def one_line(text: str) -> str:
    """The text with each run of white space replaced by one space."""
    return " ".join(text.split())


def read_explanation(answer: str) -> str | None:
    """The explanation in an answer; None when there is none or it is longer than MOST_CHARACTERS."""
    found = re.search(r"(?:explanation|the feature responds to)\s*:?\s*(.+)", answer, re.IGNORECASE)
    lines = [line for line in answer.splitlines() if line.strip()]
    text = one_line(found[1] if found else lines[0] if lines else "").strip("\"' ")
    return text if 2 < len(text) <= MOST_CHARACTERS else None


def read_verdict(answer: str) -> bool | None:
    """True for yes, False for no, None for an answer that begins with neither."""
    found = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return found[1].lower() == "yes" if found else None


def _question(name: str, *, yes_or_no: bool, **values: str) -> Question:
    system, _, user = _read(name).partition("\n---\n")
    filled = string.Template(user).substitute(values).strip()
    return Question(system.strip(), filled, yes_or_no, 4 if yes_or_no else EXPLANATION_TOKENS)


def _read(name: str) -> str:
    return resources.files("saebench").joinpath("explaining", "prompts", f"{name}.txt").read_text("utf-8")
