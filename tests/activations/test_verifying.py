"""A row of a damaged block is never used: it ends in a sentence that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

import saebench as sb
from saebench.activations.cache import ActivationCache
from saebench.activations.loader import Loader
from saebench.activations.shards import BLOCK_BYTES, DATA_START
from saebench.core.errors import UserError

N_ROWS, WIDTH = 70_000, 6
ROW_BYTES = 4 * WIDTH


@pytest.fixture(scope="module")
def whole(make_cache, tmp_path_factory) -> Path:
    rows_ND = torch.randn(N_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return make_cache(tmp_path_factory.mktemp("whole") / "cache", rows_ND).path


@pytest.fixture(params=["block checksums", "SHA-256 of shards, as in version 0.1"])
def cache(request, whole, tmp_path) -> Path:
    copy = Path(shutil.copytree(whole, tmp_path / "cache"))
    if request.param != "block checksums":
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest["block_checksums"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def flip(file: Path, byte: int, *, n: int = 1) -> None:
    data = bytearray(file.read_bytes())
    for i in range(byte, byte + n):
        data[i] ^= 16
    file.write_bytes(data)


def hook_shard(cache: Path, number: int = 1) -> Path:
    return cache / "hook" / "imported" / f"{number:05d}.safetensors"


SHARD_ROWS = 32_768


@given(
    damaged=st.integers(0, N_ROWS * ROW_BYTES - 1),
    rows=st.lists(st.integers(0, N_ROWS - 1), max_size=60) | st.tuples(*[st.integers(0, N_ROWS)] * 2),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_rows_of_a_damaged_block_are_refused(whole, tmp_path_factory, damaged, rows) -> None:
    cache = Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "cache"))
    shard, within = divmod(damaged, SHARD_ROWS * ROW_BYTES)
    flip(hook_shard(cache, shard), DATA_START + within)
    column = sb.open_cache(cache).verified()
    index = slice(*sorted(rows)) if isinstance(rows, tuple) else torch.tensor(rows, dtype=torch.int64)
    of_block = within // BLOCK_BYTES * BLOCK_BYTES + shard * SHARD_ROWS * ROW_BYTES
    end = min(of_block + BLOCK_BYTES, (shard + 1) * SHARD_ROWS * ROW_BYTES)
    touched = np.zeros(N_ROWS, dtype=bool)
    touched[of_block // ROW_BYTES : -(-end // ROW_BYTES)] = True
    if touched[index.numpy() if isinstance(index, torch.Tensor) else index].any():
        with pytest.raises(UserError, match=rf"{shard:05d}\.safetensors is damaged.*make it again"):
            column[index]
    else:
        assert torch.equal(column[index], sb.open_cache(whole).activations()[index])
    shutil.rmtree(cache)


@pytest.mark.parametrize("use", ["train", "activations", "eval", "index"])
def test_zeroed_bytes_end_every_use_in_a_sentence(cache, tmp_path, use) -> None:
    run = sb.train(cache=cache, out=tmp_path / "run", d_sae=16, k=2, tokens=2_000, batch_size=500, quiet=True)
    flip(hook_shard(cache, 2 if use == "eval" else 1), DATA_START + 5_000, n=4_000)
    uses = {
        "train": lambda: sb.train(
            cache=cache, out=tmp_path / "other", d_sae=16, k=2, tokens=70_000, batch_size=500, quiet=True
        ),
        "activations": lambda: sb.open_cache(cache).activations(),
        "eval": lambda: sb.evaluate(run=run, cache=cache, quiet=True),
        "index": lambda: sb.index(run=run, cache=cache, out=tmp_path / "store", quiet=True),
    }
    with pytest.raises(UserError, match=r"hook/imported/0000[12]\.safetensors is damaged: its SHA-256"):
        uses[use]()
    assert not (tmp_path / "other" / "sae.json").exists()
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_no_row_of_a_damaged_block_is_in_a_batch(cache) -> None:
    """With windows of a few blocks the damage is found in the middle of the epoch, before its first row."""
    flip(hook_shard(cache), DATA_START + 100_000)
    opened = sb.open_cache(cache)
    bad = SHARD_ROWS + 100_000 // ROW_BYTES
    loader = Loader(opened, batch_size=100, seed=3, block_rows=50, window_blocks=2)
    batches = []

    def read() -> None:
        for i, _ in enumerate(loader.iterate(stop=len(loader))):
            batches.append(i)

    with pytest.raises(UserError, match=r"00001\.safetensors is damaged"):
        read()
    seen = torch.cat([loader.rows(i) for i in batches]) if batches else torch.empty(0)
    assert bad not in seen
    if "block_checksums" in opened.manifest:
        assert batches


def test_flipped_bytes_of_other_columns_and_of_gradients_are_refused(tiny_cache, tmp_path) -> None:
    columns = ["held_out", "doc", "pos", "ctx", "token", "context_tokens", "context_len"]
    for column in columns:
        copy = Path(shutil.copytree(tiny_cache.path, tmp_path / column))
        flip(copy / column / "00000.safetensors", DATA_START + 3)
        opened = sb.open_cache(copy)
        with pytest.raises(UserError, match=rf"{column}/00000\.safetensors is damaged"):
            getattr(opened, {"token": "tokens"}.get(column, column))


def test_flipped_bytes_of_gradients_are_refused(make_cache, tmp_path) -> None:
    from safetensors.torch import save_file

    x_ND = torch.randn(300, 4)
    save_file({"array": x_ND}, tmp_path / "gradients.safetensors")
    cache = make_cache(tmp_path / "cache", x_ND, gradients=tmp_path / "gradients.safetensors")
    flip(cache.path / "gradient" / "imported" / "00000.safetensors", DATA_START + 9)
    with pytest.raises(UserError, match=r"gradient/imported/00000\.safetensors is damaged"):
        Loader(sb.open_cache(cache.path), batch_size=10, seed=0, gradients=True).batch(0)


def test_each_block_is_verified_once_per_process(cache, monkeypatch) -> None:
    counted: list[object] = []
    monkeypatch.setattr(
        "saebench.activations.verifying.xxh3_64_hexdigest",
        lambda data: counted.append(1) or xxh3_64_hexdigest(data),
    )
    monkeypatch.setattr("saebench.activations.verifying.check_sha256", lambda path, _: counted.append(path))
    for _ in range(2):
        loader = Loader(sb.open_cache(cache), batch_size=1000, seed=0)
        for _ in loader.iterate(stop=2 * len(loader)):
            pass
        sb.open_cache(cache).activations()
    manifest = sb.open_cache(cache).manifest
    columns = manifest.get("block_checksums", {}).get("columns")
    n_blocks = sum(len(s) // 16 for sums in columns.values() for s in sums) if columns else 6
    assert len(counted) == n_blocks


def test_a_damaged_list_of_blocks_gives_way_to_the_checksum_of_the_shard(whole, tmp_path) -> None:
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    manifest = json.loads((cache / "manifest.json").read_text())
    sums = manifest["block_checksums"]["columns"]["hook/imported"]
    sums[0] = "0" * len(sums[0])
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(sb.open_cache(cache).activations(), sb.open_cache(whole).activations())


def test_the_hash_of_a_cache_does_not_depend_on_block_checksums(cache, whole) -> None:
    assert sb.open_cache(cache).hash == sb.open_cache(whole).hash
    assert not ActivationCache(cache).verify()


def test_a_complete_cache_loses_the_journal_that_a_kill_left(whole, make_cache, tmp_path) -> None:
    rows_ND = sb.open_cache(whole).activations()[:100].clone()
    cache = make_cache(tmp_path / "cache", rows_ND).path
    before = sorted(cache.rglob("*"))
    (cache / "journal.json").write_bytes(b'{"identity": {}}\n')
    assert sb.open_cache(cache).n_rows == 100
    settings = sb.open_cache(cache).manifest["made_from"]["settings"]
    from safetensors.torch import save_file

    save_file({"array": rows_ND}, tmp_path / "array.safetensors")
    sb.import_activations(
        source=tmp_path / "array.safetensors", out=cache, shard_rows=settings["shard_rows"], quiet=True
    )
    assert sorted(cache.rglob("*")) == before
