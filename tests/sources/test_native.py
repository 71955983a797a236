"""Sites of any torch module: reading, replacing and gradients equal a computation written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saebench.core.errors import UserError
from saebench.sources.native import ModuleSites, Site, parse_site


class Mixer(nn.Module):
    """y = last(relu(first(x)) + second(keep=x)); relu works in place, ``unused`` does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), Named(), nn.Linear(6, 2)
        self.relu, self.unused, self.lstm = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.LSTM(6, 6)
        self.between = nn.Identity()
        self.n_runs = 0

    def forward(self, x_N4):
        self.n_runs += 1
        hidden = self.relu(self.first(x_N4)) + self.second(mode="plain", keep=x_N4)["main"]
        hidden, _ = self.lstm(hidden)
        return self.last(self.between(hidden))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, *, mode, keep):
        assert mode == "plain"
        return {"main": self.linear(keep), "cache": None}


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Mixer()


@pytest.fixture
def x_N4():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def sites_of(module, *names):
    return ModuleSites(module, {name: parse_site(name) for name in names}, name="the mixer")


def test_outputs_and_inputs_are_those_of_the_modules(module, x_N4):
    names = ["first", "first:in", "second", "second:in", "second:main", "lstm:0", "last:in", "last", ""]
    found = sites_of(module, *names).read(lambda: module(x_N4))
    assert list(found) == names
    torch.testing.assert_close(found["first"], module.first(x_N4))
    torch.testing.assert_close(found["second"], module.second.linear(x_N4))
    assert torch.equal(found["second"], found["second:main"])
    assert found["first:in"] is x_N4 and found["second:in"] is x_N4
    assert torch.equal(found["lstm:0"], found["last:in"]) and torch.equal(found["last"], found[""])
    torch.testing.assert_close(found[""], module(x_N4))


def test_a_value_changed_in_place_by_a_later_module_is_copied(module, x_N4):
    sites = sites_of(module, "first", "relu")
    for expected_runs in (2, 3):  # the second pass of the first call; one pass from then on
        with torch.no_grad():
            found = sites.read(lambda: module(x_N4))
        assert module.n_runs == expected_runs
        torch.testing.assert_close(found["first"], module.first(x_N4))
        torch.testing.assert_close(found["relu"], module.first(x_N4).relu())
        assert (found["first"] < 0).any()
    with torch.inference_mode():
        found = sites_of(module, "first").read(lambda: module(x_N4), stop=False)
    torch.testing.assert_close(found["first"], module.first(x_N4))


def test_reading_stops_after_the_last_site(module, x_N4):
    calls = []
    module.last.register_forward_hook(lambda *_: calls.append(1))
    sites = sites_of(module, "second", "relu")
    sites.read(lambda: module(x_N4))
    assert not calls
    sites.read(lambda: module(x_N4), stop=False)
    assert calls
    assert not module.first._forward_hooks and not module.second._forward_pre_hooks


@pytest.mark.parametrize("name", ["first", "second", "second:in", "lstm:0", "last:in", "last"])
def test_edits_change_the_output_and_gradients_equal_finite_differences(module, x_N4, name):
    module, x_N4 = module.double(), x_N4.double()
    sites, plain = sites_of(module, name), module(x_N4)

    def run(edit):
        with sites.editing({name: edit}), torch.no_grad():
            return module(x_N4)

    assert torch.equal(run(lambda x: x), plain)
    with sites.tracking() as found:
        loss = module(x_N4).square().sum()
    [gradient] = torch.autograd.grad(loss, [found[name]])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = [run(lambda x, s=sign: x + s * 1e-5 * direction).square().sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (slope[0] - slope[1]) / 2e-5, rtol=1e-6, atol=0)
    assert torch.equal(module(x_N4), plain)


def test_part_and_scale_of_a_tensor_are_read_and_replaced(module, x_N4):
    site = Site("first", part=lambda x: x[:, 2:4], scale=0.5)
    sites = ModuleSites(module, {"part": site}, name="the mixer")
    whole = module.first(x_N4)
    torch.testing.assert_close(sites.read(lambda: module.first(x_N4))["part"], whole[:, 2:4] / 2)
    with sites.editing({"part": lambda x: x + 1}):
        torch.testing.assert_close(module.first(x_N4)[:, 2:4], whole[:, 2:4] + 2)
        torch.testing.assert_close(module.first(x_N4)[:, :2], whole[:, :2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frist", r"the mixer has no module 'frist'; did you mean first"),
        ("unused", r"module unused did not run in a forward pass of the mixer"),
        ("lstm", r"returns tuple with 2 entries that hold tensors, .* name it lstm:0 or lstm:1"),
        ("lstm:1", r"entry 1 is tuple, not a tensor"),
        ("second:nothing", r"entry nothing is NoneType"),
        ("second.linear.weight", r"has no module"),
    ],
)
def test_a_site_that_is_not_one_tensor_raises_user_error(module, x_N4, name, message):
    with pytest.raises(UserError, match=message):
        sites_of(module, name).read(lambda: module(x_N4))


def test_a_module_that_runs_twice_and_an_edit_without_effect_raise_user_error(module, x_N4):
    module.between = module.relu
    with pytest.raises(UserError, match="relu ran more than once"):
        sites_of(module, "relu").read(lambda: module(x_N4), stop=False)
    with (
        pytest.raises(UserError, match="unused did not run"),
        sites_of(module, "unused").editing({"unused": torch.zeros_like}),
    ):
        module(x_N4)
