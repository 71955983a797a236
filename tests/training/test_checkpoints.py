"""Checkpoints loaded as SAEs: the weights of that step, for unscaled activations."""

from __future__ import annotations

import pytest
import torch

from saebench.analysis.matching import match
from saebench.core.errors import UserError
from saebench.runs.run import Run, load
from saebench.saes.registry import ARCHITECTURES
from saebench.training import train
from saebench.training.checkpoint import latest_checkpoint
from tests.training.test_every_architecture import FIXED, all_settings, cache_with_gradients  # noqa: F401


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_checkpoint_is_the_sae_but_for_what_is_calibrated(name, all_settings, sparse_rows):  # noqa: F811
    run = train(**all_settings, sae=name)
    sae, before = load(run.path), load(latest_checkpoint(run.path))
    torch.testing.assert_close(before.W_dec, sae.W_dec, rtol=0, atol=0)
    torch.testing.assert_close(before.b_dec, sae.b_dec, rtol=0, atol=0)
    if name in FIXED:
        ours, theirs = (which.encode(sparse_rows[:50]).to_dense() for which in (sae, before))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_it_knows_where_it_comes_from_and_can_be_matched(settings, tmp_path):
    run = train(**settings)
    early = tmp_path / "copy" / "checkpoints" / "early.safetensors"
    early.parent.mkdir(parents=True)
    last = latest_checkpoint(run.path)
    early.write_bytes(last.read_bytes())
    with pytest.raises(UserError, match=r"is a file but not a checkpoint of a run .*; name a run directory"):
        load(early)
    assert Run(last).provenance.cache == Run(run.path).provenance.cache
    assert match(last, run, quiet=True).stability == 1.0
    itself = match(run, run, "activation", quiet=True)  # below 1 where a latent never fires
    assert match(last, run, "activation", quiet=True).mean_similarity == pytest.approx(itself.mean_similarity)
    (run.path / "checkpoints" / "cut.safetensors").write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors is damaged .*; name another checkpoint"):
        load(run.path / "checkpoints" / "cut.safetensors")
