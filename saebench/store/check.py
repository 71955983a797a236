"""Checks of a store: its files are unchanged since they were published, and its tables agree."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.core.progress import Progress, progress
from saebench.sources.modality import TEXT
from saebench.store import publish
from saebench.store.annotation_file import FILE, AnnotationFile
from saebench.store.database import first_line, open_reader, read_meta, tables_of
from saebench.store.extra_integrity import EXTRA_RULES
from saebench.store.extras import extras_of, origin
from saebench.store.folds import fold_of
from saebench.store.integrity import SAE_RULES, TEXT_RULES, Rule
from saebench.store.recompute import is_of, load_references, problems
from saebench.store.schema import (
    EXTRA_TABLES,
    FORMAT_VERSION,
    HIST_BINS,
    SAE_TABLES,
    TEXT_TABLES,
    UNIT_TABLES,
    Table,
)

if TYPE_CHECKING:
    import duckdb

    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE

RECOUNTED = 20_000_000
"""Activations from which tables are recounted; a larger store is recounted for a sample of its features."""


@dataclass(frozen=True)
class Finding:
    """A problem in a store: the file that has it, and a sentence."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def check_store(
    path: str | Path,
    *,
    run: Path | None = None,
    cache: Path | None = None,
    model: str = "none",
    quiet: bool = True,
) -> list[Finding]:
    """All that is wrong with the current generation of a store; an empty list when it is healthy.

    Files are compared with the checksums of the manifest; the tables of undamaged files are compared with
    each other and recounted from the activations (rules.py). Directions are compared with the SAE of
    ``run``, a sample of the activations with its codes of ``cache``, a sample of the logits with ``model``
    ('cache' is the one that made the cache). Without ``quiet``, progress is shown on standard error.

    Raises:
        UserError: there is no store, its manifest is damaged, or its format is newer; the run, cache or
            model is not the one that the store was made with.
    """
    reference, rows = load_references(run, cache, model)
    path = Path(path)
    manifest = publish.read_manifest(path)
    findings = [] if manifest.saes else [Finding(publish.MANIFEST, "the store has no SAE")]
    with progress("check", total=_steps(manifest), unit="checks", quiet=quiet) as bar:
        for file in manifest.files():
            findings += _check_file(path, file)
            bar.update(1)
        findings += _check_annotations(path)
        damaged = {finding.where for finding in findings}
        for sae in manifest.saes:
            text = manifest.texts.get(sae.text) if sae.text else None
            if sae.text and text is None:
                findings.append(Finding(publish.MANIFEST, f"the text of {sae.name!r} is not listed"))
            elif not damaged & {sae.file.path, text.path if text else ""}:
                extras = {name: file for name, file in extras_of(sae).items() if file.path not in damaged}
                findings += _check_tables(path, sae, text, extras, bar)
    if reference is not None:
        findings += _check_references(path, manifest, damaged, reference, rows, model, run)
    return findings


def store_info(path: str | Path) -> dict[str, Any]:
    """Summary of a store: path, generation, bytes, and FeatureStore.info() of each SAE.

    Raises:
        UserError: there is no store, or a file of it cannot be read.
    """
    from saebench.store.query import open_store

    path = Path(path)
    manifest = publish.read_manifest(path)
    saes = []
    for sae in manifest.saes:
        with open_store(path, sae.name) as store:
            saes.append({**store.info(), "file": sae.file.path, "bytes": sae.file.bytes})
    return {
        "path": str(path),
        "generation": manifest.generation,
        "bytes": sum(file.bytes for file in manifest.files()),
        "saes": saes,
    }


def _steps(manifest: publish.Manifest) -> int:
    """Files and rules that there are to check, at most."""
    rules = sum(
        len(SAE_RULES)
        + (len(TEXT_RULES) if sae.text else 0)
        + sum(len(EXTRA_RULES[extra]) for extra in extras_of(sae))
        for sae in manifest.saes
    )
    return len(manifest.files()) + rules


def _check_annotations(store: Path) -> Iterator[Finding]:
    """Annotations are only read; they are never repaired or removed."""
    try:
        with AnnotationFile(store / FILE).reading() as connection:
            said = connection.execute("PRAGMA quick_check(1)").fetchone()[0] if connection else "ok"
    except UserError as error:
        said = str(error)
    if said != "ok":
        yield Finding(FILE, f"people's labels, comments and lists cannot be read ({said}); keep a copy of it")


def _check_file(store: Path, file: publish.StoredFile) -> Iterator[Finding]:
    path = store / file.path
    if not path.is_file():
        yield Finding(file.path, "the file is missing")
        return
    if (size := path.stat().st_size) != file.bytes:
        yield Finding(file.path, f"the file has {size:,} bytes where the manifest says {file.bytes:,}")
    elif sha256_file(path) != file.sha256:
        yield Finding(file.path, "the file's bytes are not those that were published (checksum)")
    if path.with_name(path.name + ".wal").exists():
        yield Finding(file.path, "there is a write-ahead log next to the file, so a program wrote to it")


def _check_tables(
    store: Path,
    sae: publish.StoredSae,
    text: publish.StoredFile | None,
    extras: dict[str, publish.StoredFile],
    bar: Progress,
) -> Iterator[Finding]:
    import duckdb

    try:
        connection = open_reader(
            store / sae.file.path,
            store / text.path if text else None,
            {name: store / file.path for name, file in extras.items()},
        )
    except UserError as error:
        yield Finding(sae.file.path, str(error))
        return
    with connection:
        try:
            meta = read_meta(connection)
            if meta["format_version"] != FORMAT_VERSION:
                version = meta["format_version"]
                yield Finding(sae.file.path, f"it has format {version}; run saebench store rebuild {store}")
                return
            yield from _check_schema(connection, sae, meta)
            parameters = {**meta, "bins": HIST_BINS}
            every = max(1, -(-meta["n_activations"] // RECOUNTED))
            pairs = meta["n_activations"] * meta["n_activations"] // meta["n_tokens"]
            few = max(every, -(-pairs // RECOUNTED))
            present = tables_of(connection, "sae")
            if text:
                present |= tables_of(connection, "txt")
                kept = read_meta(connection, "txt")
                yield from _check_rules(connection, text.path, TEXT_RULES, present, kept, every, few, bar)
            if text:
                yield from _check_folds(connection, sae.file.path)
            yield from _check_rules(
                connection, sae.file.path, SAE_RULES, present, parameters, every, few, bar
            )
            for name, file in extras.items():
                yield from _check_columns(connection, file.path, name, EXTRA_TABLES[name])
                if origin(read_meta(connection, name)) != origin(meta):
                    yield Finding(file.path, f"these {name} are of other activations than {sae.name!r} has")
                within = present | tables_of(connection, name)
                rules = EXTRA_RULES[name]
                yield from _check_rules(connection, file.path, rules, within, parameters, every, few, bar)
        except (duckdb.Error, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
            yield Finding(sae.file.path, f"the tables cannot be read ({first_line(error)})")


def _check_references(
    store: Path,
    manifest: publish.Manifest,
    damaged: set[str],
    sae: SAE,
    cache: ActivationCache | None,
    model: str,
    run: Path | None,
) -> Iterator[Finding]:
    seen = False
    for stored in manifest.saes:
        text = manifest.texts.get(stored.text) if stored.text else None
        if damaged & {stored.file.path, text.path if text else ""}:
            continue
        extras = {
            name: store / file.path for name, file in extras_of(stored).items() if file.path not in damaged
        }
        with open_reader(store / stored.file.path, store / text.path if text else None, extras) as connection:
            meta = read_meta(connection)
            if is_of(sae, meta):
                seen = True
                for problem in problems(connection, meta, stored.text, sae, cache, model):
                    yield Finding(stored.file.path, problem)
    if not seen and not damaged:
        raise UserError(
            f"the weights of {run} are those of no SAE of the store {store}; it has "
            f"{', '.join(stored.name for stored in manifest.saes)}"
        )


def _check_schema(
    connection: duckdb.DuckDBPyConnection, sae: publish.StoredSae, meta: dict[str, Any]
) -> Iterator[Finding]:
    if meta["name"] != sae.name:
        yield Finding(
            sae.file.path, f"the file is of the SAE {meta['name']!r}, the manifest says {sae.name!r}"
        )
    if sae.text and (kept := read_meta(connection, "txt")["text_hash"]) != sae.text:
        yield Finding(
            sae.file.path, f"its text file is of the text {kept[:12]}, the manifest says {sae.text[:12]}"
        )
    files: list[tuple[str, dict[str, Table]]] = [("sae", SAE_TABLES)]
    if sae.text:
        files.append(("txt", UNIT_TABLES if has_units(meta) else TEXT_TABLES))
    for alias, tables in files:
        yield from _check_columns(
            connection, sae.file.path, alias, tables, {*meta["missing"], *meta["left_out"]}
        )


def has_units(meta: dict[str, Any]) -> bool:
    """Whether the text file has the units of another modality than text."""
    return bool(meta.get("modality", TEXT.name) != TEXT.name)


def _check_columns(
    connection: duckdb.DuckDBPyConnection,
    where: str,
    alias: str,
    tables: dict[str, Table],
    missing: Collection[str] = (),
) -> Iterator[Finding]:
    for name, table in tables.items():
        query = (
            "SELECT column_name, data_type FROM duckdb_columns() "
            "WHERE database_name = ? AND table_name = ? ORDER BY column_index"
        )
        found = connection.execute(query, [alias, name]).fetchall()
        expected = [(column.name, column.type) for column in table.columns]
        absent = name in missing
        if absent and found:
            yield Finding(where, f"table {name} exists but is recorded as missing")
        elif not absent and found != expected:
            yield Finding(where, f"table {name} is missing or has other columns than its format")


def _check_folds(connection: duckdb.DuckDBPyConnection, where: str) -> Iterator[Finding]:
    """The fold of a document must be the same in every store, so that explanations stay honest."""
    rows = connection.execute(
        "SELECT DISTINCT doc, fold FROM sae.example WHERE doc IS NOT NULL AND fold IS NOT NULL"
    ).fetchnumpy()
    wrong = rows["fold"] != fold_of(rows["doc"])
    if wrong.any():
        doc = rows["doc"][wrong].min()
        yield Finding(where, f"examples are not in the fold of their document (first {doc})")


def _check_rules(
    connection: duckdb.DuckDBPyConnection,
    where: str,
    rules: Iterable[Rule],
    present: set[str],
    parameters: dict[str, Any],
    every: int,
    few: int,
    bar: Progress,
) -> Iterator[Finding]:
    for rule in rules:
        bar.update(1)
        if not rule.tables <= present:
            continue
        query = rule.query
        for name, step in (("some", every), ("few", few)):
            query = query.replace(f"{{{name}}}", f"feature % {step} = 0")
            for alias in ("a", "e"):
                query = query.replace(f"{{{alias}.{name}}}", f"{alias}.feature % {step} = 0")
        used = {name: value for name, value in parameters.items() if f"${name}" in query}
        counted = f"SELECT count(*), min(bad) FROM ({query}) broken(bad)"
        n, first = connection.execute(counted, used).fetchall()[0]
        if n:
            yield Finding(where, f"{rule.broken} ({n:,} times, first {first})")
