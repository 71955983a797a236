"""Everything that saebench writes and answers is what version 0.1 wrote and answered, to the last bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compatibility.digests import (
    DIFFERENT,
    EQUAL,
    NOT_COMPARABLE,
    Digests,
    by_key,
    differences,
    digest_folder,
    why_not_comparable,
    without,
)

HERE = Path(__file__).parent
OF_VERSION_0_1 = HERE / "digests-0.1.json.xz"
CHANGED_ON_PURPOSE: dict[str, str] = {
    "exports/html/features.html texts": "headings of the groups of examples are worded anew",
    "answers/signatures.json decoder_map.neighbours": "now neighbors; the old keyword is still taken",
    "answers/signatures.json figures.decoder_scatter.colour": "now color; the old keyword is still taken",
    "answers/signatures.json SAE.phase.*": "now graph_key; architectures have it for the trainer alone",
    "answers/signatures.json SAE.look_for_dead.*": "now refresh_dead; it is there for the trainer alone",
    "answers/signatures.json SAE.project_gradients.*": "now part of the kernels' op adam_step; trainer alone",
    "answers/signatures.json train.hook": "now a tuple, for crosscoders; one name is still taken",
    "answers/signatures.json harvest.model": "now a tuple of models, which read the same tokens",
    "answers/signatures.json import_activations.hook": "now a tuple, one name for each array",
    "answers/signatures.json export_sae.out": "optional: the last of several paths stands for it",
    "answers/store-array.json examples.columns.acts": "an example of an array has the activation of its row",
    "answers/store-array.json examples.columns.pieces": "an example of an array names its row",
}
"""Pattern of ``FILE KEY`` -> why what is written or answered there is no longer that of version 0.1."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_output_equals_that_of_version_0_1() -> None:
    excepted = [word for pattern in CHANGED_ON_PURPOSE for word in ("--except", pattern)]
    command = [sys.executable, str(HERE / "digests.py"), "compare", str(OF_VERSION_0_1), *excepted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NOT_COMPARABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == EQUAL, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of each of the usual kinds, as a scenario leaves them."""
    import duckdb

    folder = tmp_path / "before"
    (folder / "store").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "commands").mkdir()
    manifest = {"generation": 1, "saes": [{"name": "a", "file": {"path": "gen-1/a", "sha256": "12"}}]}
    (folder / "store" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "runs" / "sessions.jsonl").write_text('{"seconds": 1.5}\n')
    (folder / "runs" / "metrics.jsonl").write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fvu": 0.25}\n')
    (folder / "runs" / "sae.safetensors").write_bytes(b"weights")
    (folder / "commands" / "index.json").write_text(json.dumps({"output": {"missing": {"logit": "no text"}}}))
    with duckdb.connect(str(folder / "store" / "a.duckdb")) as connection:
        connection.execute("CREATE TABLE feature AS SELECT * FROM (VALUES (2, 0.5), (1, 0.25)) t(feature, p)")
        connection.execute("CREATE TABLE meta AS SELECT 'k' AS key, '8' AS value")
    return folder


def compare(before: Path, change: object) -> tuple[list[str], list[str]]:
    """The differences that ``change(folder)`` makes to a copy of a folder."""
    after = before.with_name("after")
    shutil.copytree(before, after)
    change(after)  # type: ignore[operator]
    return differences(digest_folder(before), digest_folder(after))


def test_rows_in_another_order_and_a_new_checksum_of_a_store_are_no_difference(folder: Path) -> None:
    import duckdb

    def rewrite(after: Path) -> None:
        manifest = after / "store" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"12"', '"34"'))
        (after / "runs" / "sessions.jsonl").write_text('{"seconds": 2.5}\n')
        with duckdb.connect(str(after / "store" / "a.duckdb")) as connection:
            connection.execute("CREATE OR REPLACE TABLE feature AS SELECT * FROM feature ORDER BY feature")

    assert compare(folder, rewrite) == ([], [])


def test_a_changed_value_is_a_difference_that_names_file_and_key(folder: Path) -> None:
    import duckdb

    def edit(after: Path) -> None:
        metrics = after / "runs" / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("0.25", "0.2500001"))
        (after / "runs" / "sae.safetensors").write_bytes(b"weightz")
        with duckdb.connect(str(after / "store" / "a.duckdb")) as connection:
            connection.execute("UPDATE feature SET p = 0.75 WHERE feature = 2")
            connection.execute("UPDATE meta SET value = '9'")

    wrong, added = compare(folder, edit)
    assert [line.split(": ")[0] for line in wrong] == [
        "runs/metrics.jsonl fvu",
        "runs/sae.safetensors bytes",
        "store/a.duckdb feature.p DECIMAL(3,2)",
        "store/a.duckdb meta.k",
    ]
    assert added == []


def test_an_added_key_and_an_added_file_are_told_apart_from_differences(folder: Path) -> None:
    def add(after: Path) -> None:
        index = {"output": {"missing": {"logit": "no text"}, "hash": "ab"}}
        (after / "commands" / "index.json").write_text(json.dumps(index))
        (after / "runs" / "provenance.json").write_text("{}")

    wrong, added = compare(folder, add)
    assert wrong == []
    assert added == ["commands/index.json output.hash: added ('ab')", "runs/provenance.json : a new file"]
    assert by_key(added)[1] == "added, files: 1, runs/provenance.json ...: a new file"


def test_a_removed_key_and_a_removed_file_are_differences(folder: Path) -> None:
    def remove(after: Path) -> None:
        (after / "commands" / "index.json").write_text(json.dumps({"output": {"other": 1}}))
        (after / "runs" / "metrics.jsonl").unlink()

    wrong, _ = compare(folder, remove)
    assert wrong == [
        "commands/index.json output.missing.logit: removed (it was 'a sentence')",
        "runs/metrics.jsonl : the file is missing",
    ]


def test_another_wording_is_no_difference_but_a_missing_sentence_is(folder: Path) -> None:
    def reword(after: Path) -> None:
        said = {"output": {"missing": {"logit": "the cache has no text"}}}
        (after / "commands" / "index.json").write_text(json.dumps(said))

    assert compare(folder, reword) == ([], [])
    shutil.rmtree(folder.with_name("after"))

    def silence(after: Path) -> None:
        (after / "commands" / "index.json").write_text(json.dumps({"output": {"missing": {"logit": ""}}}))

    assert len(compare(folder, silence)[0]) == 1


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (1, True), (None, 0), ("1", 1), (0.1, 0.1 + 2**-56)])
def test_values_of_another_type_or_in_the_last_bit_are_different(old: object, new: object) -> None:
    before: Digests = {"a.json": {"key": old}}
    wrong, _ = differences(before, {"a.json": {"key": new}})
    assert len(wrong) == 1


def test_excepted_patterns_match_file_and_key() -> None:
    lines = ["a.json one.two: 1 -> 2", "b.json one: 1 -> 2", "c.json : the file is missing"]
    assert without(lines, ["a.json one.*", "c.json"]) == lines[1:2]


def test_digests_of_another_torch_are_not_compared() -> None:
    here = {"torch": "2.13.0", "capability": "AVX2", "processor": "one"}
    assert why_not_comparable(here, here | {"processor": "another of the same kind"}) is None
    assert "torch 2.13.0 there and 2.14.0 here" in str(why_not_comparable(here, here | {"torch": "2.14.0"}))


def test_compare_exits_at_once_with_2_where_rounding_may_differ(tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    file.write_text(json.dumps({"environment": {"torch": "0.1"}, "digests": {}}))
    command = [sys.executable, str(HERE / "digests.py"), "compare", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == NOT_COMPARABLE != DIFFERENT
    assert "torch 0.1 there" in done.stdout and len(done.stdout.splitlines()) == 1
