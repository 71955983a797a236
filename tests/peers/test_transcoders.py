"""Exported and imported transcoders: SAELens and circuit-tracer compute the same codes and output."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saebench.bench.peer import python_of
from saebench.formats import export_sae, import_sae
from saebench.runs.run import load
from tests.formats.random_transcoders import BY_THRESHOLD, random_transcoder, rows
from tests.peers.conftest import ENVIRONMENT
from tests.peers.test_formats import assert_agree, by_saelens

pytestmark = pytest.mark.peers

D_IN, D_OUT, D_SAE, K, N = 64, 48, 256, 16, 2000
SCRIPT = Path(__file__).with_name("circuit_tracer_peer.py")
skips = pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, rows(N, D_IN).numpy())
    return path


@skips
@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_saelens_computes_exported_transcoder(name, skip, saelens, data, tmp_path):
    sae = random_transcoder(name, d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K, skip=skip)
    sae.save(tmp_path / "ours", hook_name="blocks.0.mlp.hook_in")
    made = export_sae(tmp_path / "ours", out=tmp_path / "theirs")
    asked = {"folder": str(tmp_path / "theirs"), "data": str(data), "out": str(tmp_path / "o")}
    assert saelens.ask("encode", **asked) == {
        "architecture": made.architecture,
        "hook_name": "blocks.0.mlp.hook_in",
        "hook_name_out": "blocks.0.hook_mlp_out",
    }
    assert_agree(sae, by_saelens(saelens, tmp_path / "theirs", data), rows(N, D_IN))


@pytest.mark.parametrize(
    "kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_imported_transcoder_computes_what_saelens_computes(kind, saelens, data, tmp_path):
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    asked = {"architecture": kind, **settings}
    saelens.ask("make", folder=str(tmp_path / "theirs"), sae=asked, seed=3, training=False)
    import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K)
    theirs = by_saelens(saelens, tmp_path / "theirs", data, fold_norms=True)
    assert_agree(load(tmp_path / "ours"), theirs, rows(N, D_IN))


def circuit_tracer(task, folder, **how):
    python = python_of(ENVIRONMENT)
    assert python is not None, "run make peers"
    done = subprocess.run(
        [python, SCRIPT, task, folder, json.dumps(how)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    arrays = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("codes", "output"))
    return *arrays, json.loads((folder / "loaded.json").read_text())


@pytest.fixture
def layer_rows(tmp_path):
    """[layers, N, d] rows, in the file that circuit-tracer reads."""
    x_LND = torch.stack([rows(N, D_IN, seed) for seed in range(len(BY_THRESHOLD))])
    np.save(tmp_path / "rows.npy", x_LND.numpy())
    return x_LND


@skips
def test_circuit_tracer_computes_exported_set(skip, layer_rows, tmp_path):
    saes = [
        random_transcoder(name, d_in=D_IN, d_out=D_IN, d_sae=D_SAE, k=K, skip=skip, layer=layer)
        for layer, name in enumerate(BY_THRESHOLD)
    ]
    for layer, sae in enumerate(saes):
        sae.save(tmp_path / f"run-{layer}", hook_name="h")
    runs = [tmp_path / f"run-{layer}" for layer in range(len(saes))]
    export_sae(runs[0], also=runs[1:], out=tmp_path / "set", format="circuit-tracer")
    codes_LNM, output_LND, loaded = circuit_tracer("encode", tmp_path)
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    assert loaded == {**hooks, "scan": "set", "skip": skip}
    for layer, sae in enumerate(saes):
        assert_agree(sae, (codes_LNM[layer], output_LND[layer]), layer_rows[layer])


@skips
@pytest.mark.parametrize("jumprelu", [False, True], ids=["relu", "jumprelu"])
def test_imported_set_computes_what_circuit_tracer_computes(jumprelu, skip, layer_rows, tmp_path):
    shape = {"n_layers": len(layer_rows), "d_model": D_IN, "d_sae": D_SAE}
    codes_LNM, output_LND, _ = circuit_tracer("make", tmp_path, **shape, jumprelu=jumprelu, skip=skip)
    made = import_sae(tmp_path / "set", out=tmp_path / "ours", format="circuit-tracer", k=K)
    assert len(made.folders) == len(layer_rows)
    for layer, folder in enumerate(made.folders):
        sae, W_dec = load(folder), load_file(tmp_path / "set" / f"layer_{layer}.safetensors")["W_dec"]
        codes_NM = codes_LNM[layer] * W_dec.norm(dim=1)
        assert_agree(sae, (codes_NM, output_LND[layer]), layer_rows[layer])
        assert sae.spec.sites[0].name == f"blocks.{layer}.mlp.hook_in"
