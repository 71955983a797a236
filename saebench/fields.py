"""What settings classes say of themselves: the string below each field, and one signature for a call."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


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
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def show_settings(function: Callable[..., Any], like: Callable[..., Any], *config_classes: type[Any]) -> None:
    """Give ``function`` the signature and help of a call with the fields of ``config_classes`` as keywords.

    The rest (name, text, what is returned, further keywords) is that of ``like``.
    """
    own = inspect.signature(like)
    made = [
        parameter
        for config_class in config_classes
        for parameter in inspect.signature(config_class).parameters.values()
    ]
    made += [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=made)  # type: ignore[attr-defined]
    lines = [
        textwrap.fill(f"{name}: {text}", 100, initial_indent="    ", subsequent_indent="        ")
        for config_class in config_classes
        for name, text in field_docs(config_class).items()
    ]
    function.__doc__ = "\n".join([inspect.cleandoc(like.__doc__ or ""), "", "Settings:", *lines])
