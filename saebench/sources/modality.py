"""Modalities: what the rows and units of a cache are, and how a unit is shown as text.

A unit is one input of the model. A row is one vector of it. Of a text, a unit is a context and a row is a
token. Another package adds a modality with an entry point of the group ``saebench.modalities``, whose object
is a `Modality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saebench.core.errors import UserError
from saebench.core.registry import Registry


@dataclass(frozen=True)
class Modality:
    """What rows and units are. A subclass may show them in another way.

    Args:
        name: the name that manifests record.
        unit: what one unit is called, in the singular.
        unit_column: the row column with the number of each row's unit, from 0.
        position_column: the row column with the place of each row in its unit, from 0.
        length_column: the unit column with the number of positions of each unit.
        row_columns: all row columns that a harvest has, beside ``held_out``.
        unit_columns: all unit columns that a harvest has.
        files: files that a harvest has.
    """

    name: str
    unit: str
    unit_column: str = "unit"
    position_column: str = "pos"
    length_column: str = "unit_len"
    row_columns: tuple[str, ...] = ("unit", "pos")
    unit_columns: tuple[str, ...] = ("unit_len",)
    files: tuple[str, ...] = ()

    def place(self, unit: int, position: int) -> str:
        """The words for one row in a sentence: 'unit 17, position 3'."""
        return f"{self.unit} {unit}, position {position}"

    def pieces(self, unit: int, start: int, n_positions: int) -> list[str]:
        """What is shown for each of the positions from ``start`` on; joined, they are one line of text."""
        if start == 0 and n_positions == 1:
            return [f"{self.unit} {unit}"]
        first = [f"{self.unit} {unit}: {start}"] if n_positions else []
        return first + [f" {position}" for position in range(start + 1, start + n_positions)]

    def describe(self, values: Mapping[str, float]) -> str:
        """The values of the columns that the user gave for a unit or row: 'label=3, weight=0.5'."""
        return ", ".join(f"{name}={value:g}" for name, value in values.items())


TEXT = Modality(
    "text",
    "context",
    unit_column="ctx",
    length_column="context_len",
    row_columns=("token", "doc", "ctx", "pos"),
    unit_columns=("context_tokens", "context_len"),
    files=("vocab.safetensors",),
)
UNIT = Modality("unit", "unit")

MODALITIES = Registry(
    kind="a modality",
    group="saebench.modalities",
    built_in={"text": "saebench.sources.modality:TEXT", "unit": "saebench.sources.modality:UNIT"},
)


def modality(name: str) -> Modality:
    """The modality called ``name``.

    One that is not installed has the columns of `UNIT` and is shown like it, so that its caches and stores
    can be opened.
    """
    try:
        found = MODALITIES.load(name)
    except UserError:
        return Modality(name, UNIT.unit)
    if not isinstance(found, Modality):
        raise UserError(
            f"the modality {name!r} is a {type(found).__name__}, not a saebench.sources.modality.Modality; "
            "update the package that adds it"
        )
    return found
