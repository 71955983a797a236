"""Files that cannot be read as expected raise a UserError of one sentence, and never hang."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core import reading
from saebench.core.errors import UserError
from saebench.core.shapes import Count, Shape, Text


class Inner(Shape):
    rows: Count


class Thing(Shape):
    name: Text
    parts: list[Inner]


def deep(levels: int) -> bytes:
    return b"[" * levels + b"1" + b"]" * levels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"", "is damaged"),
        (b"1" * 5000, "is damaged"),
        (b"1e999", "not a number of JSON"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "not a number"),
        (deep(101), "nested too deeply"),
        (deep(200_000), "nested too deeply"),
        (b'{"a": 1, "b": {"x": 1, "x": 1}}', "key 'x' is there twice"),
    ],
)
def test_unreadable_json_raises_user_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"the thing .*x.json .*{message}"):
        reading.read_json(path, what="the thing")


def test_json_of_usual_depth_numbers_and_surrogates_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"deep": json.loads(deep(99)), "big": 10**400, "path": os.fsdecode(b"a\xff"), "inf": 1e308}
    path.write_text(json.dumps(value))
    assert reading.read_json(path, what="the thing") == value
    path.write_text("[NaN, -Infinity, 1e999]")
    assert str(reading.read_json(path, what="x", nonfinite=True)) == "[nan, -inf, inf]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"its content is \[\]"),
        ({"parts": []}, "has no name"),
        ({"name": 1, "parts": []}, "name is 1 and should be a valid string"),
        ({"name": "\ud800", "parts": []}, r"name is '.ud800' and"),
        ({"name": "x", "parts": [{"rows": 1}, {"rows": True}]}, "parts.1.rows is True"),
        ({"name": "x", "parts": [{"rows": 1.0}]}, "parts.0.rows is 1.0"),
        ({"name": "x", "parts": [{"rows": -1}]}, "rows is -1 and should be greater than or equal to 0"),
        ({"name": "x", "parts": [{"rows": 10**400}]}, "rows is 1000.* and should be less than"),
    ],
)
def test_values_of_another_kind_raise_user_error(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"the thing {path} is damaged: .*{message}") as caught:
        reading.read_json(path, what="the thing", shape=Thing)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_other_keys_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"name": "x", "parts": [{"rows": 1, "more": [2]}], "of a newer version": {"a": None}}
    path.write_text(json.dumps(value))
    assert reading.read_json(path, what="the thing", shape=Thing) == value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(JSON | st.fixed_dictionaries({"name": JSON, "parts": st.lists(st.fixed_dictionaries({"rows": JSON}))}))
@settings(deadline=None)
def test_every_value_is_accepted_or_refused_in_one_line(value: object) -> None:
    try:
        reading.check_shape(value, Thing, source="the thing")
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017 - either is right


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "device", "link"])
@pytest.mark.parametrize("read", [reading.read_json, reading.read_bytes, reading.read_text])
def test_special_files_are_refused_at_once(tmp_path: Path, monkeypatch, kind: str, read) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x")
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "x")
    reason = "Too many levels" if kind == "link" else f"because it is a {kind}"
    with pytest.raises(UserError, match=f"the thing x cannot be read .*{reason}"):
        read(path, what="the thing")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/y", os.fsdecode(b"\xff")])
def test_names_that_cannot_be_opened_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").touch()
    for read in (reading.read_bytes, reading.require_file):
        with pytest.raises(UserError, match=r"the thing .* (cannot be read|does not exist)") as caught:
            read(tmp_path / name, what="the thing")
        assert str(caught.value).isprintable()


def test_files_above_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than 1,073,741,824 bytes"):
        reading.read_json(path, what="the thing")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"not UTF-8 .* at byte 2"):
        reading.read_text(tmp_path / "x", what="the text")
