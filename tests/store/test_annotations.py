"""Annotations: concurrent writers, indexing again, import and export, invalid input and damaged files."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.store import check_store, open_store
from saebench.store.annotation_file import FILE, LONGEST_COMMENT, LONGEST_LABEL, TABLES
from saebench.store.annotations import Annotations
from tests.store.small_store import D_SAE, build_small_store

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=40)
SAID = TEXT.filter(lambda text: text.strip() and len(text.splitlines()) == 1)
FEATURE = st.integers(0, D_SAE - 1)


@pytest.fixture
def notes(tmp_path):
    return Annotations(tmp_path, "a" * 64, d_sae=D_SAE, author="Ada")


def everything(notes):
    content = notes.export_json()
    return {table: content[table] for table in TABLES}


actions = st.one_of(
    st.tuples(st.just("label"), FEATURE, SAID | st.just("")),
    st.tuples(st.just("bookmark"), FEATURE, st.booleans()),
    st.tuples(st.just("comment"), FEATURE, SAID),
    st.tuples(st.just("list"), FEATURE, st.sampled_from("xy")),
    st.tuples(st.just("unlist"), FEATURE, st.sampled_from("xy")),
    st.tuples(st.just("view"), SAID, st.text("abc&=%?", max_size=20)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(actions, max_size=25))
def test_annotations_read_back_equal_plain_dictionaries(tmp_path_factory, steps):
    """Random actions are compared with plain dictionaries, read through another object on the same file."""
    path = tmp_path_factory.mktemp("notes")
    notes = Annotations(path, "a" * 64, d_sae=D_SAE)
    labels, bookmarks, comments, lists, views = {}, set(), [], {"x": [], "y": []}, {}
    for kind, one, two in steps:
        if kind == "label":
            notes.set_label(one, two)
            labels.pop(one, None)
            if two:
                labels[one] = two
        elif kind == "bookmark":
            notes.bookmark(one, two)
            (bookmarks.add if two else bookmarks.discard)(one)
        elif kind == "comment":
            notes.comment(one, two)
            comments.append((one, two))
        elif kind == "list":
            notes.add_to_list(two, one)
            if one not in lists[two]:
                lists[two].append(one)
        elif kind == "unlist":
            notes.remove_from_list(two, one)
            if one in lists[two]:
                lists[two].remove(one)
        else:
            notes.save_view(one, two)
            views[one] = two
    again = Annotations(path, "a" * 64, d_sae=D_SAE)
    found = again.labels()
    assert dict(zip(found["feature"], found["label"], strict=True)) == labels
    assert {i: again.label(i) for i in range(D_SAE) if again.label(i) is not None} == labels
    assert again.bookmarks()["feature"].tolist() == sorted(bookmarks)
    said = again.comments()
    assert list(zip(said["feature"], said["comment"], strict=True)) == comments
    filled = {name: features for name, features in lists.items() if features}
    assert {name: again.list_features(name) for name in again.lists()["name"]} == filled
    assert again.lists()["n_features"].tolist() == [len(filled[name]) for name in sorted(filled)]
    saved = again.views()
    assert dict(zip(saved["name"], saved["query"], strict=True)) == views
    assert everything(Annotations(path, "b" * 64)) == everything(again)
    assert Annotations(path, "b" * 64).labels().empty

    copy = Annotations(tmp_path_factory.mktemp("copy"), "c" * 64)
    n = copy.import_json(again.export_json())
    assert n == sum(map(len, everything(again).values()))
    assert everything(copy) == everything(again)
    assert copy.import_json(json.loads(json.dumps(again.export_json()))) == 0


TIMES = st.sampled_from([f"2026-01-0{day}T00:00:00.000000Z" for day in (1, 2, 3)])


def exports(label):
    one = {"sae": st.sampled_from("st"), "feature": st.integers(0, 2), "author": st.just(""), "time": TIMES}
    return st.builds(
        lambda labels, marks: {
            "format": "saebench annotations",
            "format_version": 1,
            "labels": labels,
            "bookmarks": marks,
        },
        st.lists(st.fixed_dictionaries({**one, "label": label}), max_size=6),
        st.lists(st.fixed_dictionaries(one), max_size=3),
    )


@settings(max_examples=25, deadline=None)
@given(exports(st.sampled_from("ab")), exports(st.sampled_from("ab")))
def test_import_keeps_newer_label_in_any_order(tmp_path_factory, first, second):
    there = Annotations(tmp_path_factory.mktemp("there"), "s")
    back = Annotations(tmp_path_factory.mktemp("back"), "s")
    for notes, order in ((there, (first, second)), (back, (second, first))):
        for content in order:
            notes.import_json(content)
    assert everything(there)["labels"] == everything(back)["labels"]
    newest = {}
    for entry in first["labels"] + second["labels"]:
        key = entry["sae"], entry["feature"]
        newest[key] = max(newest.get(key, ("", "")), (entry["time"], entry["label"]))
    found = {(e["sae"], e["feature"]): (e["time"], e["label"]) for e in everything(there)["labels"]}
    assert found == newest


def write(path, number, barrier, n):
    notes = Annotations(path, "a" * 64, author=f"writer {number}")
    barrier.wait()
    for i in range(n):
        notes.comment(i % 7, f"{number}:{i}")
        notes.add_to_list("shared", 100 * number + i)
        notes.set_label(i, f"{number}")


def test_concurrent_writers_lose_no_annotation(tmp_path):
    """The file does not exist at the start, so the writers also compete to create it."""
    n, context = 25, multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=write, args=(tmp_path, k, barrier, n)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 3
    notes = Annotations(tmp_path, "a" * 64)
    assert set(notes.comments()["comment"]) == {f"{k}:{i}" for k in range(3) for i in range(n)}
    assert sorted(notes.list_features("shared")) == [100 * k + i for k in range(3) for i in range(n)]
    assert notes.labels()["feature"].tolist() == list(range(n))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_sigkill_in_transaction_leaves_annotations_unchanged(tmp_path):
    notes = Annotations(tmp_path, "a")
    notes.set_label(1, "kept")
    child = os.fork()
    if child == 0:
        with notes._file.writing() as connection:
            connection.execute("DELETE FROM labels")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert notes.label(1) == "kept"
    notes.set_label(1, "changed")
    assert notes.label(1) == "changed"


def test_annotations_follow_weights_when_store_is_indexed_again(tmp_path):
    store = build_small_store(tmp_path / "store")
    with open_store(store) as opened:
        opened.annotations.set_label(3, "said of the first weights")
        opened.annotations.add_to_list("mine", [3, 1])
        first = opened.info()["sae_hash"]
    build_small_store(store, seed=1)  # other weights under the same name
    build_small_store(store, name="again")  # the first weights under another name
    with open_store(store, "small") as opened:
        assert opened.info()["sae_hash"] != first
        assert opened.annotations.label(3) is None
        opened.annotations.set_label(3, "said of the others")
    with open_store(store, "again") as opened:
        assert opened.annotations.label(3) == "said of the first weights"
    build_small_store(store)  # and back
    with open_store(store, "small") as opened:
        assert opened.annotations.label(3) == "said of the first weights"
        assert opened.annotations.list_features("mine") == [3, 1]
        listed = opened.features(["feature"], among=opened.annotations.list_features("mine"))
        assert listed["feature"].tolist() == [1, 3]
    assert check_store(store) == []


def test_reading_and_removing_create_no_file(tmp_path):
    notes = Annotations(tmp_path, "a")
    assert notes.label(0) is None
    for table in (notes.labels(), notes.bookmarks(), notes.comments(), notes.lists(), notes.views()):
        assert table.empty
        assert len(table.columns) >= 3
    assert not any(everything(notes).values())
    notes.set_label(0, "")
    notes.bookmark(0, False)
    assert list(tmp_path.iterdir()) == []


def test_annotations_have_utc_time_and_author(notes):
    before = datetime.datetime.now(datetime.UTC)
    notes.set_label(0, "one")
    notes.bookmark(1, author="Bob")
    after = datetime.datetime.now(datetime.UTC)
    label = notes.labels().iloc[0]
    assert before <= datetime.datetime.fromisoformat(label["time"]) <= after
    assert (label["author"], notes.bookmarks()["author"][0]) == ("Ada", "Bob")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda n: n.set_label(D_SAE, "x"), f"feature {D_SAE} is not in the SAE; it has 0 to {D_SAE - 1}"),
        (lambda n: n.set_label(-1, "x"), "feature -1"),
        (lambda n: n.set_label("1", "x"), "feature '1'"),
        (lambda n: n.bookmark(1.5), r"feature 1\.5"),
        (lambda n: n.add_to_list("x", [1, 99]), "feature 99"),
        (lambda n: n.set_label(1, "x" * (LONGEST_LABEL + 1)), "label has 201 characters; it may have 200"),
        (lambda n: n.comment(1, "x" * (LONGEST_COMMENT + 1)), "comment has 10,001 characters"),
        (lambda n: n.comment(1, " \n"), "the comment is empty"),
        (lambda n: n.set_label(1, "two\nlines"), "the label has several lines"),
        (lambda n: n.set_label(1, "nul\x00"), "is not text"),
        (lambda n: n.set_label(1, "\ud800"), "is not text"),
        (lambda n: n.set_label(1, 5), "is not text"),
        (lambda n: n.add_to_list("", 1), "the name is empty"),
        (lambda n: n.save_view("x" * 101, ""), "name has 101 characters"),
        (lambda n: n.save_view("x", "q" * 4001), "query has 4,001 characters"),
        (lambda n: n.set_label(1, "x", author="y" * 101), "author has 101"),
        (lambda n: n.list_features("none"), "no list 'none'; there is none; make one with add_to_list"),
        (lambda n: n.remove_list("none"), "no list 'none'"),
        (lambda n: n.remove_view("none"), "no saved view 'none'"),
        (lambda n: n.remove_comment("none"), "no comment 'none'"),
        (lambda n: n.import_json({"format": "other"}), "not an export of annotations"),
        (lambda n: n.import_json("nowhere.json"), r"nowhere\.json does not exist"),
    ],
)
def test_invalid_input_raises_user_error_and_writes_nothing(notes, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(notes)
    assert not any(everything(notes).values())


GOOD = {"sae": "a", "feature": 1, "label": "good", "author": "", "time": "2026-01-01T00:00:00.000000Z"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [GOOD, GOOD | {"label": "x" * 201}]}, "label in .* has 201 characters"),
        ({"labels": [GOOD, GOOD | {"feature": "1"}]}, "feature '1' in .* is not the number"),
        ({"labels": [GOOD, GOOD | {"feature": -1}]}, "feature -1"),
        ({"labels": [GOOD, GOOD | {"time": "yesterday"}]}, "the time 'yesterday'"),
        ({"labels": [GOOD, GOOD | {"more": "x"}]}, "has not just sae, feature, label, author, time"),
        ({"labels": [GOOD, {"sae": "a"}]}, "has not just"),
        ({"labels": [GOOD], "views": {"a": 1}}, "'views' in .* is not a list"),
        ({"labels": [GOOD], "views": ["x"]}, "'views' in .* is not a list"),
        ({"labels": [GOOD], "format_version": 2}, "has format 2 and this saebench reads up to 1"),
        ({"labels": [GOOD], "format_version": None}, "has format None"),
    ],
)
def test_invalid_import_changes_nothing(notes, tmp_path, change, sentence):
    file = tmp_path / "export.json"
    file.write_text(json.dumps({"format": "saebench annotations", "format_version": 1} | change))
    with pytest.raises(UserError, match=sentence):
        notes.import_json(file)
    assert not any(everything(notes).values())


def test_exported_file_imports_to_equal_content(notes, tmp_path):
    notes.set_label(1, "emoji \N{GRINNING FACE} and </script>")
    notes.comment(2, "two\nlines")
    content = notes.export_json(tmp_path / "out.json")
    other = Annotations(tmp_path / "other", "b")
    with pytest.raises(UserError, match="other is not there"):
        other.import_json(tmp_path / "out.json")
    (tmp_path / "other").mkdir()
    assert other.import_json(tmp_path / "out.json") == 2
    assert other.export_json() == content


def broken(data, how):
    if how == "empty":
        return b""
    if how == "text":
        return b"this was an SQLite file once"
    if how == "header":
        return b"\0" * 100 + data[100:]
    if how == "half":
        return data[: len(data) // 2]
    return data[:4096] + b"\xff" * (len(data) - 4096)


@pytest.mark.parametrize("how", ["empty", "text", "header", "half", "pages"])
def test_damaged_file_raises_user_error_and_is_unchanged(notes, how):
    for i in range(20):
        notes.set_label(i, "x" * 150)
        notes.comment(i, "y" * 300)
    notes.path.write_bytes(broken(notes.path.read_bytes(), how))
    before = sha256_file(notes.path)
    for use in (
        notes.labels,
        notes.export_json,
        lambda: notes.set_label(1, "z"),
        lambda: notes.add_to_list("z", 1),
        lambda: notes.comment(3, "z"),
    ):
        with pytest.raises(UserError, match=r"damaged.*move (it|the file) away"):
            use()
    assert sha256_file(notes.path) == before


def test_newer_format_and_foreign_file_are_refused(notes):
    notes.set_label(1, "x")
    with sqlite3.connect(notes.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(UserError, match="have format 2 and this saebench reads up to 1; install a newer"):
        notes.label(1)
    notes.path.unlink()
    with sqlite3.connect(notes.path) as connection:
        connection.execute("CREATE TABLE labels (x)")
    connection.close()
    with pytest.raises(UserError, match="not a file of annotations"):
        notes.set_label(1, "y")


def test_locked_file_raises_user_error_for_writers_only(notes, monkeypatch):
    notes.set_label(1, "x")
    monkeypatch.setattr("saebench.store.annotation_file.BUSY_SECONDS", 0.05)
    with notes._file.writing():
        assert notes.label(1) == "x"  # readers do not wait
        with pytest.raises(UserError, match="another process has been writing"):
            notes.set_label(1, "y")
    notes.set_label(1, "y")
    assert notes.label(1) == "y"


@given(st.lists(FEATURE, unique=True, min_size=1), st.lists(FEATURE, unique=True), SAID)
@settings(max_examples=15, deadline=None)
def test_rename_list_merges_with_list_of_new_name(made, old, there, name):
    for one in made.lists()["name"]:
        made.remove_list(one)
    made.add_to_list("first", old)
    made.add_to_list(name, there)
    made.rename_list("first", name)
    assert made.lists()["name"].tolist() == [name]
    assert set(made.list_features(name)) == {*old, *there}
    with pytest.raises(UserError, match="no list"):
        made.rename_list("never made", "x")
    with pytest.raises(UserError, match="empty"):
        made.rename_list(name, " ")
    assert made.lists()["name"].tolist() == [name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Annotations(tmp_path_factory.mktemp("renamed"), "a" * 64, d_sae=D_SAE)


def test_add_to_list_accepts_columns_arrays_and_sets(notes):
    """Also a feature number from a row of floats."""
    import numpy as np
    import pandas as pd

    table = pd.DataFrame({"feature": [3, 1], "density": [0.5, 0.25]})
    for name, features in (
        ("column", table["feature"]),
        ("array", np.array([3, 1])),
        ("set", {3, 1}),
        ("cells", [row["feature"] for _, row in table.iterrows()]),
    ):
        notes.add_to_list(name, features)
        assert sorted(notes.list_features(name)) == [1, 3]
    for bad in (pd.Series([3, D_SAE]), np.array([0.5]), "3", None):
        with pytest.raises(UserError, match="is not in the SAE"):
            notes.add_to_list("bad", bad)
    assert "bad" not in notes.lists()["name"].tolist()
