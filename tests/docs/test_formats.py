"""The specifications in docs/formats/ are enough: a cache and an SAE written from them alone can be opened.

The writers here use numpy, json, hashlib and safetensors, and nothing of saebench.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file

import saebench as sb
from saebench.core.files import sha256_json
from tests.docs.pages import PAGES

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be memory-mapped")  # because shards are small here

D_IN, D_SAE, K, CTX, N_CONTEXTS, HOOK = 8, 16, 3, 5, 12, "blocks.0.hook_resid_post"
DTYPES = {"fp32": ("F32", "<f4"), "int32": ("I32", "<i4"), "bool": ("BOOL", "?")}


def write_shard(path: Path, values: np.ndarray, dtype: str) -> dict[str, Any]:
    stored, kind = DTYPES[dtype]
    data = np.ascontiguousarray(values, dtype=kind).tobytes()
    header = f'{{"data":{{"dtype":"{stored}","shape":{json.dumps(list(values.shape)).replace(" ", "")},'
    header += f'"data_offsets":[0,{len(data)}]}}}}'
    content = struct.pack("<Q", 65_528) + header.encode().ljust(65_528) + data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {"rows": len(values), "sha256": hashlib.sha256(content).hexdigest()}


def write_cache(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A harvest of 12 contexts of 5 tokens, position 0 left out; the last two contexts are held out."""
    rng = np.random.default_rng(0)
    ctx, pos = (grid.ravel() for grid in np.meshgrid(np.arange(N_CONTEXTS), np.arange(1, CTX), indexing="ij"))
    tokens = rng.integers(1, 4, size=(N_CONTEXTS, CTX))
    x = rng.normal(size=(len(ctx), D_IN)).astype("<f4")
    columns = {
        f"hook/{HOOK}": (x, "fp32"),
        "held_out": (ctx >= N_CONTEXTS - 2, "bool"),
        "token": (tokens[ctx, pos], "int32"),
        "doc": (ctx, "int32"),
        "ctx": (ctx, "int32"),
        "pos": (pos, "int32"),
        "context_tokens": (tokens, "int32"),
        "context_len": (np.full(N_CONTEXTS, CTX), "int32"),
    }
    shard_rows, described = 32, {}
    for name, (values, dtype) in columns.items():
        starts = range(0, len(values), shard_rows)
        shards = [
            write_shard(path / name / f"{i:05d}.safetensors", values[start : start + shard_rows], dtype)
            for i, start in enumerate(starts)
        ]
        described[name] = {"dtype": dtype, "row_shape": list(values.shape[1:]), "shards": shards}
    words = [b"<|end|>", b"the", b" cat", b" sat"]
    offsets = np.cumsum([0, *map(len, words)], dtype="<i8")
    vocab = save({"bytes": np.frombuffer(b"".join(words), dtype="u1"), "offsets": offsets})
    (path / "vocab.safetensors").write_bytes(vocab)
    manifest = {
        "format": "saebench activation cache", "format_version": 1, "kind": "harvest",
        "n_rows": len(x), "n_contexts": N_CONTEXTS, "shard_rows": shard_rows, "hooks": [HOOK],
        "columns": described,
        "files": {
            "vocab.safetensors": {"bytes": len(vocab), "sha256": hashlib.sha256(vocab).hexdigest()}
        },
        "made_from": {
            "settings": {"hook": [HOOK], "bos": False, "keep_first": False},
            "model": {"name": "elsewhere", "revision": None, "hash": "0" * 64},
            "text": {"name": "three words"},
        },
        "a key that no version knows": 1,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return x, manifest


def write_sae(path: Path, architecture: str, cache_hash: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    W_dec = rng.normal(size=(D_SAE, D_IN)).astype("<f4")
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    weights = {
        "W_enc_MD": W_dec.copy(), "W_dec": W_dec,
        "b_enc": rng.normal(size=D_SAE).astype("<f4"), "b_dec": rng.normal(size=D_IN).astype("<f4"),
    }  # fmt: skip
    if architecture == "jumprelu":
        weights["threshold"] = np.full(D_SAE, 0.5, dtype="<f4")
    path.mkdir(parents=True)
    save_file(weights, path / "sae.safetensors")
    spec = {"d_sae": D_SAE, "k": K}
    model = {"name": "elsewhere", "revision": None, "hash": "0" * 64}
    origin = {"d_in": D_IN, "hook_name": HOOK, "model": model}
    run = {
        "format_version": 1, "train": {"cache": "cache"}, "sae": {"name": architecture, **spec},
        "cache_hash": cache_hash, "n_steps": 1, **origin,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(run))
    description = {"format_version": 1, "sae": architecture, "spec": spec, **origin}
    (path / "sae.json").write_text(json.dumps(description))
    return weights


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    return write_cache(Path("cache"))


def test_cache_written_from_the_specification_opens(written: tuple[np.ndarray, dict[str, Any]]) -> None:
    x, manifest = written
    cache = sb.open_cache("cache")
    cache.verify()
    assert np.array_equal(cache.activations().numpy(), x)
    assert cache.vocab() == [b"<|end|>", b"the", b" cat", b" sat"]
    assert cache.ctx is not None and cache.ctx.tolist() == sorted(cache.ctx.tolist())
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    assert cache.hash == hashlib.sha256(text.encode()).hexdigest() == sha256_json(manifest)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_sae_written_from_the_specification_computes_the_equations(
    architecture: str, written: tuple[np.ndarray, dict[str, Any]]
) -> None:
    x, manifest = written
    cache_hash = hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    run = Path("runs") / architecture
    weights = write_sae(run, architecture, cache_hash)
    sae = sb.load(run)
    a = (x - weights["b_dec"]) @ weights["W_enc_MD"].T + weights["b_enc"]
    if architecture == "topk":
        kept = np.argsort(np.argsort(-a, axis=1), axis=1) < K
        z = np.where(kept, np.maximum(a, 0), 0)
    else:
        z = np.where(a > weights["threshold"], a, 0)
    codes = sae.encode(sb.open_cache("cache").activations())
    np.testing.assert_allclose(codes.to_dense().detach().numpy(), z, atol=1e-5)
    x_hat = z @ weights["W_dec"] + weights["b_dec"]
    np.testing.assert_allclose(sae.decode(codes).detach().numpy(), x_hat, atol=1e-5)
    assert sb.evaluate(run=run, cache="cache", tokens=100, quiet=True).l0 == pytest.approx(
        (z != 0)[-8:].sum(1).mean()
    )

    with sb.index(run=run, cache="cache", out="store", model="none", quiet=True) as store:
        digest = hashlib.sha256(architecture.encode())
        names = ("W_enc_MD", "W_dec", "b_enc", "b_dec", "threshold")
        for name in names[: len(weights)]:
            digest.update(f"{name} {weights[name].shape}".encode() + weights[name].tobytes())
        assert store.info()["sae_hash"] == digest.hexdigest()
        assert store.sql("SELECT count(*) AS n FROM act")["n"][0] == (z != 0).sum()
    manifest = json.loads(Path("store/manifest.json").read_text())
    stored = Path("store") / manifest["saes"][0]["file"]["path"]
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == manifest["saes"][0]["file"]["sha256"]


def test_specifications_name_every_key_that_is_written(written: tuple[np.ndarray, dict[str, Any]]) -> None:
    sb.train(cache="cache", out="runs/ours", d_sae=8, k=2, tokens=32, batch_size=16, log_every=1, quiet=True)
    page = PAGES["docs/formats/run.md"]
    keys = {
        key for name in ("run.json", "sae.json") for key in json.loads(Path("runs/ours", name).read_text())
    }
    keys |= set(json.loads(Path("runs/ours/metrics.jsonl").read_text().splitlines()[0]))
    keys |= set(json.loads(Path("runs/ours/sessions.jsonl").read_text().splitlines()[0]))
    assert not {key for key in keys if not re.search(rf"`{key}`", page)}
    with sb.index(run="runs/ours", cache="cache", out="ours", model="none", quiet=True) as store:
        meta = store.sql("SELECT key FROM meta")["key"]
    page = PAGES["docs/formats/store.md"]
    keys = {*meta, *json.loads(Path("ours/manifest.json").read_text())}
    assert not {key for key in keys if not re.search(rf"`{key}`", page)}


def test_cache_of_units_written_from_the_specification_of_format_2_opens_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    n_units, n_positions, name = 40, 3, "1:layers.0"
    unit, pos = (g.ravel() for g in np.meshgrid(np.arange(n_units), np.arange(n_positions), indexing="ij"))
    x = rng.normal(size=(len(unit), D_IN)).astype("<f4")
    columns = {
        f"hook/{name}": (x, "fp32"),
        "held_out": (unit >= n_units - 2, "bool"),
        "unit": (unit, "int32"),
        "pos": (pos, "int32"),
        "unit_len": (np.full(n_units, n_positions), "int32"),
        "unit_column/label": (np.arange(n_units) % 7, "int32"),
        "row_column/size": (np.linalg.norm(x, axis=1), "fp32"),
    }
    described = {
        column: {
            "dtype": dtype,
            "row_shape": list(values.shape[1:]),
            "shards": [
                write_shard(Path("units") / column.replace(":", "%3A") / "00000.safetensors", values, dtype)
            ],
        }
        for column, (values, dtype) in columns.items()
    }
    manifest = {
        "format": "saebench activation cache", "format_version": 2, "kind": "harvest", "modality": "atom",
        "n_rows": len(x), "n_contexts": n_units, "shard_rows": 32_768, "hooks": [name], "columns": described,
        "sites": {name: {"axes": [["head", 2], ["d_head", D_IN // 2]], "dtype": "fp32", "path": "module"}},
        "files": {}, "made_from": {"settings": {}, "module": {"name": "elsewhere"}},
    }  # fmt: skip
    (Path("units") / "manifest.json").write_text(json.dumps(manifest))
    cache = sb.open_cache("units")
    cache.verify()
    assert np.array_equal(cache.activations(native=True).numpy(), x.reshape(len(x), 2, -1))
    assert cache.modality.name == "atom" and cache.sites[name].axes == (("head", 2), ("d_head", D_IN // 2))
    assert cache.unit_columns()["label"].tolist() == (np.arange(n_units) % 7).tolist()
    run = sb.train(cache=cache, out="runs/a", d_sae=D_SAE, k=K, tokens=500, batch_size=50, quiet=True)
    with sb.index(run=run, cache=cache, out="store", quiet=True) as store:
        shown = store.examples(int(store.features()["n_act"].argmax()), "top")
        assert shown["label"][0].startswith(f"label={shown['ctx'][0] % 7}, size=")


def test_transcoder_written_from_the_specification_computes_the_equations(tmp_path: Path) -> None:
    rng, d_out = np.random.default_rng(2), 5
    shapes = {"W_enc_MD": (D_SAE, D_IN), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    shapes |= {"b_in": (D_IN,), "W_skip": (d_out, D_IN)}
    weights = {name: rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()}
    save_file(weights, tmp_path / "sae.safetensors")
    spec = {
        "d_sae": D_SAE, "k": K, "skip": True, "sites": [{"name": "in", "width": D_IN}],
        "targets": [{"name": "a", "width": 2}, {"name": "b", "width": 3}],
    }  # fmt: skip
    description = {"format_version": 2, "sae": "topk", "d_in": D_IN, "spec": spec}
    (tmp_path / "sae.json").write_text(json.dumps(description))
    x = rng.normal(size=(20, D_IN)).astype("<f4")
    a = (x - weights["b_in"]) @ weights["W_enc_MD"].T + weights["b_enc"]
    z = np.where(np.argsort(np.argsort(-a, axis=1), axis=1) < K, np.maximum(a, 0), 0)
    y_hat = z @ weights["W_dec"] + weights["b_dec"] + (x - weights["b_in"]) @ weights["W_skip"].T
    sae = sb.load(tmp_path)
    np.testing.assert_allclose(sae(torch.from_numpy(x)).detach().numpy(), y_hat, atol=1e-4)
