"""Spreadsheets take no cell of an exported CSV file for a formula, and every character of it is visible."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.core.csv_text import FORMULA, as_csv, csv_cell, csv_line
from saebench.core.formatting import JOINERS, visible
from tests.layers import ROOT

TEXTS = st.text() | st.builds(
    str.__add__, st.sampled_from(["=", "+", "-", "@", "\t", "\r", "\n", ";=", '"', "\uff1d"]), st.text()
)


def is_clean(text: str) -> bool:
    return all(
        char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs") for char in text
    )


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_texts_come_back_visible_and_guarded(texts: list[str]) -> None:
    data = as_csv(pd.DataFrame({"text": pd.Series(texts, dtype=object), "=name": range(len(texts))}))
    head, *rows = csv.reader(io.StringIO(data.decode()))
    assert head == ["text", "'=name"]
    assert len(rows) == len(texts)
    for (cell, _), text in zip(rows, texts, strict=True):
        assert cell == "'" * text.startswith(FORMULA) + visible(text, spaces="kept")
        assert not cell.startswith(FORMULA)
        assert is_clean(cell)
    # Also where ; separates cells, nothing that begins one is computed.
    for row in csv.reader(io.StringIO(data.decode()), delimiter=";"):
        if ";" in "".join(texts):
            assert not any(cell.startswith(FORMULA) for cell in row[1:])


@given(
    st.lists(st.floats(allow_nan=False, width=64), min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
)
def test_numbers_stay_numbers(floats: list[float], integers: list[int]) -> None:
    n = min(len(floats), len(integers))
    frame = pd.DataFrame({"a": floats[:n], "b": integers[:n], "c": pd.array(integers[:n], dtype="Int64")})
    frame["d"] = pd.Series([Decimal(-1), -2.5, np.float32(-3), np.int8(-4)] * n, dtype=object).head(n)
    assert as_csv(frame) == frame.to_csv(index=False).encode()
    assert csv_line([-1, -2.5, math.inf, None, True]) == "-1,-2.5,inf,,True\n"


@pytest.mark.parametrize("value", [-1, 1.5, True, np.bool_(False), np.float32(-2), Decimal("-3")])
def test_a_number_is_not_changed(value: object) -> None:
    assert csv_cell(value) is value


def test_other_values_are_texts() -> None:
    frame = pd.DataFrame({
        "list": [[1, 2], None], "bytes": [b"=\xff", b"a;=b"], "none": [None, pd.NA],
        "time": pd.to_datetime(["2020-01-01", None]), "group": pd.Categorical(["-a", "b"]),
    })  # fmt: skip
    rows = list(csv.reader(io.StringIO(as_csv(frame).decode())))
    assert rows[1] == ["[1, 2]", "'=\\xff", "", "2020-01-01 00:00:00", "'-a"]
    assert rows[2] == ["", "a;=b", "", "", "b"]


def test_every_writer_of_csv_uses_this_one() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("saebench", "app", "data", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\.to_csv\(|csv\.(writer|DictWriter)", path.read_text("utf-8"))
    }
    assert found == {"saebench/core/csv_text.py"}
