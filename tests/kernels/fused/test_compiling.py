"""All fused kernels compile, and fit into shared memory, for A100 and H100; the interpreter does not check
it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saebench_kernels.fused.scan

FOLDER = Path(saebench_kernels.fused.scan.__file__).parent
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability (A100 and H100)."""


@pytest.mark.timeout(1800)  # 20 seconds of work, but they wait on a loaded machine
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compiling.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr[-3000:]
    shared = json.loads(made.stdout.splitlines()[-1])
    launched = {
        name for path in FOLDER.glob("*.py") for name in re.findall(r"^ *(_\w+)\[", path.read_text(), re.M)
    }
    assert len(launched) > 15 and launched == set(shared)
    too_large = {name: size for name, size in shared.items() if size > SHARED[capability]}
    assert not too_large
