"""The list of AuxK's candidates that a GPU's steps use between two calls of refresh_dead."""

import torch

from saebench.saes.base import Batch
from saebench.saes.topk import TopKSAE, TopKSpec


def _sae():
    sae = TopKSAE(TopKSpec(d_sae=40, k=4), 12)
    sae.initialize(_batch(), seed=0)
    return sae


def _batch():
    return Batch(torch.randn(24, 12, generator=torch.Generator().manual_seed(1)))


def test_latents_that_fire_again_have_weight_0_until_the_list_is_refreshed():
    sae, batch = _sae(), _batch()
    sae.tokens_since_fired[:20] = sae.dead_after
    sae.refresh_dead()
    assert sae.n_candidates == 256
    sae.tokens_since_fired[:19] = 0
    candidates = sae.aux_candidates(batch, listed=True)
    assert candidates.latents_A[candidates.weights_A > 0].tolist() == [19]
    sae.refresh_dead()
    candidates = sae.aux_candidates(batch, listed=True)
    assert candidates.latents_A[candidates.weights_A > 0].tolist() == [19]
    sae.tokens_since_fired[:20] = 0
    assert not sae.aux_candidates(batch, listed=True).weights_A.any()
    sae.refresh_dead()
    assert sae.n_candidates == 0 and sae.aux_candidates(batch, listed=True) is None


def test_latent_0_is_a_candidate_only_where_it_is_dead():
    sae = _sae()
    for dead in ([0], [5]):
        sae.tokens_since_fired.zero_()
        sae.tokens_since_fired[dead] = sae.dead_after
        sae.refresh_dead()
        candidates = sae.aux_candidates(_batch(), listed=True)
        assert candidates.latents_A[candidates.weights_A > 0].tolist() == dead


def test_resumed_training_uses_the_list_of_the_last_refresh():
    sae, other = _sae(), _sae()
    sae.tokens_since_fired[3:9] = sae.dead_after
    sae.refresh_dead()
    sae.tokens_since_fired[20:30] = sae.dead_after
    other.load_state_dict(sae.state_dict())
    other.refresh_dead(reuse=True)
    mine, theirs = (one.aux_candidates(_batch(), listed=True) for one in (sae, other))
    assert torch.equal(mine.latents_A, theirs.latents_A) and torch.equal(mine.weights_A, theirs.weights_A)
    assert mine.weights_A.sum() == 6
