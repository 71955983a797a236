"""Flags made from settings classes: a field gives the flag, its docstring the help, its type the check."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from saebench.core.errors import UserError
from saebench.core.reading import read_text, shown
from saebench.core.settings import field_docs, named_as_fields, nearest_setting, shown_name, whole_number

CONFIG_FLAG = "--config"


def parameters(
    config_class: type[Any],
    names: Sequence[str],
    *,
    given: Mapping[str, object],
    positional: Sequence[str],
    group: Group,
) -> list[inspect.Parameter]:
    """One parameter for each of the fields ``names`` of ``config_class``, for the signature of a command.

    Args:
        given: values from a settings file; they replace the defaults.
        positional: the fields that may also be given without their flags.
    """
    types, docs = get_type_hints(config_class), field_docs(config_class)
    made = []
    for field in dataclasses.fields(config_class):
        if field.name not in names:
            continue
        default = field.default
        if field.name in given:
            default = given[field.name]
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        how = Parameter(
            name=_flag_names(field.name),
            help=docs.get(field.name, ""),
            group=group,
            converter=_converter(types[field.name]),
            negative=None if default is True else (),
            consume_multiple=(1, sys.maxsize) if get_origin(types[field.name]) is tuple else False,
            show_default=False
            if any(default is absent for absent in (None, False, (), inspect.Parameter.empty))
            else _written,
        )
        made.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if field.name in positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[types[field.name], how],
            )
        )
    return sorted(made, key=lambda parameter: parameter.kind)


def _flag_names(name: str) -> tuple[str, ...]:
    """The flags of a setting, the one that people are shown first."""
    return tuple(dict.fromkeys(f"--{one.replace('_', '-')}" for one in (shown_name(name), name)))


def _written(default: object) -> str:
    """A default as it is typed on the command line."""
    return " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def _converter(kind: Any) -> Callable[[object, Sequence[Any]], Any] | None:
    """The converter of words for a field of whole numbers; None for other fields."""
    if int not in (kind, *get_args(kind)):
        return None
    return _whole_numbers if get_origin(kind) is tuple else _whole_number


def _whole_number(kind: object, tokens: Sequence[Any]) -> int:
    return whole_number(tokens[0].value)


def _whole_numbers(kind: object, tokens: Sequence[Any]) -> tuple[int, ...]:
    """Numbers from several words; each word may have several numbers separated by commas."""
    return tuple(whole_number(part) for token in tokens for part in token.value.split(",") if part)


def values_in(argv: Sequence[str], flag: str) -> list[str]:
    """The values of ``flag`` in unparsed ``argv``; several values may follow a flag."""
    found: list[str] = []
    inside = False
    for token in argv:
        if token.startswith("-"):
            inside = token == flag
            if token.startswith(flag + "="):
                found.append(token[len(flag) + 1 :])
        elif inside:
            found.append(token)
    return found


def value_in(argv: Sequence[str], flag: str) -> str | None:
    """The last value of ``flag`` in ``argv``."""
    return next(reversed(values_in(argv, flag)), None)


def read_settings(path: Path) -> dict[str, Any]:
    """The flat TOML file ``path``; ``d-sae`` and ``d_sae`` are the same key.

    Raises:
        UserError: the file cannot be read, is not TOML, or has tables.
    """
    try:
        raw = tomllib.loads(
            read_text(path, what="the settings file", way_out=f"check {CONFIG_FLAG}", at_most=2**24)
        )
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the settings file {path} is not TOML: {shown(str(error), 200)}; correct it"
        ) from None
    for name, value in raw.items():
        if isinstance(value, dict):
            raise UserError(
                f"[{name}] in {path} is a table; settings are flat: write lines such as d_sae = 4096"
            )
    return {name.replace("-", "_"): value for name, value in raw.items()}


def check_settings(settings: Mapping[str, Any], types: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of a settings file, converted to the types of their fields.

    Raises:
        UserError: the command has no such setting (the message suggests a similar one), or a value has the
            wrong type.
    """
    import pydantic

    checked = {}
    for name, value in named_as_fields(settings, types, source=str(path)).items():
        if name not in types:
            near = nearest_setting(name, types)
            offered = ", ".join(sorted(map(shown_name, types)))
            hint = f"did you mean {near!r}?" if near else f"choose one of {offered}"
            raise UserError(f"{name!r} in {path} is not a setting of this command; {hint}")
        if get_origin(types[name]) is tuple and isinstance(value, str):
            value = (value,)
        try:
            checked[name] = pydantic.TypeAdapter(types[name]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(
                f"{name!r} in {path} is {shown(repr(value))}: {reason[:1].lower()}{reason[1:]}"
            ) from None
    return checked
