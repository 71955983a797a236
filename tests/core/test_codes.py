"""SparseCodes against dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.codes import SparseCodes

D_SAE = 7
ENTRY = st.tuples(st.integers(0, D_SAE - 1), st.sampled_from([-1.5, 0.0, 0.5, 2.0]))


@st.composite
def rows(draw: st.DrawFn, *, rectangular: bool) -> list[list[tuple[int, float]]]:
    """Rows of (latent, value) with repeats and zero padding."""
    n, k = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    lengths = [k] * n if rectangular else [draw(st.integers(0, 5)) for _ in range(n)]
    return [draw(st.lists(ENTRY, min_size=size, max_size=size)) for size in lengths]


def ragged(entries: list[list[tuple[int, float]]]) -> SparseCodes:
    flat = [entry for row in entries for entry in row]
    offsets = torch.tensor([0, *(len(row) for row in entries)]).cumsum(0)
    index = torch.tensor([i for i, _ in flat], dtype=torch.int64)
    return SparseCodes.from_ragged(
        torch.tensor([v for _, v in flat], dtype=torch.float32), index, offsets, d_sae=D_SAE
    )


def dense(entries: list[list[tuple[int, float]]]) -> np.ndarray:
    out = np.zeros((len(entries), D_SAE), dtype=np.float32)
    for n, row in enumerate(entries):
        for index, value in row:
            out[n, index] += value
    return out


def check_against_dense(codes: SparseCodes, entries: list[list[tuple[int, float]]]) -> None:
    np.testing.assert_array_equal(codes.to_dense().numpy(), dense(entries))
    assert codes.l0().tolist() == [len({i for i, v in row if v}) for row in entries]
    expected = [(n, i, v) for n, row in enumerate(entries) for i, v in row if v]
    row, index, value = codes.coo()
    assert list(zip(row.tolist(), index.tolist(), value.tolist(), strict=True)) == expected
    row, index, value = codes.merged()
    where = np.nonzero(dense(entries))
    np.testing.assert_array_equal(np.stack([row, index]), where)
    np.testing.assert_array_equal(value, dense(entries)[where])
    assert codes.rows().tolist() == [n for n, row in enumerate(entries) for _ in row]
    assert codes.row_offsets.tolist() == [0, *np.cumsum([len(row) for row in entries], dtype=int)]


@given(rows(rectangular=False))
@settings(deadline=None)
def test_ragged_codes_equal_dense(entries: list[list[tuple[int, float]]]) -> None:
    codes = ragged(entries)
    check_against_dense(codes, entries)
    check_against_dense(codes.to("cpu"), entries)


@given(rows(rectangular=True).filter(bool))
@settings(deadline=None)
def test_rectangular_codes_equal_dense(entries: list[list[tuple[int, float]]]) -> None:
    index = torch.tensor([[i for i, _ in row] for row in entries])
    values = torch.tensor([[v for _, v in row] for row in entries])
    codes = SparseCodes.from_topk(values, index, d_sae=D_SAE)
    check_against_dense(codes, entries)
    got_index, got_values = codes.rectangular()
    assert torch.equal(got_index, index.int())
    assert torch.equal(got_values, values)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0, 3), (0,)])
def test_leading_shape_is_kept(shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape, dtype=int))
    values = torch.rand(n, 2) + 1
    codes = SparseCodes.from_topk(values, torch.tensor([0, 3]).expand(n, 2), d_sae=5, leading_shape=shape)
    assert codes.n_rows == n
    assert codes.to_dense().shape == (*shape, 5)
    assert codes.l0().shape == shape
    assert (codes.l0() == 2).all()


def test_padding_has_no_gradient_and_repeats_share_it() -> None:
    values = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    codes = SparseCodes.from_topk(values, torch.tensor([[1, 0, 1]]), d_sae=3)
    (codes.to_dense() * torch.tensor([5.0, 7.0, 9.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[7.0, 0.0, 7.0]]


def test_codes_of_wrong_shape_raise_assertion_error() -> None:
    with pytest.raises(AssertionError):
        SparseCodes.from_topk(torch.ones(4, 2), torch.zeros(4, 2), d_sae=3, leading_shape=(3,))
    with pytest.raises(AssertionError):
        SparseCodes(torch.zeros(2, dtype=torch.int32), torch.ones(2), 3, (1,))


def test_repr_shows_shape_without_values() -> None:
    codes = SparseCodes.from_topk(torch.ones(6, 3), torch.zeros(6, 3), d_sae=D_SAE, leading_shape=(2, 3))
    assert repr(codes) == "SparseCodes([2, 3] of 7 latents, k=3, cpu)"
