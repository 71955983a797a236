"""The loss of choice SAEs as one function of fused kernels: the numbers and gradients of the eager one."""

import copy

import pytest
import torch

from saebench.saes.base import Batch
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.training import optimizer as optimizing
from tests.kernels.fused.problems import DEVICE

N, D_IN, D_SAE, K = 24, 12, 40, 4


def _sae(kind, **settings):
    spec_class, sae_class = {"topk": (TopKSpec, TopKSAE), "mutual": (MutualChoiceSpec, MutualChoiceSAE)}[kind]
    sae = sae_class(spec_class(d_sae=D_SAE, k=K, **settings), D_IN)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    sae.normalize_decoder()
    return sae.to(DEVICE)


def _batch(seed=1):
    return Batch(torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed)).to(DEVICE))


def _gradients(sae, terms):
    sae.zero_grad()
    terms.total.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("n_dead", [0, 1, 17])
@pytest.mark.parametrize("kind", ["topk", "mutual"])
def test_loss_and_gradients_are_those_of_the_eager_road(kind, n_dead):
    sae, batch = _sae(kind, k_aux=6), _batch()
    with torch.no_grad():
        chosen = sae.choose(batch)
    quiet = torch.ones(D_SAE, dtype=torch.bool, device=DEVICE)
    quiet[chosen.indices.long()] = False
    assert quiet.sum() >= n_dead
    sae.tokens_since_fired[quiet.nonzero()[:n_dead, 0]] = sae.dead_after
    sae.refresh_dead()
    eager, fused = sae.loss(batch), sae.fused_terms(batch, chosen)
    assert (eager.auxiliary > 0) == (n_dead > 0)
    for name in ("total", "reconstruction", "auxiliary", "error"):
        torch.testing.assert_close(getattr(fused, name), getattr(eager, name), rtol=1e-4, atol=1e-5, msg=name)
    expected, found = _gradients(sae, eager), _gradients(sae, fused)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_latents_that_fire_again_are_no_candidates_until_the_next_look():
    sae, batch = _sae("topk"), _batch()
    with torch.no_grad():
        chosen = sae.choose(batch)
    sae.tokens_since_fired[:20] = sae.dead_after
    sae.refresh_dead()
    assert sae.n_candidates == 256
    sae.tokens_since_fired[:19] = 0
    one = sae.fused_terms(batch, chosen).auxiliary
    sae.refresh_dead()
    torch.testing.assert_close(sae.fused_terms(batch, chosen).auxiliary, one)
    sae.tokens_since_fired[:20] = 0
    assert sae.fused_terms(batch, chosen).auxiliary == 0
    sae.refresh_dead()
    assert sae.n_candidates == 0
    assert sae.fused_terms(batch, chosen).auxiliary == 0


def test_a_resumed_training_goes_on_with_the_candidates_of_the_last_look():
    sae = _sae("topk")
    sae.tokens_since_fired[3:9] = sae.dead_after
    sae.refresh_dead()
    sae.tokens_since_fired[20:30] = sae.dead_after
    other = _sae("topk")
    other.load_state_dict(sae.state_dict())
    other.refresh_dead(reuse=True)
    batch = _batch()
    assert torch.equal(other.revival(batch).candidates_A, sae.revival(batch).candidates_A)
    assert torch.equal(other.revival(batch).weights_A, sae.revival(batch).weights_A)
    assert sae.revival(batch).weights_A.sum() == 6


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3, 1e3])
def test_the_fused_optimizer_step_equals_the_separate_ones(grad_clip):
    eager = _sae("topk")
    fused = copy.deepcopy(eager)
    steps = {eager: optimizing.optimizer_step, fused: optimizing._fused_step}
    optimizers = {sae: optimizing.make_optimizer(sae) for sae in steps}
    is_finite = torch.ones((), dtype=torch.bool, device=DEVICE)
    for seed in range(5):
        norms = []
        for sae, step in steps.items():
            _gradients(sae, sae.loss(_batch(seed)))
            norms.append(step(sae, optimizers[sae], lr=1e-2, grad_clip=grad_clip, is_finite=is_finite))
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    for name, parameter in eager.named_parameters():
        mine = dict(fused.named_parameters())[name]
        torch.testing.assert_close(mine, parameter, rtol=1e-5, atol=1e-6, msg=name)
        state, other = optimizers[fused].state[mine], optimizers[eager].state[parameter]
        assert state["step"] == other["step"] == 5
        torch.testing.assert_close(state["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-5, atol=1e-9)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    fused.W_enc_MD.grad[0, 0] = torch.nan
    optimizing._fused_step(fused, optimizers[fused], lr=1e-2, grad_clip=grad_clip, is_finite=is_finite)
    assert not is_finite and optimizers[fused].state[fused.b_dec]["step"] == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in fused.state_dict().items())
