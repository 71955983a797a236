"""Digests of everything that saebench writes and answers, to prove that a change of the code changes none.

    python tests/compatibility/digests.py write before.json      # with the environment of the commit before
    python tests/compatibility/digests.py compare before.json    # with the environment of the commit after

Both run scenario.py with the saebench that is installed beside this Python, in a temporary folder
(``--keep FOLDER`` keeps it). ``compare`` prints the differences and exits with 1 if anything was changed or
removed, with 2 if the digests were written on a machine or with libraries that round otherwise. What was
only added, files or keys, is listed and does not fail; with ``--strict`` it does. ``--except PATTERN``
(repeatable, as in a shell) lets differences pass whose ``FILE KEY`` matches: those made on purpose.

A file of bytes has one digest. What has structure has a digest for every part, so that a difference names
the part: JSON by key, JSON lines and CSV by column, DuckDB, SQLite and Parquet by table and column (rows
sorted, since these files differ from run to run), HTML by numbers and texts.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import html.parser
import json
import lzma
import os
import platform
import re
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "SAEBENCH_CACHE": "unused",
    "COLUMNS": "160",
}
"""Set before anything is imported: one thread, no GPU, no hub, and the instructions that all x86-64
processors since 2013 have, so that sums are rounded in the same order on most of them. COLUMNS is the width
of help texts."""
SAME_ROUNDING = ("machine", "vendor", "capability", "torch", "numpy", "duckdb", "transformers")
"""Facts of the environment that must agree for numbers to be equal to the last bit."""

LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    ("*.lock", "*", "an empty file"),
    ("*/sessions.jsonl", "*", "times and speeds of the processes that worked on a run"),
    ("demo/demo.json", "seconds.*", "times"),
    ("demo/demo.json", "peak_memory_bytes", "depends on the machine"),
    ("commands/demo.json", "output.seconds.*", "times"),
    ("commands/demo.json", "output.peak_memory_bytes", "depends on the machine"),
    ("*store*/manifest.json", "*.bytes", "sizes of DuckDB files differ from run to run"),
    ("*store*/manifest.json", "*.sha256", "bytes of DuckDB files differ from run to run"),
    ("commands/store-info.json", "*bytes", "sizes of DuckDB files"),
    ("commands/store-export-*.json", "output.bytes", "the size of files that have digests of their own"),
    ("answers/store*.json", "compare.columns.bytes", "sizes of DuckDB files"),
    ("*/user.sqlite", "*.time", "a time"),
    ("*/user.sqlite", "*.id", "drawn at random"),
    ("answers/annotations.json", "*.time", "a time"),
    ("answers/annotations.json", "*.id", "drawn at random"),
    ("commands/assets.json", "*.path", "depends on where the package is installed"),
    *(
        (file, f"*provenance.{fact}", "differs between days, commits and machines")
        for file in ("commands/synth.json", "synth/results.json")
        for fact in ("commit", "date", "machine", "saebench", "torch")
    ),
    ("synth/results.md", "*", "the contents of results.json as text"),
)
"""Pattern of a file, pattern of a key, and why these are in no digest."""

SENTENCES: tuple[tuple[str, str], ...] = (
    ("*", "*missing.*"),
    ("*", "*left_out.*"),
    ("*", "*claims.*.claim"),
    ("*", "*claims.*.evidence"),
    ("commands/*.json", "output.notes"),
    ("commands/*.json", "output.warnings"),
    ("commands/*.json", "*.reason"),
    ("answers/*.json", "*.reason"),
    ("*.duckdb", "explanation.reason *"),
    ("*.parquet", "reason *"),
    ("answers/figures.json", "*.hovertemplate"),
    ("answers/figures.json", "compare.*.text"),
)
"""Pattern of a file and pattern of a key: text for people, whose wording may change. That it is there is
part of the digests, what it says is not."""

EQUAL, DIFFERENT, NOT_COMPARABLE = 0, 1, 2
"""Exit codes of ``compare``."""

Digests = dict[str, dict[str, Any]]
"""File, relative to the folder -> key -> digest or, where it is short, the value itself."""


# Digests of files


def digest_folder(folder: Path) -> Digests:
    """The digests of all files below ``folder``, without what `LEFT_OUT` names."""
    found: Digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        parts = {} if listed(LEFT_OUT, name, "") else digest_file(path)
        kept = {key: value for key, value in parts.items() if not listed(LEFT_OUT, name, key)}
        if kept:
            found[name] = {
                k: "a sentence" if v and listed(SENTENCES, name, k) else v for k, v in kept.items()
            }
    return found


def listed(patterns: Iterable[tuple[str, ...]], name: str, key: str) -> bool:
    """Whether a key of a file is one of ``patterns``: of the file, of the key, and perhaps a reason."""
    return any(fnmatch.fnmatchcase(name, p[0]) and fnmatch.fnmatchcase(key, p[1]) for p in patterns)


def digest_file(path: Path) -> dict[str, Any]:
    """Key -> digest; a file of bytes has the one key "bytes"."""
    read = READERS.get(path.suffix)
    return read(path) if read else {"bytes": hashlib.sha256(bytes_of(path)).hexdigest()[:16]}


def bytes_of(path: Path) -> bytes:
    """The bytes of a file; of a checkpoint without its metadata, which version 0.1 did not write."""
    data = path.read_bytes()
    if path.parent.name != "checkpoints" or path.suffix != ".safetensors":
        return data
    from safetensors.torch import load, save

    return save(load(data))


def read_json(path: Path) -> dict[str, Any]:
    return flat(json.loads(path.read_text("utf-8")))


def read_json_lines(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    columns = dict.fromkeys(name for row in rows for name in row)
    return by_column(columns, [[row.get(name) for name in columns] for row in rows])


def read_csv(path: Path) -> dict[str, Any]:
    lines = [line.split(",") for line in path.read_text("utf-8").splitlines()]
    return by_column(lines[0], lines[1:])


def read_duckdb(path: Path) -> dict[str, Any]:
    import duckdb

    with duckdb.connect(str(path), read_only=True) as connection:
        tables = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
        parts = [read_table(connection, f'"{table}"', f"{table}.") for (table,) in tables]
    return {key: value for part in parts for key, value in part.items()}


def read_parquet(path: Path) -> dict[str, Any]:
    import duckdb

    with duckdb.connect() as connection:
        return read_table(connection, f"read_parquet('{path}')")


def read_table(connection: Any, source: str, prefix: str = "") -> dict[str, Any]:
    """Sorted rows by column; a table of keys and JSON by key."""
    rows = connection.execute(f"SELECT * FROM {source} ORDER BY ALL")
    names = [column[0] for column in rows.description]
    if names == ["key", "value"]:
        return flat({f"{prefix}{key}": json.loads(value) for key, value in rows.fetchall()})
    columns = [f"{prefix}{column[0]} {column[1]}" for column in rows.description]
    return by_column(columns, rows.fetchall(), f"{prefix}rows")


def read_sqlite(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with sqlite3.connect(path) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = connection.execute(f'SELECT * FROM "{table}"')
            columns = [f"{table}.{column[0]}" for column in rows.description]
            found |= by_column(columns, rows.fetchall(), f"{table}.rows")
    return found


class ShownText(html.parser.HTMLParser):
    """``parts``: the text of a page, without its style sheet."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.parts.append(data)


def read_html(path: Path) -> dict[str, Any]:
    """Bare numbers and all other text of a page apart: headings may be worded anew, numbers may not."""
    page = ShownText()
    page.feed(path.read_text("utf-8"))
    shown = [text for part in page.parts if (text := part.strip())]
    numbers = [text for text in shown if re.search(r"\d", text) and not re.search(r"[^\W\d]", text)]
    return {"numbers": short(numbers), "texts": short([text for text in shown if text not in set(numbers)])}


READERS = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".duckdb": read_duckdb,
    ".parquet": read_parquet,
    ".sqlite": read_sqlite,
    ".html": read_html,
}


def by_column(names: Iterable[str], rows: Sequence[Sequence[Any]], count: str = "rows") -> dict[str, Any]:
    """A digest for each column, and the number of rows under the key ``count``."""
    return {name: short([row[i] for row in rows]) for i, name in enumerate(names)} | {count: len(rows)}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts, and lists of dicts, as one dict with the keys joined by dots."""
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = dict(enumerate(value)).items()
    else:
        return {key: short(value)}
    return {
        name: part for k, item in items for name, part in flat(item, f"{key}.{k}" if key else str(k)).items()
    }


def short(value: Any) -> Any:
    """A scalar as it is; of a list or a long text its size, its beginning and a digest."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)
    if len(text) <= 40:
        return value if isinstance(value, str) else text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{len(value)} items {text[:24]}... {digest}" if isinstance(value, list) else digest


# Comparing


def differences(before: Digests, after: Digests) -> tuple[list[str], list[str]]:
    """What was changed or removed, and what was added: ``FILE KEY: before -> after``, one a line."""
    wrong, added = [], []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            wrong.append(f"{name} : the file is missing")
        elif name not in before:
            added.append(f"{name} : a new file")
        else:
            old, new = before[name], after[name]
            for key in sorted(old.keys() | new.keys()):
                if key not in new:
                    wrong.append(f"{name} {key}: removed (it was {old[key]!r})")
                elif key not in old:
                    added.append(f"{name} {key}: added ({new[key]!r})")
                elif repr(old[key]) != repr(new[key]):  # 1, 1.0 and true are not the same JSON
                    wrong.append(f"{name} {key}: {old[key]!r} -> {new[key]!r}")
    return wrong, added


def by_key(added: Sequence[str]) -> list[str]:
    """Lines of `differences` about what was added, one for each key."""
    files: dict[str, list[str]] = {}
    for line in added:
        name, what = line.split(" ", 1)
        files.setdefault(what.removeprefix(": "), []).append(name)
    return [f"added, files: {len(names)}, {names[0]} ...: {what}" for what, names in files.items()]


def without(lines: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The lines whose ``FILE KEY`` matches none of ``patterns``."""
    return [
        line
        for line in lines
        if not any(fnmatch.fnmatchcase(line.split(": ", 1)[0].strip(), pattern) for pattern in patterns)
    ]


def why_not_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """One line on why numbers of two environments need not be equal to the last bit; None if they must."""
    differ = [name for name in SAME_ROUNDING if before.get(name) != after.get(name)]
    if not differ:
        return None
    facts = ", ".join(f"{name} {before.get(name)} there and {after.get(name)} here" for name in differ)
    return f"the digests were written elsewhere: {facts}; write them again with the commit before"


def environment() -> dict[str, str]:
    """What the last bits of numbers depend on, and what else helps to explain a difference."""
    import importlib.metadata

    import torch

    facts = {name: importlib.metadata.version(name) for name in ("numpy", "duckdb", "transformers")}
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    known = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return {
        "machine": platform.machine(),
        "vendor": known.get("vendor_id", ""),
        "processor": known.get("model name", ""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **facts,
    }


def read(path: Path) -> dict[str, Any]:
    """A file of digests; ``.xz`` is unpacked."""
    data = path.read_bytes()
    return json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)


def write(path: Path, made: Mapping[str, Any]) -> None:
    data = (json.dumps(made, indent=0, ensure_ascii=False, sort_keys=True) + "\n").encode()
    path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)


def make_digests(keep: Path | None = None) -> Digests:
    """Run the scenario and digest what it left; takes about 2 minutes."""
    import scenario

    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder} is not empty; name another folder with --keep")
        read_models_as_version_0_1()
        scenario.produce(folder, say=lambda line: print(line, file=sys.stderr, flush=True))
        return digest_folder(folder)


def read_models_as_version_0_1() -> None:
    """Read all activations through TransformerLens's bridge. Those of the modules of transformers are equal
    only up to rounding, and every digest that follows from them would differ."""
    try:
        from saebench.sources.families import FAMILIES
    except ImportError:  # version 0.1 itself
        return
    FAMILIES.clear()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["write", "compare"])
    parser.add_argument("file", type=Path, help="JSON file with the digests of the commit before")
    parser.add_argument("--keep", type=Path, help="run in this empty folder and leave the files in it")
    parser.add_argument("--except", dest="excepted", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--strict", action="store_true", help="fail on added files and keys too")
    arguments = parser.parse_args()
    here = environment()
    if arguments.mode == "write":
        write(arguments.file, {"environment": here, "digests": make_digests(arguments.keep)})
        return EQUAL
    before = read(arguments.file)
    if reason := why_not_comparable(before["environment"], here):
        print(reason)
        return NOT_COMPARABLE
    after = make_digests(arguments.keep)
    wrong, added = differences(before["digests"], after)
    unexpected = without(wrong, arguments.excepted)
    for line in [*unexpected, *by_key(added)]:
        print(line)
    print(
        f"{len(after)} files: {len(unexpected)} parts changed or removed, {len(added)} added, "
        f"{len(wrong) - len(unexpected)} excepted"
    )
    return DIFFERENT if unexpected or (arguments.strict and added) else EQUAL


if __name__ == "__main__":
    if ENVIRONMENT.items() - os.environ.items():  # some are read by libraries before Python could set them
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    sys.exit(main())
