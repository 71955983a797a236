"""Weights & Biases, with a stand-in for its package: no account, no network."""

import sys
from types import SimpleNamespace

import pytest

from saebench.core.errors import UserError
from saebench.saes.files import SPEC_FILE
from saebench.training import train


@pytest.fixture
def wandb(monkeypatch):
    """``wandb.ids``: the id of every run that was opened."""
    ids: list[str] = []

    def init(*, id, **_):
        ids.append(id)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    stand_in = SimpleNamespace(init=init, Error=type("Error", (Exception,), {}), ids=ids)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_a_resumed_run_goes_on_under_the_same_id(settings, wandb):
    run = train(**settings, wandb="project")
    (run.path / SPEC_FILE).unlink()
    train(**settings | {"resume": True, "checkpoint_every": 20}, wandb="project")
    assert len(wandb.ids) == 2 and wandb.ids[0] == wandb.ids[1]


def test_a_missing_login_is_a_sentence(settings, wandb, monkeypatch):
    def init(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"--wandb project: No API key configured; .* leave --wandb out"):
        train(**settings, wandb="project")
