"""``measure`` on constructed SAEs with known metrics."""

import pytest
import torch

from saebench.evaluation.synthetic import ReadoutWorld, TreeWorld, ZipfWorld
from saebench.saes.registry import architecture
from saebench.synth.measure import COMMON, SPECIFIC, measure, read


def planted(name, truth, k, **settings):
    """An SAE whose encoder and decoder are the true features."""
    sae_class = architecture(name)
    sae = sae_class(sae_class.Spec(d_sae=truth.n_features, k=k, **settings), truth.d_in)
    with torch.no_grad():
        sae.W_enc_MD.copy_(truth.features_FD)
        sae.W_dec.copy_(truth.features_FD)
    return sae


def test_sae_made_of_true_features_is_perfect_on_tree():
    truth = TreeWorld(level=0).sample(5000, part="test")
    found = measure(planted("topk", truth, 2), truth, "tree")
    assert list(found) == [*COMMON, *SPECIFIC["tree"]]
    assert found["explained_variance"] == pytest.approx(1, abs=1e-4)
    assert found["mcc_hungarian"] == pytest.approx(1) and found["uniqueness"] == 1
    assert found["dead"] == 0 and found["recall"] == 1
    assert found["across_levels"] < 1e-5 and found["matched_cosine"] == pytest.approx(1)


def test_difficulty_and_empty_rate_are_measured_on_codes():
    truth = ZipfWorld(n_features=40, d_in=64, true_l0=4).sample(5000, part="test")
    sae = planted("mutual-choice", truth, 4)
    sae.threshold.fill_(0.5)
    found = measure(sae, truth, "zipf")
    assert found["difficulty_correlation"] > 0.8 and found["density_rank_correlation"] > 0.7
    sae.threshold.fill_(100.0)
    nothing = measure(sae, truth, "zipf")
    assert nothing["empty_rate"] == 1 and nothing["dead"] == 40 and nothing["f1"] == 0


def test_gradient_modes_recover_small_features():
    truth = ReadoutWorld().sample(5000, part="test")
    sae = planted("gradient", truth, 8, beta=10.0)
    sae.gradient_scale.fill_(1.0)
    sae.influence.copy_((truth.gradient_ND @ truth.features_FD.T).abs().mean(0))
    plain, proxy, oracle = (
        measure(sae, truth, "readout", inference=inference) for inference in sae.inferences
    )
    topk = measure(planted("topk", truth, 8), truth, "readout")
    assert plain == topk and plain["changed_picks"] == 0 and plain["small_recall"] < 0.1
    for found in (proxy, oracle):
        assert found["changed_picks"] > 0.2 and found["small_recall"] > 0.5
        assert found["ce_damage"] < plain["ce_damage"] and found["kl"] < plain["kl"]
        assert found["explained_variance"] < plain["explained_variance"]


def test_read_in_blocks_uses_gradient_of_each_row():
    truth = ReadoutWorld().sample(5000, part="test")
    sae = planted("gradient", truth, 8, beta=3.0)
    sae.gradient_scale.fill_(1.0)
    at_once = sae.encode(truth.x_ND, inference="oracle", gradient=truth.gradient_ND)
    assert torch.equal(read(sae, truth, "oracle").to_dense() != 0, at_once.to_dense() != 0)
