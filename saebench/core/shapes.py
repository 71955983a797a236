"""Shapes of JSON files: which keys an object must have, and of what kind their values are.

A shape checks kinds strictly (true is not 1, "1" is not 1) and leaves other keys alone; see
`saebench.core.reading.check_shape`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat


class Shape(BaseModel):
    """Base of all shapes. A key with a default may be missing."""

    model_config = ConfigDict(strict=True, extra="ignore")


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Number = FiniteFloat
Text = Annotated[str, Field(max_length=100_000)]
"""A string without lone surrogates, which can be stored, printed and hashed."""
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _path(value: object) -> object:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("should be a path")
    return value


PathText = Annotated[Any, AfterValidator(_path)]
"""A path as a string. One that is not UTF-8 has lone surrogates, as `os.fsdecode` makes them."""


class ModelName(Shape):
    """A language model, as folders of SAEs from elsewhere may name it."""

    name: Name
    revision: Text | None = None
    hash: Name | None = None
    identity: Name | None = None


class ModelFacts(ModelName):
    """A language model, as caches and runs record it."""

    hash: Name


class ContextFacts(Shape):
    """How contexts were made, as runs record it (saebench/runs/provenance.py)."""

    ctx: Positive | None = None
    bos: bool | None = None
    keep_first: bool | None = None
    keep_last: bool = True
    text: Text | None = None
    exclude_tokens: list[Count] = Field(default_factory=list)
    max_norms: dict[str, Number] = Field(default_factory=dict)


class TensorEntry(Shape):
    """A tensor in the header of a safetensors file."""

    dtype: Name
    shape: list[Count]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]
