"""The peers can be imported in their environment with the checkout as working directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from saebench.bench.peer import python_of
from tests.peers.conftest import ENVIRONMENT

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import BertForPreTraining",
        "import sae_lens",
        "import sparsify",
        "from circuit_tracer.transcoder import TranscoderSet",
    ],
)
def test_folders_of_checkout_do_not_shadow_packages(code: str) -> None:
    """transformers tries to import Hugging Face's ``kernels``; the checkout has a folder of that name."""
    python = python_of(ENVIRONMENT)
    assert python is not None, "run make peers"
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
