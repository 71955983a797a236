"""A sweep: several SAEs that differ in the settings named by a grid, trained in one pass over a cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saebench.config import SaeSpec, TrainConfig, architecture
from saebench.errors import UserError
from saebench.fields import from_flat

Plan = tuple[TrainConfig, SaeSpec]
Grid = dict[str, list[Any]]

_OF_THE_RUN = ("sae", "lr", "seed", "warmup", "decay", "grad_clip", "normalize")
"""Settings of TrainConfig in which the SAEs of one pass may differ; of an architecture, all may."""


def plan(settings: Mapping[str, Any], grid: Grid | None = None, *, source: str) -> list[Plan]:
    """The trainings that flat ``settings`` and a ``grid`` of setting -> values ask for, in grid order.

    Without a grid it is one, in ``out``. With one, each combination gets the directory ``out``/NAME, where
    NAME tells its values (topk-k32-seed0), and all read the rows in one order: that of ``order_seed``, or
    else of the seed, the first of several. A setting that only some of the architectures have goes to those.

    Raises:
        UserError: an unknown setting, a value that does not fit, or a setting that one pass cannot vary.
    """
    settings = dict(settings)
    grid = grid or {}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    specs = {name: architecture(name).Spec for name in architectures(settings, grid)}
    known = {field.name for spec_class in specs.values() for field in dataclasses.fields(spec_class)}
    for name in grid:
        if name not in known and name not in _OF_THE_RUN:
            allowed = ", ".join([*_OF_THE_RUN, *sorted(known)])
            raise UserError(f"a sweep cannot vary {name!r} in one pass over a cache; it can vary {allowed}")
    if "seed" in grid and settings.get("order_seed") is None:
        settings["order_seed"] = grid["seed"][0]
    plans: list[Plan] = []
    for combination in combinations:
        values = {**settings, **combination}
        if grid and "out" in settings:
            values["out"] = Path(settings["out"]) / run_name(combination)
        spec_class = specs[str(values.get("sae", TrainConfig.sae))]
        own = {field.name for field in dataclasses.fields(spec_class)}
        of_spec = {name: value for name, value in values.items() if name in own}
        of_run = {name: value for name, value in values.items() if name not in known}
        config = from_flat(TrainConfig, of_run, source=source)
        plans.append((config, from_flat(spec_class, of_spec, source=source)))
    return plans


def parse_grid(words: Iterable[str]) -> Grid:
    """The grid of ``--sweep`` words NAME=VALUE,VALUE,...

    Raises:
        UserError: a word has another form, or names a setting twice.
    """
    grid: Grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.strip().replace("-", "_")
        listed = [value.strip() for value in values.split(",")]
        if not equals or not name or not all(listed):
            raise UserError(f"--sweep {word} is not of the form NAME=VALUE,VALUE, like --sweep k=16,32,64")
        if name in grid:
            raise UserError(f"--sweep names {name} twice; write all its values in one, {name}=VALUE,VALUE")
        if len(set(listed)) != len(listed):
            raise UserError(f"--sweep {word} names a value twice")
        grid[name] = listed
    return grid


def grid_of(lists: Mapping[str, Sequence[Any]]) -> Grid:
    """A grid given in Python, checked.

    Raises:
        UserError: a setting has no values, or one value twice.
    """
    for name, values in lists.items():
        if isinstance(values, str) or not len(values):
            raise UserError(f"the grid gives {name} as {values!r}; give a list of values")
        if len({str(value) for value in values}) != len(values):
            raise UserError(f"the grid names a value of {name} twice: {list(values)}")
    return {name: list(values) for name, values in lists.items()}


def architectures(settings: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names of the architectures that a call trains."""
    names = grid.get("sae") or [settings.get("sae", TrainConfig.sae)]
    return [str(name) for name in names]


def run_name(combination: Mapping[str, Any]) -> str:
    """The directory of one SAE of a sweep: {'sae': 'topk', 'k': 32} is topk-k32."""
    parts = [str(v) if name == "sae" else f"{name.replace('_', '-')}{v}" for name, v in combination.items()]
    return "-".join(parts).replace("/", "_")
