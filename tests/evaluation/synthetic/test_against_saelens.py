"""Recovery metrics equal those of SAELens with the same names on the same arrays."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saebench.core.codes import SparseCodes
from saebench.evaluation.synthetic import ZipfWorld, recovery_metrics

ROOT = Path(__file__).parents[3]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = """
import json, sys
from safetensors.torch import load_file
from sae_lens.synthetic import evals
for file in sys.argv[1:]:
    t = load_file(file)
    c = evals.compute_classification_metrics(t["z"], t["g"], t["rows"], t["features"])
    directions = t["rows"], t["features"]
    mcc, uniqueness = evals.mean_correlation_coefficient(*directions), evals.feature_uniqueness(*directions)
    print(json.dumps([mcc, uniqueness, c.precision, c.recall, c.f1_score]))
"""
N_FEATURES, N_ROWS = 40, 3000


def noisy(truth, d_sae):
    """Decoder rows [M, D] and codes [N, M] near the true ones, with noise, duplicates and dead latents."""
    generator = torch.Generator().manual_seed(d_sae)
    copied = torch.randint(N_FEATURES, (d_sae,), generator=generator)
    rows_MD = truth.features_FD[copied] + 0.1 * torch.randn(d_sae, truth.d_in, generator=generator)
    noise_NM = torch.randn(N_ROWS, d_sae, generator=generator)
    z_NM = truth.codes.to_dense()[:, copied] * (noise_NM > -1) + noise_NM * (noise_NM.abs() > 2)
    z_NM[:, :5] = 0
    return rows_MD, z_NM


def ours(truth, rows_MD, z_NM):
    row_S, index_S = z_NM.nonzero(as_tuple=True)
    counts_N = torch.bincount(row_S, minlength=N_ROWS)
    offsets = torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])
    codes = SparseCodes.from_ragged(z_NM[row_S, index_S], index_S, offsets, d_sae=z_NM.shape[1])
    found = recovery_metrics(rows_MD, codes, truth)
    return [found.mcc_hungarian, found.uniqueness, found.precision, found.recall, found.f1]


@pytest.mark.peers
def test_recovery_metrics_equal_saelens(tmp_path):
    truth = ZipfWorld(n_features=N_FEATURES, d_in=24, true_l0=4).sample(N_ROWS, part="test")
    found = {}
    for d_sae in (30, 40, 90):
        rows_MD, z_NM = noisy(truth, d_sae)
        arrays = {"rows": rows_MD, "z": z_NM, "features": truth.features_FD, "g": truth.codes.to_dense()}
        save_file(
            {name: array.contiguous() for name, array in arrays.items()}, tmp_path / f"{d_sae}.safetensors"
        )
        found[f"{d_sae}.safetensors"] = ours(truth, rows_MD, z_NM)
    done = subprocess.run(
        [PEER, "-c", PROGRAM, *(str(tmp_path / name) for name in found)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    for mine, their in zip(found.values(), theirs, strict=True):
        assert mine == pytest.approx(their, abs=1e-5)
        assert 0.3 < mine[0] < 0.999 and 0.3 < mine[4] < 0.95 and mine[1] < 1
