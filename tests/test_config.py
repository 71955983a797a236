"""Settings: reading from plain values, checks, and writing back."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import config
from saebench.activations.settings import HarvestConfig, ImportConfig
from saebench.core.bounds import Above, AtLeast, AtMost, Below, Bound, _bounds
from saebench.core.errors import UserError
from saebench.core.settings import Settings, accepts_settings, from_flat, to_flat
from saebench.evaluation.settings import EvalConfig
from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.store.settings import IndexConfig
from saebench.training.settings import TrainConfig

ROOT = Path(__file__).parents[1]
NAMES = st.text("abc/_.-", min_size=1).filter(lambda name: name.strip("/."))
SHARDS = st.integers(1, 8).map(lambda n: n * 32_768)
CONFIGS = {
    HarvestConfig: {
        "out": NAMES, "hook": st.lists(NAMES, min_size=1, max_size=3, unique=True),
        "tokens": st.integers(1, 10**8), "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
        "keep_first": st.booleans(), "shard_rows": SHARDS, "revision": st.none() | NAMES,
    },
    ImportConfig: {"source": NAMES, "out": NAMES, "dtype": st.none() | st.sampled_from(["bf16", "fp32"])},
    TrainConfig: {
        "cache": NAMES, "out": NAMES, "lr": st.just("auto") | st.floats(1e-6, 1),
        "seed": st.integers(0, 2**63 - 1), "warmup": st.floats(0, 0.5),
        "decay": st.floats(0, 0.5), "memory": st.floats(0.01, 64),
    },
    EvalConfig: {"run": NAMES, "cache": st.none() | NAMES, "rows": st.sampled_from(["held-out", "all"])},
    IndexConfig: {"run": NAMES, "cache": NAMES, "out": NAMES, "window": st.integers(1)},
}  # fmt: skip
REQUIRED: dict[type, dict[str, Any]] = {
    HarvestConfig: {"out": "c"},
    ImportConfig: {"source": "x.npy", "out": "c"},
    TrainConfig: {"cache": "c", "out": "r"},
    EvalConfig: {"run": "r"},
    IndexConfig: {"run": "r", "cache": "c", "out": "s"},
}


@given(st.data(), st.sampled_from(list(CONFIGS)))
@settings(deadline=None)
def test_settings_survive_json_round_trip(data: st.DataObject, config_class: type) -> None:
    strategies = CONFIGS[config_class]
    optional = {name: s for name, s in strategies.items() if name not in REQUIRED[config_class]}
    required = {name: strategies[name] for name in REQUIRED[config_class]}
    values = data.draw(st.fixed_dictionaries(required, optional=optional))
    config = from_flat(config_class, values)
    flat = json.loads(json.dumps(to_flat(config)))
    assert from_flat(config_class, flat) == config
    for name, value in values.items():
        assert flat[name] == (str(Path(value)) if isinstance(getattr(config, name), Path) else value)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_has_docstring(config_class: type) -> None:
    """The field docstrings are the help of the flags."""
    source = inspect.getsource(config_class)
    for field in dataclasses.fields(config_class):
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {field.name}: "))
        assert source.splitlines()[line + 1].startswith('    """'), field.name


@pytest.mark.parametrize(
    ("config_class", "bad", "message"),
    [
        (HarvestConfig, {"hok": "a"}, "'hok' in the file is not a setting of HarvestConfig; did you mean"),
        (HarvestConfig, {"zzz": 1}, "'zzz' in the file is not a setting of HarvestConfig; there is out,"),
        (HarvestConfig, {"hook": []}, "no hook was named"),
        (HarvestConfig, {"hook": ["a", "a"]}, "--site names the same hook twice: a, a"),
        (HarvestConfig, {"dtype": "int8"}, "'dtype' in the file is 'int8': input should be 'bf16', 'fp"),
        (HarvestConfig, {"shard_rows": 1000}, "shard_rows is 1000; it must be a multiple of 32,768"),
        (ImportConfig, {"shard_rows": 0}, "shard_rows is 0; it must be a multiple of 32,768"),
        (TrainConfig, {"out": None}, "'out' in the file is None"),
        (TrainConfig, {"tokens": 1.5}, "'tokens' in the file is 1.5"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (TrainConfig, {"lr": "fast"}, "'lr' in the file is 'fast'"),
        (TrainConfig, {"lr": float("nan")}, "lr is nan; it must be 'auto' or above 0"),
        (TrainConfig, {"warmup": float("nan")}, "warmup is nan; it must be at least 0"),
        (TrainConfig, {"warmup": 0.9}, "warmup 0.9 and decay 0.3 are shares of one run and exceed it"),
        (TrainConfig, {"sae": "no such"}, "--sae no such is not an SAE architecture; there is topk"),
        (EvalConfig, {"text": "a.txt"}, "--text a.txt needs a model that reads the text; add --model"),
        (EvalConfig, {"rows": "some"}, "'rows' in the file is 'some': input should be 'held-out' or 'all'"),
        (IndexConfig, {"seed": -1}, "seed is -1; it must be at least 0"),
        (IndexConfig, {"seed": 2**63}, "seed is 9223372036854775808; it must be below 2**63"),
        (TrainConfig, {"grad_clip": float("inf")}, "grad_clip is infinite; give a finite number"),
    ],
)
def test_invalid_value_is_refused_with_one_sentence(
    config_class: type, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        from_flat(config_class, {**REQUIRED[config_class], **bad}, source="the file")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_missing_value_is_refused_with_its_name(config_class: type) -> None:
    for name in REQUIRED[config_class]:
        rest = {key: value for key, value in REQUIRED[config_class].items() if key != name}
        with pytest.raises(UserError, match=f"'{name}' is missing from the call"):
            from_flat(config_class, rest, source="the call")


def test_single_string_becomes_a_list_and_a_whole_float_an_int() -> None:
    config = from_flat(HarvestConfig, {"out": "c", "hook": "a", "tokens": 2e6})
    assert config.hook == ("a",)
    assert config.tokens == 2_000_000


class Somewhere:
    def __fspath__(self) -> str:
        return "runs/a"


def test_object_with_fspath_is_accepted_as_a_path() -> None:
    assert from_flat(EvalConfig, {"run": Somewhere()}).run == Path("runs/a")
    assert from_flat(EvalConfig, {"run": "r", "model": Path("folder")}).model == "folder"


def test_function_with_settings_takes_a_config_or_the_same_keywords() -> None:
    @accepts_settings(EvalConfig)
    def measure(config: EvalConfig) -> EvalConfig:
        return config

    expected = EvalConfig(run=Path("r"), tokens=7)
    assert measure(expected) is expected
    assert measure(run="r", tokens=7) == expected
    assert measure("r", tokens=7) == expected
    signature = inspect.signature(measure)
    assert next(iter(signature.parameters)) == "run"
    assert signature.return_annotation == inspect.signature(measure.__wrapped__).return_annotation
    assert "Settings:\n    run: A run directory" in measure.__doc__
    with pytest.raises(TypeError, match="or keywords, not both"):
        measure(expected, tokens=7)
    with pytest.raises(UserError, match="the call of measure"):
        measure(run="r", token=7)


def test_hook_can_be_called_site_but_not_both() -> None:
    @accepts_settings(HarvestConfig)
    def read(config: HarvestConfig) -> tuple[str, ...]:
        return config.hook

    assert read(out="c", site="a") == read(out="c", hook="a") == ("a",)
    assert to_flat(from_flat(HarvestConfig, {"out": "c", "site": ["a", "b"]}))["hook"] == ["a", "b"]
    assert {"site", "hook"} < set(inspect.signature(read).parameters)
    with pytest.raises(UserError, match="the call of read has both site and hook"):
        read(out="c", site="a", hook="a")
    with pytest.raises(UserError, match="did you mean 'site'"):
        read(out="c", sites="a")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_registered_architecture_has_its_name(name: str) -> None:
    assert architecture(name).Spec.name == name


def test_unknown_architecture_raises_a_user_error() -> None:
    with pytest.raises(UserError, match="'none' is not an SAE architecture; there is topk"):
        architecture("none")


ALL_SETTINGS = [
    home for home in sorted(set(config._HOMES.values())) if home.endswith(("settings", "demo", "spec"))
]
"""Modules that define dataclasses of settings."""


def test_settings_load_without_torch_or_pydantic() -> None:
    code = f"import sys, {', '.join(ALL_SETTINGS)}; print(sorted({{'torch', 'pydantic'}} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "[]\n"


def test_too_many_shards_are_refused_and_suggested_shard_rows_works() -> None:
    with pytest.raises(UserError, match=r"pass --shard-rows (\d+)") as refused:
        HarvestConfig(out=Path("c"), tokens=2_000_000_000)
    enough = int(str(refused.value).rsplit(" ", 1)[1])
    assert HarvestConfig(out=Path("c"), tokens=2_000_000_000, shard_rows=enough).shard_rows == enough


SETTINGS_CLASSES = [
    value
    for home in ALL_SETTINGS
    for value in vars(importlib.import_module(home)).values()
    if isinstance(value, type) and issubclass(value, Settings) and value.__module__ == home
]
SPECS = [architecture(name).Spec for name in ARCHITECTURES]
BOUNDED = [
    (config_class, name, bounds)
    for config_class in [*SETTINGS_CLASSES, *SPECS]
    for name, (bounds, _) in _bounds(config_class).items()
]


@pytest.mark.parametrize(
    ("config_class", "name", "bounds"), BOUNDED, ids=[f"{c.__name__}-{n}" for c, n, _ in BOUNDED]
)
def test_value_out_of_bounds_is_refused_by_settings_class(
    config_class: type, name: str, bounds: tuple[Bound, ...]
) -> None:
    required = {f.name: Path() for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING}
    for bound in bounds:
        step = {AtLeast: -1, Above: 0, AtMost: 1, Below: 0}[type(bound)]
        with pytest.raises(UserError, match=rf"{name} is .*; it must be .*{re.escape(str(bound))}"):
            config_class(**required, **{name: bound.number + step})
    with pytest.raises(UserError, match=f"{name} is nan; it must be "):
        config_class(**required, **{name: float("nan")})
    with pytest.raises(UserError, match=f"{name} is inf"):
        config_class(**required, **{name: float("inf")})


def test_none_and_auto_are_not_checked_against_bounds() -> None:
    assert TrainConfig(cache=Path("c"), out=Path("r"), lr="auto", order_seed=None).lr == "auto"
    with pytest.raises(UserError, match="lr is fast; it must be 'auto' or above 0"):
        TrainConfig(cache=Path("c"), out=Path("r"), lr="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", config._HOMES)
def test_old_name_in_config_gives_the_object_and_a_deprecation_warning(name: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=rf"saebench.config.{name} is deprecated .*; use {config._HOMES[name]}"
    ):
        old = getattr(config, name)
    assert old is getattr(importlib.import_module(config._HOMES[name]), name)


def test_name_that_config_never_had_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TrainCofig'"):
        config.TrainCofig  # noqa: B018
