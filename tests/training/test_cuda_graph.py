"""Training steps on a GPU: graphed and one by one, uninterrupted and resumed, in low and full precision."""

import pytest
import torch
from safetensors.torch import load_file

import saebench
from saebench.activations.loader import Rows
from saebench.training.cuda_graph import STEPS_BEFORE_CAPTURE, GraphedStep

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ARCHITECTURES = ("topk", "mutual-choice", "gradient")


def test_steps_on_a_cpu_are_never_captured():
    taken = []
    step = GraphedStep(lambda rows, progress, lr: taken.append((progress, lr)), lambda progress: "a key")
    for i in range(5):
        step(Rows(torch.zeros(2, 3), None), i / 5, 0.1)
    assert taken == [(i / 5, 0.1) for i in range(5)]


@pytest.fixture(scope="module")
def cache(make_cache, tmp_path_factory):
    features_MD = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    codes_NM = torch.rand(20_000, 96, generator=generator) * (
        torch.rand(20_000, 96, generator=generator) < 0.05
    )
    return make_cache(tmp_path_factory.mktemp("gpu") / "cache", codes_NM @ features_MD, dtype="bf16")


def _train(cache, out, **settings):
    settings = {"d_sae": 256, "k": 6, "tokens": 20_000, "batch_size": 256, "log_every": 10, **settings}
    saebench.train(cache.path, out=out, quiet=True, device="cuda", **settings)
    return load_file(out / "sae.safetensors")


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@on_a_gpu
@pytest.mark.parametrize("name", ARCHITECTURES[:2])
def test_graphed_steps_end_with_the_same_bytes(cache, tmp_path, monkeypatch, name):
    as_graph = _train(cache, tmp_path / "graph", sae=name, dead_tokens=2000)
    again = _train(cache, tmp_path / "again", sae=name, dead_tokens=2000)
    monkeypatch.setattr("saebench.training.cuda_graph.STEPS_BEFORE_CAPTURE", 10**9)
    assert STEPS_BEFORE_CAPTURE < 70
    one_by_one = _train(cache, tmp_path / "steps", sae=name, dead_tokens=2000)
    assert _equal(as_graph, again)
    assert _equal(as_graph, one_by_one)


@on_a_gpu
@pytest.mark.parametrize("name", ARCHITECTURES[:2])
def test_stopped_and_resumed_training_ends_with_the_same_bytes(cache, tmp_path, monkeypatch, name):
    whole = _train(cache, tmp_path / "whole", sae=name, dead_tokens=2000, checkpoint_every=37)

    class Stop(Exception):
        pass

    from saebench.training import checkpoint

    save = checkpoint.save_checkpoint

    def stop(directory, state):
        save(directory, state)
        if state.step == 37:
            raise Stop

    monkeypatch.setattr(checkpoint, "save_checkpoint", stop)
    settings = {"sae": name, "dead_tokens": 2000, "checkpoint_every": 37}
    with pytest.raises(Stop):
        _train(cache, tmp_path / "stopped", **settings)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert _equal(_train(cache, tmp_path / "stopped", resume=True, **settings), whole)


@on_a_gpu
@pytest.mark.parametrize("name", ARCHITECTURES[:2])
def test_low_precision_ends_where_full_precision_does(cache, tmp_path, name):
    variances = []
    for dtype in ("fp32", "bf16"):
        _train(cache, tmp_path / dtype, sae=name, dtype=dtype, tokens=500_000)
        sae, x_ND = saebench.load(tmp_path / dtype), cache.activations()[-2000:].float()
        error = (x_ND - sae(x_ND)).square().sum()
        variances.append(float(1 - error / (x_ND - x_ND.mean(0)).square().sum()))
    assert abs(variances[0] - variances[1]) < 0.002
