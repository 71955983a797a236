from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from saebench.store.example_windows import bounds, distinct


@st.composite
def examples(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    start = draw(st.integers(0, 9))
    return {
        "tokens": tokens,
        "pieces": [str(t) for t in tokens],
        "start": start,
        "pos": start + draw(st.integers(0, len(tokens) - 1)),
    }


@given(st.lists(examples(), max_size=12), st.integers(0, 4))
def test_distinct_windows_keeps_first_of_each_in_order(rows: list[dict[str, Any]], window: int) -> None:
    def text(row: dict[str, Any]) -> tuple[int, ...]:
        first, end = bounds(row, window)
        assert first <= row["pos"] - row["start"] < end <= len(row["tokens"])
        assert window == 0 or end - first <= 2 * window + 1
        return tuple(row["tokens"][first:end])

    kept = distinct(rows, window)
    assert [text(row) for row in kept] == list(dict.fromkeys(map(text, rows)))
    assert all(row in rows for row in kept)
