"""The cache on disk: what is written is read back, and damage raises a UserError."""

from __future__ import annotations

import functools
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saebench as sb
from saebench.activations import mapping
from saebench.activations.cache import read_vocab, vocab_bytes
from saebench.activations.shards import DATA_START, check_shard, shard_path, write_shard
from saebench.activations.writer import CacheWriter
from saebench.core.errors import UserError


@pytest.fixture(scope="module")
def array() -> torch.Tensor:
    return torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path: Path, make_cache, array) -> sb.ActivationCache:
    return make_cache(tmp_path / "cache", array)


def shards_of(cache: sb.ActivationCache, column: str = "hook/imported") -> list[Path]:
    return sorted((cache.path / column).iterdir())


def test_imported_array_is_read_back(cache, array):
    assert torch.equal(cache.activations(), array)
    assert cache.hooks == ["imported"] and cache.d_in() == 3 and cache.dtype == torch.float32
    assert cache.n_rows == 70_000 and cache.n_contexts == 0 and cache.ctx_len is None
    assert cache.held_out.sum() == 3_500 and not cache.held_out[:-3_500].any()
    assert cache.tokens is cache.ctx is cache.pos is cache.doc is cache.context_tokens is None
    assert cache.vocab() is None and cache.doc_labels() is None and cache.model is None
    assert len(shards_of(cache)) == 3
    cache.verify()


def test_shards_are_valid_safetensors(cache, array):
    parts = [load_file(path)["data"] for path in shards_of(cache)]
    assert torch.equal(torch.cat(parts), array)


def test_rows_are_memory_mapped_and_files_never_change(cache, array):
    mapped = lambda: str(cache.path / "hook") in Path("/proc/self/maps").read_text()  # noqa: E731
    assert not mapped()
    rows = cache.activations()[40_000:]
    assert mapped() and rows.is_contiguous()
    rows.zero_()
    assert torch.equal(sb.open_cache(cache.path).activations(), array)
    cache.verify()
    cache._columns.clear()
    gc.collect()
    assert mapped() and rows[-1].sum() == 0
    del rows
    gc.collect()
    assert not mapped()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.bool])
@given(n_rows=st.integers(1, 40), width=st.integers(0, 7))
@settings(max_examples=20, deadline=None)
def test_any_column_is_mapped_back(tmp_path_factory, dtype, n_rows, width):
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "int32"}
    name = names.get(dtype, "bool")
    shape = (n_rows, width) if width else (n_rows,)
    full = torch.randint(0, 2, (32_768 * 2, *shape[1:])).to(dtype)
    last = torch.randint(0, 2, shape).to(dtype)
    folder = tmp_path_factory.mktemp("column")
    parts = [full, last]
    for i, part in enumerate(parts):
        write_shard(shard_path(folder, i), part, name)
        check_shard(shard_path(folder, i), name, tuple(part.shape))
    files = [shard_path(folder, i) for i in range(2)]
    flat = mapping.map_files(files, [part.nbytes for part in parts], dtype=dtype)
    assert torch.equal(flat.view(-1, *shape[1:]), torch.cat(parts))


def test_without_mmap_files_are_read_with_a_warning(cache, array, monkeypatch):
    monkeypatch.setattr(mapping, "_libc", lambda: None)
    with pytest.warns(UserWarning, match="cannot be memory-mapped"):
        rows = cache.activations()
    assert torch.equal(rows, array)


def test_truncated_shard_raises_user_error_with_its_name(cache):
    victim = shards_of(cache)[1]
    with open(victim, "r+b") as file:
        file.truncate(victim.stat().st_size - 4)
    with pytest.raises(UserError, match=rf"{victim} has 458,748 bytes instead of 458,752"):
        sb.open_cache(cache.path)


@pytest.mark.parametrize("position", [0, 20, DATA_START - 1])
def test_damaged_header_raises_user_error_with_its_name(cache, position):
    victim = shards_of(cache)[0]
    flip(victim, position)
    with pytest.raises(UserError, match=str(victim)):
        sb.open_cache(cache.path)


def test_verify_finds_a_flipped_byte(cache):
    for column in ("held_out", "hook/imported"):
        victim = shards_of(cache, column)[2]
        flip(victim, DATA_START + 17)
        with pytest.raises(UserError, match=f"{victim} is damaged"):
            sb.open_cache(cache.path).verify()
        flip(victim, DATA_START + 17)
    cache.verify()


def test_missing_shard_raises_user_error_with_its_name(cache):
    victim = shards_of(cache)[2]
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim} does not exist"):
        sb.open_cache(cache.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "update saebench"),
        ({"format_version": 2}, "damaged"),
        ({"format_version": "1"}, "damaged"),
        ({"format": "other"}, "not the manifest"),
        ({"n_rows": 69_999}, "damaged"),
        ({"n_rows": -1}, "damaged"),
        ({"hooks": ["other"]}, "it has no column hook/other"),
        ({"hooks": None}, "damaged"),
        ({"kind": "harvest"}, "it has no entry for the file"),
        ({"shard_rows": 65_536}, "unequal"),
        ({"columns": {}}, "it has no column"),
        ({"made_from": {}}, "damaged"),
        ({"made_from": {"settings": 5}}, "made_from.settings is 5"),
        ({"files": {"../outside": {"bytes": 0, "sha256": "0" * 64}}}, "not a valid name"),
    ],
)
def test_invalid_manifest_raises_user_error(cache, change, message):
    path = cache.path / "manifest.json"
    path.write_text(json.dumps({**cache.manifest, **change}))
    with pytest.raises(UserError, match=message):
        sb.open_cache(cache.path)


def test_unreadable_or_missing_manifest_raises_user_error(cache, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        sb.open_cache(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not an activation cache"):
        sb.open_cache(tmp_path)
    (cache.path / "manifest.json").write_bytes(b"\x00{")
    with pytest.raises(UserError, match="damaged"):
        sb.open_cache(cache.path)


def test_unknown_hook_error_gives_the_nearest(cache):
    with pytest.raises(UserError, match="did you mean imported"):
        cache.activations("import")


@given(st.lists(st.binary(max_size=6), max_size=50))
@settings(deadline=None)
def test_vocabulary_bytes_round_trip(tmp_path_factory, vocab):
    path = tmp_path_factory.mktemp("vocab") / "vocab.safetensors"
    path.write_bytes(vocab_bytes(vocab))
    assert read_vocab(path) == vocab


@pytest.mark.parametrize(
    ("name", "read"), [("vocab.safetensors", "vocab"), ("doc_labels.json", "doc_labels")]
)
@pytest.mark.parametrize("position", [3, 12, -1])
def test_damaged_vocabulary_or_labels_raise_user_error(tmp_path, tiny_cache, name, read, position):
    cache = sb.open_cache(shutil.copytree(tiny_cache.path, tmp_path / "cache"))
    path = cache.path / name
    flip(path, position % path.stat().st_size)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        getattr(cache, read)()


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


# Importing


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_arrays_are_imported(tmp_path, dtype, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(101, 5)), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    cache = sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)
    expected = torch.from_numpy(array.astype("f2" if dtype == "<f2" else "f4", order="C"))
    assert torch.equal(cache.activations(), expected)
    assert cache.held_out.sum() == 5


def test_equal_imports_give_equal_bytes(tmp_path, make_cache, array):
    one, two = (make_cache(tmp_path / name, array, dtype="bf16") for name in "ab")
    assert one.hash == two.hash
    files = sorted(p.relative_to(one.path) for p in one.path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two.path) for p in two.path.rglob("*") if p.is_file())
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in files)


def test_repeated_import_does_nothing_and_other_array_raises_user_error(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((10, 2), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((10, 2), np.float32))
    first = sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)
    again = sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)
    assert again.hash == first.hash
    with pytest.raises(UserError, match=r"different cache \(its source.name is a.npy, not b.npy\)"):
        sb.import_activations(source=tmp_path / "b.npy", out=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("shard", [0, 1])
def test_resume_rewrites_a_damaged_shard(tmp_path, monkeypatch, array, shard):
    np.save(tmp_path / "a.npy", array.numpy())
    make = functools.partial(sb.import_activations, tmp_path / "a.npy", shard_rows=32_768, quiet=True)
    whole = make(out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", lambda self, files: self._wait() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(out=tmp_path / "cache")
    path = tmp_path / "cache" / "hook" / "imported" / f"{shard:05d}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    resumed = make(out=tmp_path / "cache")
    resumed.verify()
    assert resumed.hash == whole.hash


def test_directory_with_other_files_is_not_changed(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((10, 2), np.float32))
    with pytest.raises(UserError, match=r"holds 'a.npy'"):
        sb.import_activations(source=tmp_path / "a.npy", out=tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3, np.float32), r"shape \[3\]"),
        (np.ones((2, 3, 4, 5), np.float32), r"shape \[2, 3, 4, 5\]"),
        (np.ones((0, 4), np.float32), r"shape \[0, 4\]"),
        (np.ones((4, 4), np.int64), "type int64"),
        (np.ones((4, 4), complex), "type complex128"),
        (np.array([[{}, {}]], object), "Python objects"),
        (np.array([[0, 1], [2, np.nan]], np.float32), "row 1, column 1 is nan"),
        (np.array([[0, 1], [-np.inf, 1]], np.float32), "row 1, column 0 is -inf"),
    ],
)
def test_invalid_arrays_raise_user_error(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache").exists()


def test_values_too_large_for_the_type_raise_user_error(tmp_path, make_cache):
    with pytest.raises(UserError, match=r"row 2 holds 70000, too large for float16; pass --dtype fp32"):
        make_cache(tmp_path / "cache", torch.tensor([[1.0], [2], [7e4]]), dtype="fp16")
    np.save(tmp_path / "a.npy", np.full((2, 2), 1e300))
    with pytest.raises(UserError, match=r"too large for float32; scale the array down"):
        sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)


def test_file_without_exactly_one_tensor_raises_user_error(tmp_path):
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x", a=np.ones((2, 2)))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    for name, message in [
        ("x.safetensors", "holds 2 tensors"),
        ("x.npy", "an archive of several arrays"),
        ("none.npy", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            sb.import_activations(source=tmp_path / name, out=tmp_path / "cache", quiet=True)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(UserError, match="neither"):
        sb.import_activations(source=tmp_path / "x.csv", out=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("order", ["C", "F"])
def test_array_with_positions_gives_units(tmp_path, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(41, 7, 5)), dtype="f4", order=order)
    np.save(tmp_path / "a.npy", array)
    cache = sb.import_activations(source=tmp_path / "a.npy", out=tmp_path / "cache", quiet=True)
    assert torch.equal(cache.activations(), torch.from_numpy(array.reshape(-1, 5).copy()))
    assert cache.unit.tolist() == np.repeat(np.arange(41), 7).tolist() and cache.n_contexts == 41
    assert cache.pos.tolist() == np.tile(np.arange(7), 41).tolist() and cache.unit_len.tolist() == 41 * [7]
    assert (cache.held_out == (cache.unit >= 39)).all()
    assert cache.manifest["format_version"] == 2 and cache.sites["imported"].path == "array"
    cache.verify()


def test_import_with_positions_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    array = torch.randn(9_000, 9, 3, generator=torch.Generator().manual_seed(0))
    save_file({"x": array}, tmp_path / "x.safetensors")
    make = functools.partial(sb.import_activations, tmp_path / "x.safetensors", shard_rows=32_768, quiet=True)
    whole = make(out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", lambda self, *_, **__: self._wait() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(out=tmp_path / "cache")
    assert make(out=tmp_path / "cache").hash == whole.hash
    assert torch.equal(whole.activations(), array.flatten(0, 1))


def test_several_arrays_are_sites_of_the_same_rows(tmp_path):
    arrays = {name: np.random.default_rng(i).normal(size=(30, 2 + i)) for i, name in enumerate("abc")}
    arrays["b"] = arrays["b"].astype("f2")
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    a, b, c = (tmp_path / f"{name}.npy" for name in "abc")
    settings = {"also": (b, c), "hook": ("A", "0:B", "C"), "quiet": True}
    cache = sb.import_activations(a, out=tmp_path / "cache", **settings)
    assert cache.hooks == ["A", "0:B", "C"] and cache.unit is None
    for hook, array in zip(cache.hooks, arrays.values(), strict=True):
        kept = array.astype("f2" if hook == "0:B" else "f4")
        assert torch.equal(cache.activations(hook), torch.from_numpy(kept))
    cache.verify()
    np.save(b, np.ones((29, 3), "f4"))
    for changes, message in [
        ({}, r"b.npy has shape \[29, 3\] but .*a.npy has \[30, 2\]"),
        ({"hook": ("A", "B")}, "3 arrays and 2 names of sites"),
        ({"hook": ("A", "B", "A")}, "the same hook twice"),
        ({"hook": ("A", "b/c", "C")}, "'b/c' is not a valid hook name"),
        ({"gradients": a}, "--gradients goes with one array"),
    ]:
        with pytest.raises(UserError, match=message):
            sb.import_activations(a, out=tmp_path / "other", **{**settings, **changes})
    assert not (tmp_path / "other").exists()
