"""Each claim follows its rule, for constructed scores on both sides of the rule."""

import pytest

from saebench.synth.claims import claims
from saebench.synth.scores import Score

FILLER = {"explained_variance": 0.5, "dead": 0.0, "ce_damage": 1.0, "kl": 1.0, "small_recall": 0.5}
TREE = {"across_levels": 0.0, "within_level_error": 0.0, "matched_cosine": 1.0}


def score(data, sae, spread=0.001, l0=8.0, n_seeds=3, **values):
    means = {**FILLER, **TREE, **values, "l0": l0}
    shifts = [spread * (seed - 1) for seed in range(n_seeds)]
    return Score(
        data=data,
        sae=sae,
        k=8,
        test_rows=1,
        values={name: [mean + s for s in shifts] for name, mean in means.items()},
    )


def verdict(beginning, *scores):
    (claim,) = [claim for claim in claims(scores) if claim.text.startswith(beginning)]
    return claim.holds


@pytest.mark.parametrize("sae", ["mutual-choice", "feature-choice"])
class TestReconstruction:
    def test_better_reconstruction_needs_difference_beyond_spread(self, sae):
        text = f"{sae} reconstructs better"
        topk = score("zipf", "topk")
        assert verdict(text, topk, score("zipf", sae, explained_variance=0.51)) is True
        assert verdict(text, topk, score("zipf", sae, explained_variance=0.5019)) is False
        assert verdict(text, topk, score("zipf", sae, explained_variance=0.4)) is False
        assert verdict(text, topk, score("zipf", sae, explained_variance=0.51, l0=8.5)) is False
        assert verdict(text, topk, score("zipf", sae, explained_variance=0.51, n_seeds=1)) is None
        assert verdict(text, topk, score("zipf-constant", sae, explained_variance=0.51)) is None

    def test_equal_reconstruction_allows_small_difference(self, sae):
        text = f"{sae} reconstructs as well"
        topk = score("zipf-constant", "topk")
        assert verdict(text, topk, score("zipf-constant", sae, explained_variance=0.504)) is True
        assert verdict(text, topk, score("zipf-constant", sae, explained_variance=0.506)) is False
        assert verdict(text, topk, score("zipf-constant", sae, explained_variance=0.494)) is False
        assert verdict(text, topk, score("zipf-constant", sae, 0.01, explained_variance=0.506)) is True
        assert verdict(text, topk, score("zipf-constant", sae, l0=7.5)) is False
        assert verdict(text, topk) is None


def test_failed_equality_claim_names_better_sae():
    scores = [score("zipf-constant", "topk"), score("zipf-constant", "mutual-choice", explained_variance=0.6)]
    (claim,) = [claim for claim in claims(scores) if claim.text.startswith("mutual-choice reconstructs as")]
    assert claim.holds is False and claim.evidence.endswith("; mutual-choice is better")


def test_fewest_dead_latents_are_summed_over_all_data():
    text = "feature-choice leaves the fewest"

    def at(feature, topk):
        own = [score(data, "feature-choice", dead=dead) for data, dead in zip("ab", feature, strict=True)]
        return [*own, *(score(data, "topk", dead=dead) for data, dead in zip("ab", topk, strict=True))]

    assert verdict(text, *at((0, 0), (3, 0))) is True
    assert verdict(text, *at((0, 2), (3, 0))) is True
    assert verdict(text, *at((4, 0), (0, 3))) is False
    # The claim fails on a tie with TopK, holds on a tie with another SAE, and fails if another SAE has fewer.
    assert verdict(text, *at((0, 0), (0, 0))) is False
    assert verdict(text, *at((0, 0), (0.003, 0))) is False, "2 x 0.002 is the spread of the sums"
    for other, holds in ((0, True), (2, True), (-1, False)):
        rivals = [score("a", "mutual-choice", dead=other), score("b", "mutual-choice", dead=0)]
        assert verdict(text, *at((0, 0), (3, 0)), *rivals) is holds
    # SAEs that are not trained on the same data, or that read the labels, are not compared.
    assert verdict(text, *at((4, 0), (9, 9)), score("a", "gradient-beta1 (plain)", dead=0)) is True
    oracle = [score(data, "gradient-beta1 (oracle)", dead=0) for data in "ab"]
    assert verdict(text, *at((4, 0), (9, 9)), *oracle) is True
    assert verdict(text, score("a", "topk")) is None
    assert verdict(text, score("a", "feature-choice")) is None
    assert verdict(text, score("a", "feature-choice"), score("a", "relu", dead=9)) is None


def test_ties_in_dead_latents_are_in_evidence():
    scores = [score("a", sae) for sae in ("feature-choice", "topk", "relu")]
    (claim,) = [claim for claim in claims(scores) if claim.text.startswith("feature-choice leaves")]
    assert claim.evidence.endswith("; no difference beyond the spread: relu, topk")


@pytest.mark.parametrize("inference", ["plain", "oracle"])
def test_less_damage_is_tested_for_each_beta_and_inference_mode(inference):
    seen = {"plain": "", "oracle": " (which reads the labels)"}[inference]
    text = f"gradient with beta 3, in mode {inference}{seen}, damages"
    topk = score("readout", "topk")
    label = f"gradient-beta3 ({inference})"
    assert verdict(text, topk, score("readout", label, ce_damage=0.9)) is True
    assert verdict(text, topk, score("readout", label, ce_damage=1.1)) is False
    assert verdict(text, topk, score("readout", label, ce_damage=0.9985)) is False
    assert verdict(text, topk, score("readout", label, ce_damage=0.9, l0=7)) is False
    assert verdict(text, topk, score("readout", "gradient-beta1 (proxy)", ce_damage=0.9)) is None


@pytest.mark.parametrize("rival", ["topk", "mutual-choice"])
def test_orthogonality_must_hold_only_for_pursuit_at_each_correlated_level(rival):
    text = f"matching-pursuit keeps conditional orthogonality on the tree, where {rival}"

    def at(level, mine, other):
        names = ("across_levels", "within_level_error")
        return [
            score(f"tree-{level}", "matching-pursuit", **dict(zip(names, mine, strict=True))),
            score(f"tree-{level}", rival, **dict(zip(names, other, strict=True))),
        ]

    kept, lost, flat = (0.05, 0.05), (0.3, 0.05), (0.05, 0.3)
    assert verdict(text, *at(4, kept, lost), *at(8, kept, flat)) is True
    assert verdict(text, *at(4, kept, lost), *at(8, flat, lost)) is False
    assert verdict(text, *at(4, kept, lost), *at(8, kept, kept)) is False
    assert verdict(text, *at(0, kept, kept), *at(4, kept, lost)) is True
    assert verdict(text, *at(0, kept, lost)) is None
    assert verdict(text, *at(4, kept, lost), score("tree-8", rival)) is None


def test_nearer_directions_must_hold_at_each_correlated_level():
    text = "matching-pursuit's directions"

    def at(level, mine):
        return [
            score(f"tree-{level}", "matching-pursuit", matched_cosine=mine),
            score(f"tree-{level}", "mutual-choice", matched_cosine=0.8),
        ]

    assert verdict(text, *at(3, 0.9), *at(4, 0.9)) is True
    assert verdict(text, *at(3, 0.9), *at(4, 0.8)) is False
    assert verdict(text) is None


def test_evidence_has_means_and_deviations():
    found = claims([score("zipf", "topk"), score("zipf", "mutual-choice", explained_variance=0.75)])
    assert found[0].verdict == "holds" and "0.75 \u00b1 0.001 against 0.5 \u00b1 0.001" in found[0].evidence
    assert found[1].verdict == "not tested" and "feature-choice" in found[1].evidence
