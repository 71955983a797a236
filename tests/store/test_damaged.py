"""A flipped bit in a file of a store is one sentence, or changes no answer, on every way of reading."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saebench.core.errors import UserError
from saebench.store import open_store
from saebench.store.check import check_store, store_info
from saebench.store.exports import export_store
from saebench.store.settings import StoreExportConfig
from tests.store.small_store import build_small_store


def readers(path: Path, out: Path) -> dict[str, Callable[[], object]]:
    def of_one(name: str) -> Callable[[], object]:
        def read() -> object:
            with open_store(path) as store:
                return getattr(store, name)(3)

        return read

    def opened(read: Callable[..., object]) -> Callable[[], object]:
        def call() -> object:
            with open_store(path) as store:
                return read(store)

        return call

    names = ("feature", "histogram", "quantiles", "positions", "tokens", "logits", "examples", "activations")
    return {
        **{name: of_one(name) for name in names},
        "features": opened(lambda store: store.features()),
        "vocab": opened(lambda store: store.vocab),
        "sql": opened(lambda store: store.sql("SELECT feature, sum(value) FROM act GROUP BY 1 ORDER BY 1")),
        "info": lambda: store_info(path),
        **{
            form: lambda form=form: export_store(
                StoreExportConfig(store=path, format=form, features=[3], out=out / form)
            ).bytes
            for form in ("html", "parquet", "neuronpedia")
        },
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_one_sentence_or_changes_no_answer(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = build_small_store(tmp_path / "store")
    right = {name: str(read()) for name, read in readers(path, tmp_path / "right").items()}
    file = sorted(path.glob("gen-*/*.duckdb"))[seed % 2]
    data = bytearray(file.read_bytes())
    for _ in range(40):  # in many blocks, as most of a small file is not used
        data[rng.randrange(3 * 4096, len(data))] ^= 1 << rng.randrange(8)
    if seed > 1:
        data[rng.randrange(3 * 4096)] ^= 1
    file.write_bytes(data)
    sentences = list[str]()
    for name, read in readers(path, tmp_path / "damaged").items():
        try:
            found = str(read())
        except UserError as error:
            sentences.append(str(error))
        else:
            assert found == right[name], name
    assert sentences
    for sentence in sentences:
        assert str(path) in sentence and "saebench index again" in sentence and "\n" not in sentence
    assert file.name in str(check_store(path))
    shutil.rmtree(path)
