"""Extras: tables that are derived from an indexed SAE later, each in its own file next to the SAE's file.

Explanations, or the effect of each latent on the model's loss, take longer than indexing and may be made
again at any time. They are published like an SAE: as a new generation, which points at the same SAE and
text files and at one new side file. A process killed at any instant leaves the old generation or the new
one. An extra belongs to the activations it was derived from; indexing again keeps it only when these are
the same (the meta table of each says which they were).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.store import publish
from saebench.store.database import insert_meta, new_database, open_reader, read_meta, reading
from saebench.store.schema import EXTRA_TABLES, FORMAT_VERSION, SAE_META, nearest

if TYPE_CHECKING:
    import duckdb

ORIGIN = ("sae_hash", "cache_hash", "hook_name")
"""Keys of the SAE file's meta that identify its activations."""


def publish_extra(
    store: Path,
    sae: str,
    extra: str,
    build: Callable[[duckdb.DuckDBPyConnection], Mapping[str, Any] | None],
    *,
    made_from: Mapping[str, Any],
) -> publish.Manifest:
    """Write a side file of an SAE and publish it as the next generation, in place of one of the same name.

    Args:
        extra: a name in schema.EXTRA_TABLES.
        build: fills the tables of that extra, which are there and empty; what it returns goes into the
            meta table. It runs under the store's lock, so long work comes before.
        made_from: FeatureStore.info() of the store that the extra was derived from.

    Raises:
        UserError: the SAE is not in the store any more or was indexed again from other activations meanwhile,
            the disk is full, or another process writes the store.
    """
    assert extra in EXTRA_TABLES, extra
    with directory_lock(store, what="the feature store"):
        current, building = publish.begin(store)
        try:
            names = [stored.name for stored in current.saes]
            if sae not in names:
                raise UserError(f"{sae!r} is not an SAE of the store {store}; {nearest(sae, names)}")
            stored = current.sae(sae)
            if origin(meta_of(store / stored.file.path)) != origin(made_from):
                raise UserError(
                    f"{sae!r} was indexed again from other activations while its {extra} were made; "
                    "run the same command again"
                )
            path = building / f"{extra}-{made_from['sae_hash'][:12]}.duckdb"
            with new_database(path, [SAE_META, *EXTRA_TABLES[extra].values()]) as connection:
                own = build(connection) or {}
                meta = {"format_version": FORMAT_VERSION, "extra": extra, **own}
                insert_meta(connection, SAE_META, meta | {key: made_from[key] for key in ORIGIN})
            extras = stored.extras | {extra: publish.describe(path)}
            return publish.publish(store, current, [replace(stored, extras=extras)], None)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def keep_extras(
    store: Path, current: publish.Manifest, building: Path, new: publish.StoredSae
) -> publish.StoredSae:
    """``new``, whose file is in the build directory, with the extras of the SAE it replaces that still hold.

    A damaged one is left out, so that indexing again mends a store.
    """
    old = next((sae for sae in current.saes if sae.name == new.name), None)
    if old is None or not old.extras:
        return new
    activations = origin(meta_of(building / new.file.path))
    kept = {
        extra: file
        for extra, file in extras_of(old).items()
        if publish.is_intact(store, file) and origin(meta_of(store / file.path)) == activations
    }
    return replace(new, extras=kept)


def extras_of(stored: publish.StoredSae) -> dict[str, publish.StoredFile]:
    """The extras that this version knows; a later one may have written others."""
    return {name: file for name, file in stored.extras.items() if name in EXTRA_TABLES}


def origin(meta: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which activations a file with this meta table is about."""
    return tuple(meta.get(key) for key in ORIGIN)


def meta_of(path: Path) -> dict[str, Any]:
    """The meta table of an SAE file or of an extra."""
    with reading(path.parent.parent, opening=True), open_reader(path) as connection:
        return read_meta(connection)
