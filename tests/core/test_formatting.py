from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.formatting import ABSENT, CONTINUED, count, number, one_in, share, visible

JOINED = "👩\u200d👩\u200d👧 नमस्\u200dते שלום é ﷺ"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", " the"),
        ("\n\t", "↵⇥"),
        ("  ", "␣␣"),
        ("", CONTINUED),
        ("\x00\x1b", "␀␛"),
        ("\u202eevil\u2069", "⟨U+202E⟩evil⟨U+2069⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("<b>&lt;</b>", "<b>&lt;</b>"),
        (JOINED, JOINED),
    ],
)
def test_visible(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_spaces_get_a_sign_where_they_are_asked_for() -> None:
    assert visible(" a b  ", spaces="kept") == " a b  "
    assert visible(" a b  ", spaces="alone") == " a b  "
    assert visible(" a b  ", spaces="edges") == "␣a b␣␣"
    assert visible(" a\tb\n", spaces="all") == "·a⇥b⏎"
    assert visible("", spaces="kept") == visible("", spaces="all") == ""
    assert visible("", spaces="alone") == visible("", spaces="edges") == CONTINUED


@given(st.text())
@settings(deadline=None)
def test_nothing_invisible_or_reordering_is_left(text: str) -> None:
    left = {unicodedata.category(char) for char in visible(text) if char not in "\u200c\u200d"}
    assert not left & {"Cc", "Cf", "Zl", "Zp", "Cs"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1.0, "1.00"),
        (0.99996, "1.00"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.00123, "0.00123"),
        (1.234e-7, "1.23e-07"),
        (-0.195, "-0.195"),
        (None, ABSENT),
        (float("nan"), ABSENT),
        (float("inf"), "inf"),
    ],
)
def test_number(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_unpadded_numbers_have_no_trailing_zeros() -> None:
    assert [number(value, padded=False) for value in (0.5, 12.0, 1234.5, None)] == [
        "0.5",
        "12",
        "1,234",
        ABSENT,
    ]
    assert [share(value, padded=False) for value in (0.5, 1.0, None)] == ["50%", "100%", ABSENT]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.5, "50.0%"),
        (0.000123, "0.0123%"),
        (3.3e-6, "0.000330%"),
        (1e-9, "1.0e-07%"),
    ],
)
def test_share(value: float, expected: str) -> None:
    assert share(value) == expected


def test_counts_and_words() -> None:
    assert count(1234567) == "1,234,567"
    assert count(None) == ABSENT
    assert one_in(0.001) == "1 token in 1,000"
    assert one_in(0.4) == "1 token in 2.5"
    assert one_in(0) == "no token"
