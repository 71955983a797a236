"""Which road an op takes, and the copies of weights that the fused one reads."""

import pytest
import torch

from saebench_kernels import dispatch, is_fused, kept_copy, rounded

GPU = torch.device("cuda", 0)


@pytest.fixture
def _a_gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "why_not_fused", lambda index: None)
    dispatch._warn_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_takes_the_eager_road(dtype):
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
def test_the_table_and_one_line_for_what_could_be_expected(device, dtype, sizes, fused, reason, caplog):
    for _ in range(2):
        assert is_fused("an_op", device, dtype, **sizes) == fused
    assert len(caplog.messages) == bool(reason)
    assert reason in "".join(caplog.messages)


@pytest.mark.usefixtures("_a_gpu")
def test_without_triton_it_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "why_not_fused", lambda index: "triton is not installed")
    assert not is_fused("an_op", GPU, torch.bfloat16)
    assert caplog.messages == ["an_op falls back to eager: triton is not installed"]


def test_a_copy_lasts_until_its_parameter_changes():
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


def test_of_other_tensors_no_copy_is_kept():
    tensor = torch.randn(3, 4)
    assert rounded(tensor, torch.bfloat16) is not rounded(tensor, torch.bfloat16)
    assert kept_copy(tensor) is None
