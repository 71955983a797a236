"""Training steps of peers in the GPU benchmark lower the loss, at a small size on the CPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from saebench.bench import gpu_peers
from saebench.bench.peer import python_of
from tests.peers.conftest import ENVIRONMENT

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
NAMES = [name for name in gpu_peers._STEPS if name != gpu_peers.COMPILED]  # it needs a C++ compiler
SCRIPT = """
import json, sys, torch
from saebench.bench import gpu_peers
from saebench.bench.gpu_sizes import Size
from saebench.bench.gpu_timing import reason

torch.manual_seed(0)
size = Size(name="tiny", batch_size=64, d_in=16, d_sae=64, k=4)
strengths = torch.rand(128, 32) * (torch.rand(128, 32) < 0.1)
rows = (strengths @ torch.randn(32, 16)).reshape(2, 64, 16).bfloat16()
found = {}
for name in json.loads(sys.argv[1]):
    if name in gpu_peers.STEPS:
        try:
            once = gpu_peers.STEPS[name](size, rows)
            found[name] = [float(once()) for _ in range(101)]
        except Exception as error:
            found[name] = reason(error)
print("\\n" + json.dumps({"steps": found, "versions": gpu_peers.versions()}))
"""


@pytest.fixture(scope="module")
def measured():
    """The versions in the environment of the peers, and the losses of their steps."""
    python = python_of(ENVIRONMENT)
    assert python is not None, "run make peers"
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "app", "data", "kernels"))
    done = subprocess.run(
        [python, "-c", SCRIPT, json.dumps(NAMES)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_step_lowers_loss_of_same_batch(name, measured):
    peer = gpu_peers._STEPS[name][0]
    if peer not in (None, "sae-lens") and measured["versions"][peer] == "not installed":
        pytest.skip(f"{peer} is not installed in {ENVIRONMENT.name}")
    losses = measured["steps"][name]
    assert isinstance(losses, list), losses
    assert losses[-1] < 0.98 * losses[0]  # on the same batch


def test_version_of_saelens_is_found(measured):
    assert measured["versions"]["sae-lens"][0].isdigit()
