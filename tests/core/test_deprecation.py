"""Old names keep working for one version, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys

import pytest

from saebench.core.deprecation import MOVED_MODULES, renamed, renamed_arguments


@renamed_arguments(colour="color")
def paint(color: str = "red") -> str:
    return color


def test_an_old_keyword_gives_the_same_result_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"\(colour=...\) is deprecated.* use paint\(color=...\)"):
        assert paint(colour="blue") == "blue"  # type: ignore[call-arg]
    assert paint(color="blue") == "blue"
    with pytest.raises(TypeError, match="both colour and color"):
        paint(color="blue", colour="red")  # type: ignore[call-arg]


def test_an_old_name_gives_the_same_result_with_a_warning() -> None:
    old = renamed("old_paint", paint)
    with pytest.warns(DeprecationWarning, match="old_paint is deprecated.* use paint"):
        assert old("green") == "green"


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_an_old_module_path_imports_the_module_from_its_new_place(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated.* use {MOVED_MODULES[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED_MODULES[old])
    assert module.__spec__ is not None and module.__spec__.name == MOVED_MODULES[old]
