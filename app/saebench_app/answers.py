"""What the model and the SAE compute for a text, kept for a while.

Frames are shared by all sessions: read them, never change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench_app.runs import Live, give_way, live, turn
from saebench_app.session import Here

if TYPE_CHECKING:
    import pandas as pd

    from saebench.analysis.attribution import Attribution
    from saebench.analysis.interventions import Steering

KEPT = 64
"""Answers of each kind."""
LONGEST_TEXT = 4000
"""Characters of a text: a URL must be able to hold it."""


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it: its ``pieces``, one per token; joined they are the text."""

    pieces: list[str]
    fires: pd.DataFrame
    """What `saebench.features_of` gives."""


def read(here: Here, text: str) -> Reading:
    """Which features fire where in ``text``.

    Raises:
        UserError: no run, an empty text, or one that is too long.
    """
    with turn():
        model = live(here)
        return _read(model, model.identity, text)


def compare(here: Here, a: str, b: str, *, keep_first: bool) -> pd.DataFrame:
    """See `saebench.compare_prompts`."""
    with turn():
        model = live(here)
        return _compare(model, model.identity, a, b, keep_first)


def attribute(here: Here, text: str, *, position: int, target: str, keep_first: bool) -> Attribution:
    """See `saebench.logit_attribution`; without a ``target``, of the model's prediction."""
    with turn():
        model = live(here)
        return _attribute(model, model.identity, text, position, target, keep_first)


def steer(
    here: Here, text: str, features: Sequence[int], *, on_token: Callable[[], object], **settings: Any
) -> Steering:
    """See `saebench.steer`; other pages may run the model between two of its tokens."""
    from saebench.analysis.interventions import steer as run

    def next_token() -> None:
        on_token()
        give_way()

    with turn():
        return run(text, features, **live(here).parts(), on_token=next_token, **settings)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _read(_model: Live, identity: str, text: str) -> Reading:
    from saebench.analysis.prompts import features_of
    from saebench.store.text import pieces

    prompt = _model.attached.read(text)
    vocab = _model.attached.vocab
    return Reading(pieces([vocab[id] for id in prompt.ids]), features_of(text, **_model.parts()))


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _compare(_model: Live, identity: str, a: str, b: str, keep_first: bool) -> pd.DataFrame:
    from saebench.analysis.prompts import compare_prompts

    return compare_prompts(a, b, **_model.parts(), keep_first=keep_first)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _attribute(
    _model: Live, identity: str, text: str, position: int, target: str, keep_first: bool
) -> Attribution:
    from saebench.analysis.attribution import logit_attribution

    return logit_attribution(
        text, **_model.parts(), target=target or None, position=position, keep_first=keep_first
    )
