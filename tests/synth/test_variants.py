"""The SAEs that the suite trains on each data set."""

import pytest

from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.synth.data import data_sets
from saebench.synth.variants import BETAS, variants

DATA = {data.name: data for data in data_sets(["tree", "zipf", "readout"], full=False)}


def test_default_is_all_architectures_and_aliases_count_once():
    names = [variant.name for variant in variants((), DATA["zipf"])]
    assert names == [name for name in ARCHITECTURES if not architecture(name).uses_gradients]
    aliased = variants(("batchtopk", "mutual-choice"), DATA["zipf"])
    assert [variant.sae for variant in aliased] == ["mutual-choice"]


def test_gradient_sae_is_trained_for_each_beta_on_data_with_gradients():
    made = variants(("gradient",), DATA["readout"])
    assert [variant.spec(DATA["readout"]).beta for variant in made] == list(BETAS)
    assert {variant.inferences for variant in made} == {("plain", "proxy", "oracle")}
    assert variants(("gradient",), DATA["zipf"]) == []


@pytest.mark.parametrize("name", ["tree-4", "readout"])
def test_specs_have_width_and_k_of_data(name):
    data = DATA[name]
    for variant in variants((), data):
        spec = variant.spec(data)
        k = data.d_sae if name == "tree-4" and variant.name == "matching-pursuit" else data.k
        assert (spec.name, spec.d_sae, spec.k) == (variant.sae, data.d_sae, k)


def test_matching_pursuit_on_tree_has_authors_and_k_variants():
    data = DATA["tree-4"]
    authors, ours = variants(("matching-pursuit",), data)
    deviation = data.world.sample(20_000).x_ND.var(0).mean().sqrt().item()
    assert authors.spec(data).tolerance * deviation == pytest.approx(0.05, rel=0.05)
    assert authors.spec(data).stop_on_repeat and authors.spec(data).k == data.d_sae
    assert (ours.name, ours.spec(data).k, ours.spec(data).stop_on_repeat) == ("matching-pursuit-k2", 2, False)
    assert variants(("matching-pursuit",), DATA["zipf"])[0].settings == {}
