"""Dataclasses of settings: their base, help texts, conversion from and to plain values, keyword calls."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, TypeVar

from saebench.core.bounds import check_bounds
from saebench.core.errors import UserError
from saebench.core.refusals import system_refusals

ResultT = TypeVar("ResultT")
ValueT = TypeVar("ValueT")


SHOWN_NAMES = {"hook": "site"}
"""Setting -> the name that people are shown for it. Commands and calls take both names; saved files have the
setting's."""


class Settings:
    """Base of every dataclass of settings: a value outside the bounds of its field raises a UserError."""

    def __post_init__(self) -> None:
        check_bounds(self)


ADDED_LATER: Final = {"added_later": True}
"""Metadata of a field that an earlier version did not have: its default is not written, so that the files of
settings that do not use it stay what they were."""
DERIVED: Final = {**ADDED_LATER, "derived": True}
"""Metadata of a field that is computed, not set: it is neither a flag nor a keyword."""
ONE_OR_MORE: Final = {"one_or_more": True}
"""Metadata of a tuple that was one value or None in an earlier version, and is written so where it can be."""


def setting_names(config_class: type[Any]) -> list[str]:
    """The fields of ``config_class`` that a user can set."""
    return [field.name for field in dataclasses.fields(config_class) if not field.metadata.get("derived")]


def field_docs(config_class: type[Any]) -> dict[str, str]:
    """Field -> the string literal that follows it in the source of the class or of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def show_settings(function: Callable[..., Any], like: Callable[..., Any], *config_classes: type[Any]) -> None:
    """Give ``function`` the signature and help of a call with the fields of ``config_classes`` as keywords.

    The rest (name, text, what is returned, further keywords) is that of ``like``.
    """
    own = inspect.signature(like)
    settable = {config_class: setting_names(config_class) for config_class in config_classes}
    made = [
        parameter
        for config_class in config_classes
        for name, parameter in inspect.signature(config_class).parameters.items()
        if name in settable[config_class]
    ]
    made += [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]
    function.__signature__ = _with_shown_names(own.replace(parameters=made))  # type: ignore[attr-defined]
    lines = [
        textwrap.fill(f"{shown_name(name)}: {text}", 100, initial_indent="    ", subsequent_indent="        ")
        for config_class in config_classes
        for name, text in field_docs(config_class).items()
        if name in settable[config_class]
    ]
    function.__doc__ = "\n".join([inspect.cleandoc(like.__doc__ or ""), "", "Settings:", *lines])


def shown_name(name: str) -> str:
    """The name that people are shown for the setting ``name``."""
    return SHOWN_NAMES.get(name, name)


def nearest_setting(name: str, known: Iterable[str]) -> str | None:
    """The shown name of the setting that ``name`` is probably meant for."""
    names = {either: shown_name(one) for one in known for either in (one, shown_name(one))}
    return next((names[near] for near in difflib.get_close_matches(name, names, n=1)), None)


def named_as_fields(values: Mapping[str, ValueT], known: Container[str], *, source: str) -> dict[str, ValueT]:
    """``values`` with the shown names of the settings ``known`` replaced by the names of their fields.

    Raises:
        UserError: one setting is given under both names.
    """
    renamed = dict(values)
    for name, shown in SHOWN_NAMES.items():
        if name in known and shown not in known and shown in renamed:
            if name in renamed:
                raise UserError(f"{source} has both {shown} and {name}, which are one setting; give {shown}")
            renamed[name] = renamed.pop(shown)
    return renamed


def takes_shown_names(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Let a function with a parameter ``hook`` also be called with the keyword ``site``."""
    own = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> ResultT:
        source = f"the call of {function.__name__}"
        return function(*arguments, **named_as_fields(keywords, own.parameters, source=source))

    call.__signature__ = _with_shown_names(own)  # type: ignore[attr-defined]
    return call


def _with_shown_names(signature: inspect.Signature) -> inspect.Signature:
    """``signature`` with the shown names of its parameters as further keywords."""
    made = list(signature.parameters.values())
    for parameter in signature.parameters.values():
        shown = SHOWN_NAMES.get(parameter.name)
        if shown is not None and shown not in signature.parameters:
            place = made.index(parameter)
            while place < len(made) and made[place].kind is parameter.POSITIONAL_OR_KEYWORD:
                place += 1
            made.insert(place, parameter.replace(name=shown, kind=parameter.KEYWORD_ONLY))
    return signature.replace(parameters=made)


ConfigT = TypeVar("ConfigT")


def from_flat(
    config_class: type[ConfigT],
    values: Mapping[str, object],
    *,
    source: str = "the settings",
    strict: bool = False,
) -> ConfigT:
    """Make a ``config_class`` from plain values (keyword arguments, TOML, JSON), checked against its types.

    Args:
        strict: refuse what people may write and files of ours do not have: "12" for 12, or 1 for True.

    Raises:
        UserError: an unknown name (the nearest is offered), a missing one, or a value of the wrong type.
    """
    import pydantic

    known = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    values = named_as_fields(values, known, source=source)
    for name in values:
        if name not in known:
            near = nearest_setting(name, known)
            hint = f"did you mean {near!r}?" if near else f"there is {', '.join(map(shown_name, known))}"
            raise UserError(f"{name!r} in {source} is not a setting of {config_class.__name__}; {hint}")
    fields = {f.name: f for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    lists = {name for name, f in fields.items() if isinstance(f.default, tuple)}
    values = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in values.items()}
    values = {name: (v,) if name in lists and isinstance(v, str) else v for name, v in values.items()}
    values = {
        name: () if v is None and fields[name].metadata.get("one_or_more") else v
        for name, v in values.items()
    }
    try:
        adapter = pydantic.TypeAdapter(config_class)
        if strict:  # as JSON, in which a list is a tuple and an object a dataclass
            return adapter.validate_json(json.dumps(values), strict=True)
        return adapter.validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        where = str(first["loc"][0])[:60] if first["loc"] else config_class.__name__
        if first["type"] == "missing":
            raise UserError(f"{where!r} is missing from {source}") from None
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{where!r} in {source} is {first['input']!r:.200}: {reason}") from None


def to_flat(config: Any) -> dict[str, Any]:
    """Plain JSON values of a config, the inverse of ``from_flat``."""

    def plain(value: object) -> object:
        if isinstance(value, Path):
            return str(value)
        if dataclasses.is_dataclass(value):
            return to_flat(value)
        return [plain(part) for part in value] if isinstance(value, tuple) else value

    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("added_later") and value == field.default:
            continue
        if field.metadata.get("one_or_more") and len(value) < 2:
            value = value[0] if value else None
        flat[field.name] = plain(value)
    return flat


def accepts_settings(config_class: type[Any]) -> Callable[[Callable[[Any], ResultT]], Callable[..., ResultT]]:
    """Let a function of one config also be called with the config's fields.

    ``evaluate(EvalConfig(run="runs/a"))``, ``evaluate(run="runs/a")`` and ``evaluate("runs/a")`` are the
    same call: keywords are fields, and the first field may stand without its name.
    """
    first_field = dataclasses.fields(config_class)[0].name

    def decorate(function: Callable[[Any], ResultT]) -> Callable[..., ResultT]:
        @functools.wraps(function)
        def call(first: Any = None, /, **settings: Any) -> ResultT:
            if isinstance(first, config_class):
                if settings:
                    raise TypeError(f"{function.__name__} takes a config or keywords, not both")
                with system_refusals():
                    return function(first)
            if first is not None:
                if first_field in settings:
                    raise TypeError(f"{function.__name__} got two values for {first_field}; give one")
                settings = {first_field: first, **settings}
            with system_refusals():
                return function(from_flat(config_class, settings, source=f"the call of {function.__name__}"))

        show_settings(call, function, config_class)
        return call

    return decorate


def whole_number(text: str) -> int:
    """An int, also when it is written 2e6, 2.5e6 or 2_000_000.

    Raises:
        ValueError: it is not a whole number.
    """
    try:
        number = Decimal(text)
        if number != number.to_integral_value():
            raise ValueError
        return int(number)
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f'"{text}" is not a whole number') from None
