"""Ops of matching pursuit against float64: picks replayed, with and without Gram matrix, gradients,
orthogonal."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels import matching_pursuit_encode, matching_pursuit_gradients, orthogonal_pursuit_encode
from saebench_kernels.matching_pursuit_encode import uses_gram

MODULE = sys.modules[matching_pursuit_encode.__module__]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)
sizes = st.tuples(
    st.integers(1, 23), st.integers(1, 19), st.integers(1, 150), st.integers(1, 25), st.integers(0, 999)
)
"""N, D, M, k, seed."""


def problem(n, d, m, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x_ND, atoms_MD = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    return x_ND.to(device), F.normalize(atoms_MD, dim=1).to(device)


@pytest.fixture(params=[False, True], ids=["scan", "gram"])
def proposal(request, monkeypatch):
    """Both ways to propose picks, whatever the shape."""
    monkeypatch.setattr(MODULE, "uses_gram", lambda *shape: request.param)


def replay(x_ND, atoms_MD, values_NK, indices_NK):
    """The float64 residual before each pick, and after the last: K + 1 tensors [N, D]."""
    residuals = [x_ND.double()]
    for value_N, index_N in zip(values_NK.T.double(), indices_NK.T, strict=True):
        residuals.append(residuals[-1] - value_N[:, None] * atoms_MD[index_N].double())
    return residuals


@on_every_device
@pytest.mark.usefixtures("proposal")
@pytest.mark.parametrize("absolute", [False, True])
@settings(max_examples=40, deadline=None)
@given(size=sizes)
def test_every_pick_is_the_best_atom_for_the_residual_that_it_met(device, absolute, size):
    n, d, m, k, seed = size
    x_ND, atoms_MD = problem(n, d, m, seed, device)
    values_NK, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, k, absolute=absolute)
    residuals = replay(x_ND, atoms_MD, values_NK, indices_NK)
    rounding = 2e-6 * x_ND.norm(dim=1).double()
    ended_N = torch.zeros(n, dtype=torch.bool, device=device)
    for t in range(k):
        scores_NM = residuals[t] @ atoms_MD.double().T
        best_N = (scores_NM.abs() if absolute else scores_NM).max(1).values
        ended_N |= values_NK[:, t] == 0
        assert (values_NK[ended_N, t] == 0).all() and (indices_NK[ended_N, t] == 0).all()
        assert (best_N <= rounding)[ended_N].all()
        picked_N = scores_NM.gather(1, indices_NK[:, t, None])[:, 0]
        assert ((picked_N - values_NK[:, t]).abs() <= rounding)[~ended_N].all()
        assert ((picked_N.abs() if absolute else picked_N) >= best_N - rounding)[~ended_N].all()
        after_N = residuals[t + 1].square().sum(1)
        energy_N = residuals[t].square().sum(1) - values_NK[:, t].double().square()
        torch.testing.assert_close(after_N, energy_N, rtol=0, atol=1e-5 * float(x_ND.square().sum(1).max()))


def orthonormal(d, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    q_DD = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return q_DD.float().to(device)


@on_every_device
@pytest.mark.usefixtures("proposal")
@pytest.mark.parametrize("encode", [matching_pursuit_encode, orthogonal_pursuit_encode])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@settings(max_examples=15, deadline=None)
@given(d=st.integers(1, 70), n_atoms=st.integers(0, 70), seed=st.integers(0, 999))
def test_rows_of_orthonormal_atoms_end_with_them(device, encode, absolute, scale, d, n_atoms, seed):
    """No pick but those that the row is made of: what float32 leaves of it afterwards is no correlation."""
    atoms_MD = orthonormal(d, seed, device)
    generator = torch.Generator().manual_seed(seed)
    order_NM = torch.rand(20, d, generator=generator).argsort(dim=1)
    codes_NM = (order_NM < n_atoms) * (1 + torch.rand(20, d, generator=generator))
    if absolute:
        codes_NM *= torch.randint(2, (20, d), generator=generator) * 2 - 1
    codes_NM = (scale * codes_NM).to(device)
    k = min(d, n_atoms) + 5
    values_NK, indices_NK = encode(
        (codes_NM.double() @ atoms_MD.double()).float(), atoms_MD, k, absolute=absolute
    )
    assert torch.equal((values_NK != 0).sum(1), (codes_NM != 0).sum(1))
    found_NM = torch.zeros_like(codes_NM).scatter_add_(1, indices_NK, values_NK)
    assert ((found_NM != 0) == (codes_NM != 0)).all()


@pytest.mark.usefixtures("proposal")
@pytest.mark.parametrize("encode", [matching_pursuit_encode, orthogonal_pursuit_encode])
def test_atoms_that_are_of_norm_1_but_for_rounding_are_not_picked_again(encode):
    generator = torch.Generator().manual_seed(0)
    for d in (16, 64):
        atoms_MD = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        codes_NM = torch.rand(2000, d, generator=generator).argsort(dim=1) < 2
        x_ND = codes_NM * (1 + torch.rand(2000, d, generator=generator)) @ atoms_MD
        assert ((encode(x_ND, atoms_MD, 8)[0] != 0).sum(1) == 2).all()


@on_every_device
@pytest.mark.usefixtures("proposal")
@pytest.mark.parametrize("encode", [matching_pursuit_encode, orthogonal_pursuit_encode])
def test_an_orthonormal_dictionary_gives_each_positive_correlation_once(device, encode):
    """In at most d picks, the largest first; fewer picks are the beginning of more, to the last bit."""
    atoms_MD, (x_ND, _) = orthonormal(48, 0, device), problem(300, 48, 1, 1, device)
    values_NK, indices_NK = encode(x_ND, atoms_MD, 60)
    expected_NM = (x_ND.double() @ atoms_MD.double().T).clamp_min(0)
    sorted_NM = expected_NM.sort(dim=1, descending=True).values
    assert torch.equal((values_NK > 0).sum(1), (expected_NM > 1e-6).sum(1))
    torch.testing.assert_close(values_NK[:, :48].double(), sorted_NM, rtol=0, atol=1e-5)
    assert (values_NK[:, 48:] == 0).all()
    for k in (1, 7, 30):
        fewer_NK, fewer_indices_NK = encode(x_ND, atoms_MD, k)
        assert torch.equal(fewer_indices_NK, indices_NK[:, :k])
        if encode is matching_pursuit_encode:
            assert torch.equal(fewer_NK, values_NK[:, :k])


@on_every_device
@pytest.mark.usefixtures("proposal")
@pytest.mark.parametrize("absolute", [False, True])
def test_picks_agree_with_float64_picks(device, absolute):
    x_ND, atoms_MD = problem(600, 64, 1000, 0, device)
    _, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, 24, absolute=absolute)
    residual_ND, exact_MD = x_ND.double(), atoms_MD.double()
    expected = []
    for _ in range(24):
        scores_NM = residual_ND @ exact_MD.T
        expected.append((scores_NM.abs() if absolute else scores_NM).argmax(1))
        values_N1 = scores_NM.gather(1, expected[-1][:, None])
        residual_ND = residual_ND - values_N1 * exact_MD[expected[-1]]
    agreement = (indices_NK == torch.stack(expected, 1)).double().mean()
    assert agreement >= 0.999, agreement


def test_gram_matrix_is_used_by_shapes_alone():
    assert uses_gram(4096, 4096) and uses_gram(4096, 16_384)
    assert not uses_gram(40_000, 16_385), "D D^T of more than 1 GiB"
    assert not uses_gram(1, 4096), "D D^T costs more than all scans of one row"


@pytest.mark.usefixtures("proposal")
def test_chunks_of_rows_change_nothing(monkeypatch):
    x_ND, atoms_MD = problem(101, 12, 200, 1)
    whole = matching_pursuit_encode(x_ND, atoms_MD, 9)
    monkeypatch.setattr(MODULE, "_CPU_CHUNK_ELEMENTS", 7 * 256)
    for part, all_at_once in zip(matching_pursuit_encode(x_ND, atoms_MD, 9), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-4, atol=1e-5)


@on_every_device
@pytest.mark.usefixtures("proposal")
def test_a_row_ends_when_its_residual_is_below_the_tolerance(device):
    x_ND, atoms_MD = problem(300, 16, 128, 2, device)
    full_NK, picks_NK = matching_pursuit_encode(x_ND, atoms_MD, 20)
    tolerance = 1.3
    values_NK, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, 20, tolerance=tolerance)
    norms_NK = torch.stack(replay(x_ND, atoms_MD, full_NK, picks_NK)[:-1], 1).norm(dim=2)
    kept_NK = norms_NK >= tolerance
    assert len(set(kept_NK.sum(1).tolist())) > 1, "all rows alike: nothing is tested"
    assert torch.equal(values_NK, full_NK * kept_NK) and torch.equal(indices_NK, picks_NK * kept_NK)
    as_tensor = matching_pursuit_encode(x_ND, atoms_MD, 20, tolerance=torch.tensor(tolerance, device=device))
    assert torch.equal(as_tensor[0], values_NK)


@on_every_device
def test_a_low_precision_scan_only_proposes(device, monkeypatch):
    monkeypatch.setattr(MODULE, "uses_gram", lambda *shape: False)
    x_ND, atoms_MD = problem(200, 64, 500, 3, device)
    values_NK, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, 16, scan_dtype=torch.bfloat16)
    *before, after_ND = replay(x_ND, atoms_MD, values_NK, indices_NK)
    energy_N = values_NK.double().square().sum(1) + after_ND.square().sum(1)
    torch.testing.assert_close(energy_N, x_ND.double().square().sum(1), rtol=1e-5, atol=0)
    for t, residual_ND in enumerate(before):
        scores_NM = residual_ND @ atoms_MD.double().T
        assert (scores_NM.max(1).values - values_NK[:, t] <= 0.02 * residual_ND.norm(dim=1)).all()


@on_every_device
def test_no_rows_and_rows_of_zeros(device):
    x_ND, atoms_MD = problem(5, 8, 30, 4, device)
    for encode in (matching_pursuit_encode, orthogonal_pursuit_encode):
        assert encode(x_ND[:0], atoms_MD, 3)[0].shape == (0, 3)
        values_NK, indices_NK = encode(torch.zeros_like(x_ND), atoms_MD, 3)
        assert (values_NK == 0).all() and (indices_NK == 0).all()
        for m in (1, 64):
            cone_MD = F.normalize(5.0 + problem(1, 8, m, 5, device)[1], dim=1)
            assert (encode(-cone_MD[:3], cone_MD, 3)[0] == 0).all(), "all correlations are negative"


@pytest.mark.parametrize("chunk", [None, 200])
@pytest.mark.parametrize("absolute", [False, True])
def test_gradients_equal_finite_differences_with_the_picks_fixed(absolute, chunk, monkeypatch):
    """The unrolled recursion in float64 passes central differences; the op has its gradient."""
    if chunk:
        module = sys.modules[matching_pursuit_gradients.__module__]
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    x_ND, atoms_MD = problem(9, 6, 14, 5)
    values_NK, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, 12, absolute=absolute, tolerance=0.9)
    real_NK = values_NK != 0
    assert 0 < real_NK.sum() < real_NK.numel(), "padding is tested too"
    assert any(len(set(i[r].tolist())) < r.sum() for i, r in zip(indices_NK, real_NK, strict=True)), "repeats"

    def unrolled(x_ND, atoms_MD):
        residual_ND, values = x_ND, []
        for index_N, real_N in zip(indices_NK.T, real_NK.T, strict=True):
            values.append((residual_ND * atoms_MD[index_N]).sum(1) * real_N)
            residual_ND = residual_ND - values[-1][:, None] * atoms_MD[index_N]
        return torch.stack(values, 1)

    exact = [tensor.double().requires_grad_() for tensor in (x_ND, atoms_MD)]
    assert torch.autograd.gradcheck(unrolled, exact, eps=1e-6, atol=1e-7)
    d_values_NK = torch.randn(values_NK.shape, generator=torch.Generator().manual_seed(6))
    expected = torch.autograd.grad(unrolled(*exact), exact, d_values_NK.double())
    got = matching_pursuit_gradients(x_ND, atoms_MD, indices_NK.int(), values_NK, d_values_NK)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-4)


@on_every_device
@pytest.mark.parametrize("absolute", [False, True])
@settings(max_examples=40, deadline=None)
@given(size=sizes)
def test_orthogonal_pursuit_is_least_squares_on_what_it_picked(device, absolute, size):
    n, d, m, k, seed = size
    x_ND, atoms_MD = problem(n, d, m, seed, device)
    values_NK, indices_NK = orthogonal_pursuit_encode(x_ND, atoms_MD, k, absolute=absolute)
    for x_D, value_K, index_K in zip(x_ND.double(), values_NK.double(), indices_NK, strict=True):
        support = index_K[value_K != 0]
        assert len(set(support.tolist())) == len(support) <= d
        picked_TD = atoms_MD[support].double()
        residual_D = x_D - value_K[: len(support)] @ picked_TD
        rounding = 1e-6 * (x_D.norm() + value_K.abs().sum())
        assert (picked_TD @ residual_D).norm() <= rounding
        for t in range(len(support)):
            first_TD = picked_TD[:t]
            before_D = x_D - torch.linalg.lstsq(first_TD.T, x_D).solution @ first_TD if t else x_D
            scores_M = atoms_MD.double() @ before_D
            scores_M = scores_M.abs() if absolute else scores_M
            scores_M[support[:t]] = -torch.inf
            assert scores_M[support[t]] >= scores_M.max() - 1e-5 * x_D.norm()


@on_every_device
def test_orthogonal_pursuit_ends_at_the_tolerance_and_at_atoms_that_add_nothing(device):
    x_ND, atoms_MD = problem(200, 12, 60, 7, device)
    twice_MD = atoms_MD.repeat(2, 1)
    values_NK, indices_NK = orthogonal_pursuit_encode(x_ND, twice_MD, 8)
    assert all(len(set(row.tolist())) == 8 for row in indices_NK % 60), (
        "a copy was picked beside its original"
    )
    torch.testing.assert_close(values_NK, orthogonal_pursuit_encode(x_ND, atoms_MD, 8)[0])
    lone_N1, _ = orthogonal_pursuit_encode(x_ND, atoms_MD[:1].repeat(3, 1), 3)
    assert (lone_N1[:, 1:] == 0).all() and (lone_N1[:, 0] > 0).any()
    stopped_NK, picks_NK = orthogonal_pursuit_encode(x_ND, atoms_MD, 8, tolerance=1.5)
    norms_N = (x_ND - torch.einsum("nk,nkd->nd", stopped_NK, atoms_MD[picks_NK])).norm(dim=1)
    counts_N = (stopped_NK != 0).sum(1)
    assert ((norms_N < 1.5) | (counts_N == 8)).all() and len(set(counts_N.tolist())) > 1
    for t in range(8):
        values_Nt, picks_Nt = orthogonal_pursuit_encode(x_ND, atoms_MD, t) if t else (None, None)
        before_ND = x_ND - torch.einsum("nk,nkd->nd", values_Nt, atoms_MD[picks_Nt]) if t else x_ND
        assert (before_ND.norm(dim=1) >= 1.5 - 1e-4)[counts_N > t].all()


def test_the_first_two_orthogonal_picks_leave_no_more_than_those_of_plain_pursuit():
    x_ND, atoms_MD = problem(300, 16, 40, 8)
    for k in (1, 2):
        left = [
            (x_ND - torch.einsum("nk,nkd->nd", values_NK, atoms_MD[indices_NK])).norm(dim=1)
            for values_NK, indices_NK in (
                orthogonal_pursuit_encode(x_ND, atoms_MD, k),
                matching_pursuit_encode(x_ND, atoms_MD, k),
            )
        ]
        assert (left[0] <= left[1] + 1e-5).all()


@on_every_device
@pytest.mark.parametrize("threads", [1, 2])
def test_everything_repeats_bit_for_bit(device, threads, monkeypatch, small_chunks):
    x_ND, atoms_MD = problem(500, 32, 300, 9, device)

    def all_ops():
        values_NK, indices_NK = matching_pursuit_encode(x_ND, atoms_MD, 12)
        gradients = matching_pursuit_gradients(x_ND, atoms_MD, indices_NK, values_NK, values_NK)
        return values_NK, indices_NK, *gradients, *orthogonal_pursuit_encode(x_ND, atoms_MD, 12)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = [all_ops() for _ in range(3)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 rows for 300 atoms, so that there are several."""
    monkeypatch.setattr(MODULE, "_CPU_CHUNK_ELEMENTS", 64 * 320)
    orthogonal = sys.modules[orthogonal_pursuit_encode.__module__]
    monkeypatch.setattr(orthogonal, "_CHUNK_ELEMENTS", 64 * 64 * 32)


@pytest.mark.parametrize("encode", [matching_pursuit_encode, orthogonal_pursuit_encode])
def test_chunks_on_threads_work_with_parameters_and_in_inference_mode(encode, small_chunks):
    x_ND, atoms_MD = problem(500, 32, 300, 10)
    alone = encode(x_ND, atoms_MD, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        learning = encode(x_ND, atoms_MD.requires_grad_(), 5)
        with torch.inference_mode():
            inferring = encode(x_ND, atoms_MD, 5)
    finally:
        torch.set_num_threads(before)
    assert not learning[0].requires_grad
    for other in (learning, inferring):
        assert torch.equal(other[1], alone[1])
        torch.testing.assert_close(other[0], alone[0], rtol=1e-4, atol=1e-5)
