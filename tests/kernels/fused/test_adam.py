"""The fused optimizer step against torch.optim.Adam and the separate steps around it."""

import pytest
import torch

from saebench_kernels.fused.adam import adam_coefficients, fused_adam, gradient_squares
from saebench_kernels.fused.center import center, column_sums
from tests.kernels.fused.problems import DEVICE, ON_GPU

BETAS, EPS = (0.9, 0.999), 6.25e-10


def _coefficients(step, lr, clip=1.0, is_finite=1.0):
    numbers = [lr / (1 - BETAS[0] ** step), (1 - BETAS[1] ** step) ** 0.5, clip, is_finite]
    return torch.tensor(numbers, device=DEVICE)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 100_000])
@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e9])
def test_coefficients_are_those_of_adam_and_of_clipping(step, grad_clip):
    squares = torch.rand(10_000, generator=torch.Generator().manual_seed(step)).to(DEVICE)
    is_finite = torch.ones((), dtype=torch.bool, device=DEVICE)
    before, lr = (
        torch.tensor(step - 1.0, device=DEVICE),
        torch.tensor(1e-3, dtype=torch.float64, device=DEVICE),
    )
    found_4, norm = adam_coefficients(squares, before, is_finite, lr, betas=BETAS, grad_clip=grad_clip)
    exact = squares.double().sum().sqrt()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    clip = min(1.0, float(grad_clip / (exact + 1e-6))) if grad_clip else 1.0
    torch.testing.assert_close(found_4, _coefficients(step, 1e-3, clip), rtol=1e-6, atol=0)
    squares[77] = torch.nan
    found_4, _ = adam_coefficients(squares, before, is_finite, lr, betas=BETAS, grad_clip=grad_clip)
    assert not is_finite and found_4[3] == 0


MATRICES = [(7, 5), (3, 33), (2, 1100), *([(1000, 768)] * ON_GPU)]


@pytest.mark.parametrize(
    ("shape", "unit"), [((1,), False), *((shape, unit) for shape in MATRICES for unit in (False, True))]
)
def test_fused_adam_equals_torch_adam_over_many_steps(shape, unit):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    if unit:
        start = torch.nn.functional.normalize(start)
    theirs = torch.nn.Parameter(start.double().to(DEVICE))
    optimizer = torch.optim.Adam([theirs], lr=1e-2, betas=BETAS, eps=EPS)
    mine = start.clone().to(DEVICE)
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    low = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    for step in range(1, 1001 if ON_GPU else 41):
        grad = torch.randn(shape, generator=generator).to(DEVICE)
        theirs.grad = grad.double()
        if unit:
            theirs.grad -= (theirs.grad * theirs.data).sum(1, keepdim=True) * theirs.data
        theirs.grad *= 0.25
        squares = gradient_squares(grad, unit=mine if unit else None)
        torch.testing.assert_close(
            squares.sum().double().sqrt(), 4 * theirs.grad.norm(), rtol=1e-5, atol=1e-6
        )
        optimizer.step()
        if unit:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        how = {"betas": BETAS, "eps": EPS, "project": unit, "unit_rows": unit, "low": low}
        fused_adam(mine, m, v, grad, _coefficients(step, 1e-2, clip=0.25), **how)
    torch.testing.assert_close(mine.double(), theirs.data, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(
        low.float(), mine, rtol=2**-7, atol=0
    )  # the interpreter does not round, it cuts
    assert torch.equal(low, mine.bfloat16()) or not ON_GPU
    if unit:
        assert (mine.double().norm(dim=1) - 1).abs().max() < 1e-6


def test_step_that_is_not_finite_changes_nothing():
    parameter = torch.nn.functional.normalize(torch.randn(6, 20)).to(DEVICE)
    state = [parameter, torch.rand(6, 20).to(DEVICE), torch.rand(6, 20).to(DEVICE)]
    before = [tensor.clone() for tensor in state]
    grad = torch.full_like(parameter, torch.nan)
    fused_adam(*state, grad, _coefficients(3, 1.0, is_finite=0.0), betas=BETAS, eps=EPS, unit_rows=True)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert gradient_squares(grad).sum().isnan()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 33)])
def test_center_scales_and_subtracts(shape):
    x_ND, offset_D = torch.randn(shape).bfloat16().to(DEVICE), torch.randn(shape[1]).to(DEVICE)
    assert torch.equal(center(x_ND, None, torch.float32, scale=2.0), x_ND.float() * 2)
    expected_ND = (x_ND.double() * 0.3 - offset_D.double()).float()
    torch.testing.assert_close(
        center(x_ND, offset_D, torch.float32, scale=0.3), expected_ND, rtol=1e-6, atol=1e-6
    )
    found_ND = center(x_ND, offset_D, torch.bfloat16, scale=0.3)
    torch.testing.assert_close(found_ND.float(), expected_ND, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 130)])
def test_column_sums_equal_sums_in_float64(shape):
    x_NC = torch.randn(shape).bfloat16().to(DEVICE)
    torch.testing.assert_close(column_sums(x_NC).double(), x_NC.double().sum(0), rtol=1e-5, atol=1e-5)
