"""Sweeps: grids of settings, and the trainings of one pass over a cache that they describe."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from saebench.core.errors import UserError
from saebench.core.settings import from_flat, setting_names, whole_number
from saebench.saes.registry import architecture
from saebench.saes.spec import SaeSpec
from saebench.training.settings import TrainConfig

Plan = tuple[TrainConfig, SaeSpec]
Grid = dict[str, list[Any]]

_OF_THE_RUN = ("sae", "lr", "seed", "warmup", "decay", "grad_clip", "normalize")
"""Settings of TrainConfig in which the SAEs of one pass may differ. Settings of an architecture may all
differ."""


def plan(settings: Mapping[str, Any], grid: Grid | None = None, *, source: str) -> list[Plan]:
    """The trainings described by flat ``settings`` and a ``grid`` of setting -> values, in grid order.

    Without a grid it is one, in ``out``. With one, each combination gets the directory ``out``/NAME, where
    NAME tells its values (topk-k32-seed0), and all read the rows in one order: that of ``order_seed``, or
    else of the seed, the first of several. A setting that only some of the architectures have goes to those;
    the others are trained once, whatever its values, and their names leave it out.

    Raises:
        UserError: an unknown setting, a value that does not fit, a setting that one pass cannot vary, one
            that has a value and values in the grid, or one training asked for twice.
    """
    settings = dict(settings)
    grid = grid or {}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    specs = {name: architecture(name).Spec for name in architectures(settings, grid)}
    known = {name for spec_class in specs.values() for name in setting_names(spec_class)}
    for name in grid:
        if name not in known and name not in _OF_THE_RUN:
            allowed = ", ".join([*_OF_THE_RUN, *sorted(known)])
            raise UserError(f"a sweep cannot vary {name!r} in one pass over a cache; it can vary {allowed}")
        if name in settings:
            raise UserError(
                f"{name} is {settings[name]} and, in the sweep, {', '.join(map(str, grid[name]))}; "
                "leave one of the two out"
            )
    if "seed" in grid and settings.get("order_seed") is None:
        settings["order_seed"] = grid["seed"][0]
    plans: dict[Plan, tuple[str, Plan]] = {}
    for combination in combinations:
        spec_class = specs[str({**settings, **combination}.get("sae", TrainConfig.sae))]
        types = get_type_hints(spec_class)
        own = set(setting_names(spec_class))
        asked = {name: v for name, v in combination.items() if name in own or name not in known}
        written = {name: _whole(value, types.get(name)) for name, value in asked.items()}
        values = {**settings, **written}
        if grid and "out" in settings:
            values["out"] = Path(settings["out"]) / run_name(written)
        of_spec = {name: value for name, value in values.items() if name in own}
        of_run = {name: value for name, value in values.items() if name not in known}
        config = from_flat(TrainConfig, of_run, source=source)
        spec = from_flat(spec_class, of_spec, source=source)
        words = " ".join(f"{name}={value}" for name, value in asked.items())
        before, _ = plans.setdefault((dataclasses.replace(config, out=Path()), spec), (words, (config, spec)))
        if before != words:
            raise UserError(
                f"the sweep asks for one training as {before} and as {words}; name each value once"
            )
    return [made for _, made in plans.values()]


def _whole(value: Any, kind: Any) -> Any:
    """The value of an integer setting that is written as 3e1 or 30.0, as an integer."""
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return whole_number(value)
    return value


def settle(given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, overridden by those of the command line: a flag also replaces what a sweep
    varies.

    Raises:
        UserError: a sweep has another form than `parse_grid` reads.
    """
    given = dict(given)
    if "sweep" in flags:
        swept = parse_grid(words_of(flags))
        given = {name: value for name, value in given.items() if name not in swept}
    elif "sweep" in given:
        given["sweep"] = tuple(word for word in words_of(given) if not set(parse_grid([word])) & set(flags))
    return {**given, **flags}


def words_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of the setting ``sweep``; none if it is not there.

    Raises:
        UserError: it is neither text nor a list of texts.
    """
    words = settings.get("sweep", ())
    if isinstance(words, str):
        return (words,)
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise UserError(f'sweep is {words!r}; give text like "k=16,32,64", or a list of such')
    return tuple(words)


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
        UserError: a setting has no list of values, or one value twice.
    """
    if not isinstance(lists, Mapping):
        raise UserError(f'the grid is {lists!r}; give settings and their values, like {{"k": [16, 32]}}')
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise UserError(f"the grid gives {name} as {values!r}; give a list of values")
        if len({str(value) for value in values}) != len(values):
            raise UserError(f"the grid names a value of {name} twice: {list(values)}")
    return {name: list(values) for name, values in lists.items()}


def architectures(settings: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """Names of the architectures that a call trains."""
    names = grid.get("sae") or [settings.get("sae", TrainConfig.sae)]
    return [str(name) for name in names]


def run_name(combination: Mapping[str, Any]) -> str:
    """The directory of one SAE of a sweep: {'sae': 'topk', 'k': 32} is topk-k32."""
    parts = [str(v) if name == "sae" else f"{name.replace('_', '-')}{v}" for name, v in combination.items()]
    return "-".join(parts).replace("/", "_")
