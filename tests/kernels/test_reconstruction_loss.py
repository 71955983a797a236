"""The fused reconstruction loss against the eager one: values and gradients."""

import pytest
import torch

from saebench_kernels import AuxCandidates, Entries, SaeWeights
from saebench_kernels.reconstruction_loss import (
    is_reconstruction_loss_fused,
    reconstruction_loss,
    reconstruction_loss_eager,
    reconstruction_loss_fused,
)
from tests.kernels.fused.problems import DEVICE

N, D, M, K = 24, 12, 40, 4


def _problem(*, ragged, n_dead, weighted=False, n_slots=32, d_out=None):
    """Rows, weights, entries with their values, and candidates of AuxK that no entry uses.

    With ``d_out`` they are those of a transcoder, and its target comes last.
    """
    generator = torch.Generator().manual_seed(0)
    width = d_out or D
    shapes = ((M, D), (M,), (M, width), (width,), *([(D,)] if d_out else []))
    weights = SaeWeights(*(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes))
    x_ND = torch.randn(N, D, generator=generator).to(DEVICE)
    target_NE = torch.randn(N, d_out, generator=generator).to(DEVICE) if d_out else None
    pre_NM = ((x_ND - weights.input_bias_D) @ weights.W_enc_MD.T + weights.b_enc_M).relu()
    pre_NM[:, M - n_dead :] = 0
    top = pre_NM.topk(K, dim=1)
    if ragged:
        kept_NM = torch.zeros_like(pre_NM).scatter_(1, top.indices, top.values)
        rows_S, indices_S = kept_NM.nonzero(as_tuple=True)
        values_S = kept_NM[rows_S, indices_S]
        offsets = torch.searchsorted(rows_S, torch.arange(N + 1, device=DEVICE))
        entries = Entries(indices_S.int(), M, N, offsets=offsets)
    else:
        values_S, entries = top.values.flatten(), Entries(top.indices.int().flatten(), M, N, k=K)
    candidates = None
    if n_dead:
        latents_A = torch.zeros(n_slots, dtype=torch.int64, device=DEVICE)
        latents_A[:n_dead] = torch.arange(M - n_dead, M)
        weights_A = torch.zeros(n_slots, device=DEVICE)
        weights_A[:n_dead] = 1 / torch.arange(1, n_dead + 1) if weighted else 1.0
        candidates = AuxCandidates(latents_A, weights_A, 6, weighted)
    for weight in weights[:4]:
        weight.requires_grad_()
    if d_out:
        return x_ND, values_S, entries, weights, candidates, target_NE
    return x_ND, values_S, entries, weights, candidates


def _gradients(loss, weights):
    return torch.autograd.grad(loss.objective + loss.auxiliary / 32, weights[:4])


@pytest.mark.parametrize(("n_dead", "weighted"), [(0, False), (1, False), (17, False), (17, True)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("d_out", [D, 5, 19])
def test_fused_loss_and_gradients_of_a_transcoder_equal_the_eager_ones(d_out, ragged, n_dead, weighted):
    x_ND, values_S, entries, weights, candidates, target_NE = _problem(
        ragged=ragged, n_dead=n_dead, weighted=weighted, d_out=d_out
    )
    eager = reconstruction_loss_eager(x_ND, values_S, entries, weights, candidates, target_NE=target_NE)
    fused = reconstruction_loss_fused(
        target_NE, x_ND - weights.b_in_D, values_S, entries, weights, candidates
    )
    for name, mine, theirs in zip(eager._fields, fused, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in zip(_gradients(fused, weights), _gradients(eager, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n_dead", "weighted"), [(0, False), (1, False), (17, False), (17, True)])
@pytest.mark.parametrize("ragged", [False, True])
def test_fused_loss_and_gradients_equal_the_eager_ones(ragged, n_dead, weighted):
    x_ND, values_S, entries, weights, candidates = _problem(ragged=ragged, n_dead=n_dead, weighted=weighted)
    centered_ND = (x_ND - weights.b_dec_E).detach()
    eager = reconstruction_loss_eager(x_ND, values_S, entries, weights, candidates)
    fused = reconstruction_loss_fused(x_ND, centered_ND, values_S, entries, weights, candidates)
    assert (eager.auxiliary > 0) == (n_dead > 0)
    for name, mine, theirs in zip(eager._fields, fused, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in zip(_gradients(fused, weights), _gradients(eager, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_candidates_of_weight_0_change_nothing():
    x_ND, values_S, entries, weights, candidates = _problem(ragged=False, n_dead=5)
    padded = reconstruction_loss_eager(x_ND, values_S, entries, weights, candidates)
    short = AuxCandidates(candidates.latents_A[:5], candidates.weights_A[:5], candidates.k_aux)
    exact = reconstruction_loss_eager(x_ND, values_S, entries, weights, short)
    torch.testing.assert_close(padded.auxiliary, exact.auxiliary)
    for mine, theirs in zip(_gradients(padded, weights), _gradients(exact, weights), strict=True):
        torch.testing.assert_close(mine, theirs)
    centered_ND = (x_ND - weights.b_dec_E).detach()
    none = candidates._replace(weights_A=torch.zeros_like(candidates.weights_A))
    assert reconstruction_loss_eager(x_ND, values_S, entries, weights, none).auxiliary == 0
    assert reconstruction_loss_fused(x_ND, centered_ND, values_S, entries, weights, none).auxiliary == 0


def test_centered_rows_in_float32_take_the_eager_form():
    x_ND, values_S, entries, weights, candidates = _problem(ragged=False, n_dead=3)
    assert not is_reconstruction_loss_fused(DEVICE, torch.float32, k=K, d_sae=M)
    found = reconstruction_loss(
        x_ND, (x_ND - weights.b_dec_E).detach(), values_S, entries, weights, candidates
    )
    expected = reconstruction_loss_eager(x_ND, values_S, entries, weights, candidates)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
