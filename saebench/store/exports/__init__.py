"""Exports of feature stores: one file for each form, registered in saebench/store/export_registry.py."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.core.files import (
    TEMPORARY_SUFFIX,
    hold,
    is_leftover,
    remove_dead,
    require_writable,
    sentence_for_os_errors,
    sync_directory,
)
from saebench.core.settings import accepts_settings
from saebench.store.export_registry import StoreExporter, store_exports
from saebench.store.feature_spec import feature_numbers
from saebench.store.settings import StoreExportConfig

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore


@dataclass(frozen=True, kw_only=True)
class StoreExport:
    """The result of an export."""

    path: Path
    """The directory that was written."""
    format: str
    sae: str
    n_features: int
    """Features that it is about."""
    files: tuple[str, ...]
    """Relative to ``path``."""
    bytes: int
    notes: tuple[str, ...] = ()
    """Notes about the exported files, one sentence each."""


@accepts_settings(StoreExportConfig)
def export_store(config: StoreExportConfig) -> StoreExport:
    """Write an SAE of a feature store in another form; the directory appears whole or not at all.

    >>> made = sb.export_store(store=store.path, format="html", features=["0-2", 5], out="page")
    >>> made.files, made.n_features
    (('features.html',), 4)

    Raises:
        UserError: no such store, SAE, feature or list, a store without a table that the format needs, or a
            directory that is not empty.
    """
    from saebench.store.query import open_store

    exporter: StoreExporter = store_exports.load(config.format)
    with open_store(config.store, config.sae) as store:
        features = chosen_features(store, config)
        exporter.check(store, features)
        with new_directory(config.out) as directory:
            notes = exporter.write(store, features, directory)
            found = sorted(path for path in directory.rglob("*") if path.is_file())
            files = tuple(str(path.relative_to(directory)) for path in found)
            n_bytes = sum(path.stat().st_size for path in found)
        n_features = store.info()["d_sae"] if features is None else len(features)
        return StoreExport(
            path=config.out,
            format=config.format,
            sae=store.sae,
            n_features=n_features,
            files=files,
            bytes=n_bytes,
            notes=notes,
        )


def chosen_features(store: FeatureStore, config: StoreExportConfig) -> list[int] | None:
    """The features to export, each once, in the order given; None is all.

    Raises:
        UserError: one that the SAE has not, or words that name none.
    """
    if config.list is not None:
        wanted = store.annotations.list_features(config.list)
    elif config.features:
        return feature_numbers(config.features, store.info()["d_sae"])
    else:
        return None
    for feature in wanted:
        store.require_feature(feature)
    return list(dict.fromkeys(wanted))


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which on a clean exit is synced and becomes ``out``.

    Raises:
        UserError: ``out`` is not empty, cannot be made, or the disk is full.
    """
    out = Path(out).absolute()
    if out.exists():
        require_writable(out, what="the folder")
        unexpected = sorted(path.name for path in out.iterdir() if not is_leftover(path))
        if unexpected:
            raise UserError(f"{out} is not empty (it holds {unexpected[0]}); choose another --out")
    require_writable(out.parent, what="the folder")
    remove_dead(out.parent, out.name)
    temporary = out.with_name(f".{out.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sentence_for_os_errors(out))
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            hold(descriptor)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_dir():
                    sync_directory(path)
                else:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            sync_directory(temporary)
            os.rename(temporary, out)
            sync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
