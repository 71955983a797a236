"""Harvesting any torch module: rows equal what the module computes, and bad input is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import saebench as sb
from saebench.activations.writer import CacheWriter
from saebench.core.errors import UserError
from saebench.sources.text import is_held_out


class Branches(nn.Module):
    """Sites of each kind: a list of blocks, a tuple, two heads, one that never runs, a pooled output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(6, 6), "out": nn.ReLU()}) for _ in range(3)
        )
        self.drop = nn.Dropout(0.5)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.heads = nn.Unflatten(-1, (2, 3))
        self.pool = nn.AdaptiveAvgPool1d(4)
        self.unused = nn.Linear(6, 6)
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTD = self.drop(block["out"](block["mlp"](x_BTD)))
        self.heads(x_BTD)
        self.pool(x_BTD.mean(1)[:, None])
        return self.lstm(x_BTD)[0]


@pytest.fixture(scope="module")
def module() -> Branches:
    torch.manual_seed(0)
    return Branches().train()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return [torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]


def harvest(source: sb.ModuleSource, out: Path, **settings: Any) -> sb.ActivationCache:
    return sb.harvest(source=source, out=out, **{"dtype": "fp32", "quiet": True, **settings})


def test_rows_equal_what_the_module_computes(module: Branches, batches: list[Tensor], tmp_path: Path) -> None:
    source = sb.ModuleSource(module, sites=["blocks.*.mlp", "blocks.1.mlp:in", "lstm:0"], batches=batches)
    cache = harvest(source, tmp_path / "cache")
    assert cache.hooks == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.1.mlp:in", "lstm:0"]
    assert module.training and module.drop.training
    x_BTD = torch.cat(batches)
    with torch.no_grad():
        first = module.blocks[0]["mlp"](x_BTD)
        out = x_BTD
        for block in module.blocks:
            out = block["out"](block["mlp"](out))
        last = module.lstm(out)[0]
    torch.testing.assert_close(cache.activations("blocks.0.mlp"), first.flatten(0, 1))
    torch.testing.assert_close(cache.activations("blocks.1.mlp:in"), first.relu().flatten(0, 1))
    torch.testing.assert_close(cache.activations("lstm:0"), last.flatten(0, 1))
    assert torch.equal(cache.unit, torch.arange(80, dtype=torch.int32).repeat_interleave(5))
    assert torch.equal(cache.pos, torch.arange(5, dtype=torch.int32).repeat(80))
    assert torch.equal(cache.unit_len, torch.full((80,), 5, dtype=torch.int32))
    assert cache.held_out.tolist() == [is_held_out(str(unit)) for unit in cache.unit.tolist()]
    assert cache.n_contexts == 80 and cache.ctx is cache.tokens is cache.model is None
    assert cache.manifest["format_version"] == 2 and cache.modality.name == "unit"
    assert {site.path for site in cache.sites.values()} == {"module"}
    cache.verify()


def test_native_axes_are_kept_and_flattened_for_training(
    module: Branches, batches: list[Tensor], tmp_path: Path
) -> None:
    source = sb.ModuleSource(
        module, sites=["heads"], batches=batches, axes={"heads": ("pos", "head", "d_head")}
    )
    cache = harvest(source, tmp_path / "cache")
    assert cache.sites["heads"].axes == (("head", 2), ("d_head", 3)) and cache.d_in() == 6
    assert torch.equal(cache.activations(native=True).flatten(1), cache.activations())
    assert cache.activations(native=True).shape == (400, 2, 3)
    conv = nn.Conv2d(3, 4, 3)
    images = torch.randn(4, 3, 5, 6)
    cache = harvest(sb.ModuleSource(conv, "", [images], axes={"": ("d", "pos", "pos")}), tmp_path / "images")
    assert cache.hooks == ["module"] and cache.n_rows == 4 * 3 * 4
    with torch.no_grad():
        torch.testing.assert_close(cache.activations(), conv(images).permute(0, 2, 3, 1).reshape(-1, 4))


def test_columns_are_stored_and_choose_held_out_and_kept_rows(tmp_path: Path) -> None:
    batches = [{"x": torch.randn(4, 3, 6), "label": torch.tensor([3, 1, 4, 1]) + i} for i in range(3)]
    source = sb.ModuleSource(
        nn.Linear(6, 6),
        sites=[""],
        batches=lambda: iter(batches),
        forward=lambda module, batch: module(batch["x"]),
        columns=lambda batch: {
            "label": batch["label"],
            "size": batch["x"].norm(dim=-1).flatten(),
            "held_out": batch["label"] == 1,
            "keep": torch.tensor([False, True, True]).repeat(4),
        },
    )
    cache = harvest(source, tmp_path / "cache")
    assert cache.n_rows == 24 and (cache.pos > 0).all() and cache.n_contexts == 12
    labels = torch.cat([batch["label"] for batch in batches])
    assert torch.equal(cache.unit_columns()["label"], labels.to(torch.int32))
    x_ND = torch.cat([batch["x"][:, 1:] for batch in batches]).flatten(0, 1)
    torch.testing.assert_close(cache.row_columns()["size"], x_ND.norm(dim=-1))
    assert torch.equal(cache.held_out, labels[cache.unit.long()] == 1)
    most = harvest(source, tmp_path / "most", tokens=7)
    assert torch.equal(most.activations(), cache.activations()[:7])


@pytest.mark.parametrize("forward", [None, lambda module, batch: module(torch.stack(batch["x"]))])
def test_resume_gives_identical_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: Callable[..., object] | None
) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    runs = [0]
    module.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    batches: list[Any] = [torch.randn(3_000, 5, 4) for _ in range(6)]
    if forward is not None:  # of such batches only running them tells how many rows they make
        batches = [{"x": list(batch.unbind()), "other": None} for batch in batches]

    def make(out: Path) -> sb.ActivationCache:
        return harvest(sb.ModuleSource(module, [""], batches, forward=forward), out, shard_rows=32_768)

    whole = make(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", lambda self, *_, **__: self._wait() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "cache")
    journal = tmp_path / "cache" / "journal.json"
    assert journal.read_text().count('"group": "rows"') == 2
    before = runs[0]
    resumed = make(tmp_path / "cache")
    assert runs[0] - before == (3 if forward is None else 7)  # the first batch, and what is not stored
    assert resumed.hash == whole.hash
    resumed.verify()
    batches[0] = batches[1]
    with pytest.raises(UserError, match=r"different cache \(its batches\.first is"):
        make(tmp_path / "cache")
    with torch.no_grad():
        module.weight += 1
    with pytest.raises(UserError, match="different cache"):
        make(tmp_path / "cache")


KILLER = """
import os, signal, sys
import torch
import saebench as sb
torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.Linear(4, 3)
batches = [torch.randn(3_000, 5, 4) for _ in range(6)]

def attempt(out, kill_at=None):
    pid = os.fork()
    if pid == 0:
        real, count = os.replace, [0]
        def replace(*paths):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)
        os.replace = replace
        source = sb.ModuleSource(module, [""], batches, columns=lambda batch: {"n": range(len(batch))})
        sb.harvest(source=source, out=out, shard_rows=32_768, quiet=True)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

whole, killed = sys.argv[1:]
assert attempt(whole) == 0
for kill_at in (2, 5, 6, 9, 8):
    assert attempt(killed, kill_at) == signal.SIGKILL, kill_at
assert attempt(killed) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_harvest_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    command = [sys.executable, "-c", KILLER, *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    whole, killed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert whole == killed
    sb.open_cache(folders[1]).verify()


def numbers(n: int, **_: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda batch: {"label": list(range(n))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sites": ["blocks.*.mpl"]},
            r"'blocks.\*.mpl' matches no module of Branches; did you mean blocks.0.mlp",
        ),
        ({"sites": []}, "no site of Branches was named"),
        ({"sites": ["unused"]}, "unused did not run"),
        ({"sites": ["lstm"]}, "returns tuple with 2 entries that hold tensors.*name it lstm:0 or lstm:1"),
        ({"sites": ["heads"]}, r"heads of Branches has shape \[8, 5, 2, 3\]; name its axes"),
        ({"sites": ["heads"], "axes": {"head": ("d",)}}, "axes names 'head', which is not in sites"),
        ({"sites": ["heads"], "axes": {"heads": ("pos", "d")}}, "name every axis"),
        ({"sites": ["blocks.0.mlp", "pool"]}, "units of 5 rows but pool has 8 units of 1 rows"),
        ({"batches": []}, "batches of Branches is empty"),
        ({"batches": iter([1])}, "can be read only once"),
        ({"batches": 5}, "batches is a int"),
        ({"batches": [[torch.randn(8, 5, 6)]]}, "a batch is a list, not a tensor"),
        ({"batches": [torch.randn(8, 5, 7)]}, "cannot run the first batch"),
        ({"columns": numbers(7)}, "the column label has 7 values for a batch of 8 units and 40 rows"),
        ({"columns": lambda batch: {"a b": range(8)}}, "'a b' is not a valid name"),
        ({"columns": lambda batch: {"word": ["x"] * 8}}, "the column word does not hold numbers"),
        ({"columns": lambda batch: {"held_out": range(8)}}, "it must hold booleans"),
        ({"columns": lambda batch: {"n": [2**40] * 8}}, "beyond 32 bits"),
        ({"columns": lambda batch: [1]}, "columns\\(batch\\) is a list"),
        ({"columns": lambda batch: {"n": np.full(8, 2**63, "u8")}}, "beyond 32 bits"),
        ({"sites": [0]}, "the site 0 of Branches is not text"),
        ({"sites": ["heads"], "axes": {"heads": "pos"}}, "axes of 'heads' is 'pos'; give a tuple"),
        ({"sites": ["heads"], "axes": {"heads": ("pos", "d", "d")}}, "no name twice but 'pos'"),
        ({"forward": lambda module, batch: {}["x"]}, r"cannot run the first batch \(KeyError: 'x'\)"),
        ({"batches": [torch.randn(8, 5, 6), torch.randn(8, 5, 7)]}, "cannot run batch 2 \\(RuntimeError"),
        ({"batches": lambda: [torch.randn(8, 5, 6)]}, "begins with another batch in a second pass"),
        ({"batches": [torch.full((8, 5, 6), torch.nan)]}, r"hold NaN or infinity \(unit 0, position 0\)"),
    ],
)
def test_bad_input_raises_user_error_and_leaves_no_cache(
    module: Branches, batches: list[Tensor], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"sites": ["blocks.*.mlp"], "batches": batches, **changes}
    with pytest.raises(UserError, match=message):
        harvest(sb.ModuleSource(module, **settings), tmp_path / "cache")
    assert not set(tmp_path.rglob("*.safetensors"))


def test_batches_that_change_their_shape_or_columns_raise_user_error(tmp_path: Path) -> None:
    first, other = torch.randn(4, 3, 6), torch.randn(4, 6)
    with pytest.raises(UserError, match=r"has shape \[4, 6\], but rows of \{'d': 6\} in the first"):
        harvest(sb.ModuleSource(nn.ReLU(), [""], [first, other]), tmp_path / "a")
    with pytest.raises(UserError, match=r"module of ReLU has shape \[4, 0\], which is empty"):
        harvest(sb.ModuleSource(nn.ReLU(), [""], [torch.randn(4, 0)]), tmp_path / "a")
    source = sb.ModuleSource(
        nn.ReLU(),
        [""],
        [first, first + 1],
        columns=lambda batch: {"a" if batch is first else "b": range(4)},
    )
    with pytest.raises(UserError, match="columns\\(batch\\) has b but the first batch had a"):
        harvest(source, tmp_path / "b")
    with pytest.raises(UserError, match="'model' in the call of harvest with a source is not a setting"):
        sb.harvest(source=source, out=tmp_path / "c", model="demo")


def test_a_function_that_returns_the_same_iterator_again_raises_user_error(tmp_path: Path) -> None:
    for n_batches, found in ((1, "nothing"), (3, "another batch")):
        once = iter([torch.randn(4, 6) for _ in range(n_batches)])
        with pytest.raises(UserError, match=f"begins with {found} in a second pass"):
            harvest(sb.ModuleSource(nn.ReLU(), [""], lambda once=once: once), tmp_path / "cache")


class InPlace(nn.Module):
    """Changes its input in place, whatever holds it."""

    def forward(self, x: Any) -> Tensor:
        value = x if isinstance(x, Tensor) else x["x"] if isinstance(x, Mapping) else x[0]
        return torch.as_tensor(value).mul_(2)


class Pair(NamedTuple):
    x: Tensor
    y: int


@pytest.mark.parametrize(
    "hold",
    [lambda x: x, lambda x: {"x": x}, lambda x: BatchEncoding({"x": x}), lambda x: [x], lambda x: Pair(x, 1)],
)
def test_a_module_that_changes_its_input_leaves_the_batches_as_they_were(
    tmp_path: Path, hold: Callable[[Tensor], Any]
) -> None:
    given = [torch.randn(4, 6) for _ in range(3)]
    batches = [hold(x.clone()) for x in given]
    source = sb.ModuleSource(
        nn.Sequential(nn.Identity(), InPlace()),
        ["0:in", "1"] if hold(0) == 0 else ["1"],
        batches,
        forward=lambda module, batch: module(batch),
    )
    cache = harvest(source, tmp_path / "cache")
    torch.testing.assert_close(cache.activations("1"), 2 * torch.cat(given))
    if "0:in" in cache.hooks:
        assert torch.equal(cache.activations("0:in"), torch.cat(given))
    for batch, x in zip(batches, given, strict=True):
        left = batch if isinstance(batch, Tensor) else batch["x"] if isinstance(batch, Mapping) else batch[0]
        assert torch.equal(left, x)


def test_units_of_different_lengths_are_numbered_on(tmp_path: Path) -> None:
    def batches() -> Iterator[Tensor]:
        for i in (3, 1, 4, 1, 5):
            yield torch.randn(2, i, 6, generator=torch.Generator().manual_seed(i))

    cache = harvest(sb.ModuleSource(nn.ReLU(), [""], batches), tmp_path / "cache")
    assert cache.unit_len.tolist() == [3, 3, 1, 1, 4, 4, 1, 1, 5, 5]
    assert torch.equal(torch.bincount(cache.unit), cache.unit_len)
    torch.testing.assert_close(cache.activations(), torch.cat([x.flatten(0, 1) for x in batches()]).relu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["sites"]["module"].update(axes=[["d", 5]]), "is not what its column holds"),
        (lambda raw: raw["sites"]["module"].update(path="cloud"), "path is 'cloud'"),
        (lambda raw: raw["sites"].clear(), "damaged"),
        (lambda raw: raw["columns"].pop("unit"), "it has no column unit"),
        (lambda raw: raw.update(n_contexts=3), "instead of 3"),
    ],
)
def test_damaged_manifest_of_format_2_raises_user_error(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    import json

    cache = harvest(sb.ModuleSource(nn.ReLU(), [""], [torch.randn(4, 6)]), tmp_path / "cache")
    raw = json.loads((cache.path / "manifest.json").read_text())
    change(raw)
    (cache.path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        sb.open_cache(cache.path)


def test_a_column_that_was_taken_for_one_per_unit_is_named_with_the_way_out(tmp_path: Path) -> None:
    batches = [torch.randn(3, 1, 4), torch.randn(3, 5, 4)]
    source = sb.ModuleSource(
        nn.ReLU(), [""], batches, columns=lambda batch: {"a": torch.arange(batch.shape[0] * batch.shape[1])}
    )
    with pytest.raises(UserError, match="begin with a batch of several positions"):
        harvest(source, tmp_path / "cache")


def test_a_modality_that_is_not_installed_is_read_like_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sb.ModuleSource(nn.ReLU(), [""], [torch.randn(4, 6)], modality="spectrum")
    assert "modality 'spectrum' is not installed" in capsys.readouterr().err
    cache = harvest(source, tmp_path / "cache")
    moved = sb.open_cache(shutil.copytree(cache.path, tmp_path / "moved"))
    assert moved.modality.name == "spectrum" and moved.unit.tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_cpu_are_moved_to_the_device_of_the_module(tmp_path: Path) -> None:
    source = sb.ModuleSource(nn.Linear(6, 4).cuda(), [""], [torch.randn(8, 6)])
    assert harvest(source, tmp_path / "cache").n_rows == 8
