"""Feature choice: each latent's largest pre-activations, against a stable sort of every column."""

import pytest
import torch

from saebench_kernels.fused.by_latent import select_by_latent
from tests.kernels.fused.problems import DEVICE, HALVES, ON_GPU, SLOW_INTERPRETED, TILES, problem

SHAPES = [
    (1, 1, 1),
    (5, 24, 40),
    (33, 7, 19),
    pytest.param((3, 16, 130), marks=SLOW_INTERPRETED),
    *([(8192, 768, 4096), (4099, 63, 1001)] * ON_GPU),
]
"""N, D, M."""


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_latent_keeps_its_largest(shape, dtype):
    n, d, m = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    budgets_M = torch.randint(0, n + 1, (m,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    budgets_M[0] = n  # all that are positive
    values_S, indices_S, offsets = select_by_latent(x_ND, W_MD, b_M, budgets_M, tiles=TILES)
    rows_S = torch.repeat_interleave(offsets.diff())
    assert len(offsets) == n + 1 and offsets[-1] == len(values_S)
    assert (values_S > 0).all()
    key_S = rows_S * m + indices_S
    assert (key_S.diff() > 0).all()  # ascending, and no pair twice

    exact_NM = (x_ND.double() @ W_MD.double().T + b_M.double()).relu()
    exact_S = exact_NM[rows_S, indices_S.long()]
    # The bias, in two parts, has twice as many bits as the type.
    slack = 2 * torch.finfo(dtype).eps
    assert ((values_S.double() - exact_S).abs() <= slack * exact_S + d * 1e-6 + 1e-3 * slack).all()
    kept_NM = torch.zeros(n, m, dtype=torch.bool, device=DEVICE)
    kept_NM[rows_S, indices_S.long()] = True
    n_positive_M = (exact_NM > 1e-3).sum(0)
    assert (kept_NM.sum(0) >= torch.minimum(budgets_M, n_positive_M)).all()
    assert (kept_NM.sum(0) <= budgets_M).all()
    smallest_M = torch.where(kept_NM, exact_NM, torch.inf).amin(0)
    largest_left_M = torch.where(kept_NM, 0, exact_NM).amax(0)
    full_M = kept_NM.sum(0) == budgets_M
    reached = smallest_M * (1 + 2 * slack) + d * 2e-6 >= largest_left_M
    assert reached[full_M & (budgets_M > 0)].all()


def test_of_equal_values_those_of_the_first_rows_are_kept():
    x_ND = torch.tensor([[1.0], [2.0], [1.0], [1.0], [-1.0]], dtype=torch.bfloat16, device=DEVICE)
    W_MD = torch.tensor([[1.0], [1.0], [-1.0], [1.0]], dtype=torch.bfloat16, device=DEVICE)
    budgets_M = torch.tensor([2, 3, 2, 0], device=DEVICE)
    values_S, indices_S, offsets = select_by_latent(
        x_ND, W_MD, torch.zeros(4, device=DEVICE), budgets_M, tiles=TILES
    )
    assert offsets.tolist() == [0, 2, 4, 5, 5, 6]
    assert indices_S.tolist() == [0, 1, 0, 1, 1, 2]
    assert values_S.tolist() == [1, 1, 2, 2, 1, 1]
