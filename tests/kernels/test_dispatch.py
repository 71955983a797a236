"""The choice between fused and eager, and the low-precision copies of weights that fused kernels read."""

from pathlib import Path

import pytest
import torch

import saebench
from saebench_kernels import dispatch, is_fused, kept_copy, rounded

GPU = torch.device("cuda", 0)


@pytest.fixture
def _a_gpu(monkeypatch):
    """Make dispatch believe that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "why_not_fused", lambda index: None)
    dispatch._warn_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_on_a_cpu_are_eager(dtype):
    assert not is_fused("topk_encode", torch.device("cpu"), dtype, k=4, d_sae=64)


@pytest.mark.usefixtures("_a_gpu")
@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "fused", "reason"),
    [
        (GPU, torch.bfloat16, {"k": 1024, "d_sae": 1 << 20}, True, ""),
        (torch.device("cuda"), torch.float16, {}, True, ""),
        (GPU, torch.float32, {}, False, ""),
        (GPU, torch.float32, {"floats": True}, True, ""),
        (GPU, torch.bfloat16, {"k": 1025}, False, "k = 1025 is above 1024"),
        (GPU, torch.bfloat16, {"d_sae": (1 << 20) + 1}, False, "d_sae = 1048577 is above 1048576"),
        (torch.device("cuda", 1), torch.bfloat16, {}, False, "cuda:1 is not the current GPU"),
    ],
)
def test_op_is_fused_by_device_type_and_size_or_warns_once(device, dtype, sizes, fused, reason, caplog):
    for _ in range(2):
        assert is_fused("an_op", device, dtype, **sizes) == fused
    assert len(caplog.messages) == bool(reason)
    assert reason in "".join(caplog.messages)


@pytest.mark.usefixtures("_a_gpu")
def test_missing_triton_makes_ops_eager_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "why_not_fused", lambda index: "triton is not installed")
    assert not is_fused("an_op", GPU, torch.bfloat16)
    assert caplog.messages == ["an_op falls back to eager: triton is not installed"]


def test_low_precision_copy_is_reused_until_its_parameter_changes():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    assert kept_copy(parameter) is None
    copy = rounded(parameter, torch.bfloat16)
    assert torch.equal(copy, parameter.bfloat16()) and not copy.requires_grad
    assert rounded(parameter, torch.bfloat16) is copy is kept_copy(parameter)
    with torch.no_grad():
        parameter.mul_(2)
    assert kept_copy(parameter) is None
    assert torch.equal(rounded(parameter, torch.bfloat16), parameter.bfloat16())
    assert rounded(parameter, torch.float16).dtype == torch.float16
    parameter.data = torch.randn(3, 4)
    assert torch.equal(rounded(parameter, torch.float16), parameter.half())
    assert rounded(parameter, torch.float32).data_ptr() == parameter.data_ptr()


def test_no_copy_is_kept_of_tensors_that_are_not_parameters():
    tensor = torch.randn(3, 4)
    assert rounded(tensor, torch.bfloat16) is not rounded(tensor, torch.bfloat16)
    assert kept_copy(tensor) is None


def test_only_the_kernels_package_imports_fused_kernels():
    package = Path(saebench.__file__).parent
    files = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    assert not [path for path, text in files.items() if "saebench_kernels.fused" in text]
