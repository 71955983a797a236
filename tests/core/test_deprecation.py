"""Old names keep working for one version, and say so."""

from __future__ import annotations

import pytest

from saebench.core.deprecation import renamed, renamed_arguments


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
