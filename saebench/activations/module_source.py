"""ModuleSource: any torch module over batches of its inputs, as an ActivationSource.

Shapes: B units of a batch, P positions of a unit, N = B * P rows, D width of a site.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saebench.activations.manifest import HOOK_PREFIX, ROW_PREFIX, UNIT_PREFIX
from saebench.activations.module_inputs import (
    POSITION,
    RESERVED_COLUMNS,
    UserColumn,
    batch_hash,
    check_axes,
    expand_sites,
    move,
    read_columns,
    run_module,
    signature,
    state_hash,
)
from saebench.activations.settings import SourceConfig
from saebench.activations.writing import split_column
from saebench.core.errors import UserError
from saebench.sources.base import Axes, ColumnType, Site, UnitBatch
from saebench.sources.modality import MODALITIES
from saebench.sources.modality import modality as find_modality
from saebench.sources.native import ModuleSites, parse_site
from saebench.sources.text import is_held_out

_USUAL_AXES = {2: ("d",), 3: (POSITION, "d")}

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class _Layout:
    """How an activation becomes rows: the names of its axes after the first, and the axes of one row."""

    names: tuple[str, ...]
    axes: Axes

    @property
    def width(self) -> int:
        return math.prod(size for _, size in self.axes)

    def n_positions(self, value: Tensor) -> int:
        return math.prod(
            size for name, size in zip(self.names, value.shape[1:], strict=True) if name == POSITION
        )

    def rows(self, value: Tensor) -> Tensor:
        """The activation as [N, D]."""
        places = [i for i, name in enumerate(self.names, 1) if name == POSITION]
        others = [i for i, name in enumerate(self.names, 1) if name != POSITION]
        return value.permute(0, *places, *others).reshape(-1, self.width)


class ModuleSource:
    """The activations of any ``torch.nn.Module``; pass it to `harvest` as ``source``.

    A batch is run through the module once. The first axis of an activation counts units, such as images;
    [b, d] gives one row per unit and [b, t, d] gives t rows per unit. The rows of all sites must be the same
    ones. The module runs in evaluation mode and without gradients, on its own device and in its own type.

    About one unit in 20 is held out from training, chosen by a hash of its number.

    >>> import torch
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> batches = [torch.randn(50, 8) for _ in range(4)]
    >>> source = sb.ModuleSource(mlp, sites=["1"], batches=batches, name="my MLP")
    >>> sb.harvest(source=source, out="mlp-cache", quiet=True).activations("1").shape
    torch.Size([200, 16])

    Args:
        module: the module.
        sites: paths of submodules, as ``named_modules`` has them. "*" stands for anything within one part of
            a path: "encoder.layers.*.mlp". The site is the output of the submodule; "PATH:in" is its first
            tensor argument, "PATH:0" the first entry of the tuple that it returns.
        batches: an iterable of what the module takes, or a function that returns one. Each pass over it must
            give the same batches. Tensors in a batch are moved to the module's device.
        forward: ``forward(module, batch)`` runs the module. By default a batch is a tensor, or a mapping of
            keyword arguments.
        columns: ``columns(batch)`` returns columns to store: name -> integers, floats or booleans, one for
            each unit or one for each row of the batch. "held_out" replaces the choice of held-out units;
            "keep" says which rows are stored.
        axes: site (as in ``sites``) -> the names of all axes after the first, where an activation is neither
            [b, d] nor [b, t, d]. Places of axes called "pos" are rows; the others make up a row, in order:
            ("pos", "head", "d_head") for [b, t, n_heads, d_head], ("d", "pos", "pos") for [b, c, h, w].
        name: what the cache records and error sentences call the module; by default the name of its class.
        modality: what a unit is; see ``saebench/sources/modality.py``.

    Raises:
        UserError: a pattern that matches nothing, or batches that can be read only once.
    """

    kind: Any = "harvest"

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[str] | str,
        batches: Batches,
        *,
        forward: Callable[[Any, Any], object] | None = None,
        columns: Callable[[Any], Mapping[str, Any]] | None = None,
        axes: Mapping[str, Sequence[str]] | None = None,
        name: str | None = None,
        modality: str = "unit",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UserError(f"module is {type(module).__name__}; ModuleSource takes a torch.nn.Module")
        if modality not in MODALITIES.names():
            print(
                f"warning: modality {modality!r} is not installed, so its rows are shown as units; there is "
                f"{', '.join(MODALITIES.names())}",
                file=sys.stderr,
            )
        self.modality = modality
        self._module, self._batches = module, batches
        self._forward: Callable[[Any, Any], object] = forward or run_module
        self._columns = columns
        self._name = name or type(module).__name__
        given = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else [sites]
        found = expand_sites(module, given, self._name)
        check_axes(axes or {}, given)
        self._axes = {site: tuple((axes or {}).get(pattern, ())) for site, (_, pattern) in found.items()}
        places = {site: parse_site(path) for site, (path, _) in found.items()}
        self._sites = ModuleSites(module, places, name=self._name)
        if isinstance(batches, Iterator):
            raise UserError(
                f"batches is a {type(batches).__name__}, which can be read only once; give a list, a "
                "DataLoader or a function that returns an iterable"
            )
        if not callable(batches) and not isinstance(batches, Iterable):
            raise UserError(
                f"batches is a {type(batches).__name__}; give an iterable of batches, or a function that "
                "returns one"
            )
        self._running = threading.Lock()  # hooks of two passes at once would see each other's tensors
        self._dtype, self._shard_rows = "bf16", 65_536
        self._max_rows: int | None = None
        self._layouts: dict[str, _Layout] = {}
        self._columns_of: dict[str, UserColumn] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._first_hash: str | None = None

    def configure(self, config: SourceConfig) -> None:
        """Take the settings of the harvest; called first."""
        self._dtype, self._max_rows, self._shard_rows = str(config.dtype), config.tokens, config.shard_rows
        self._first_hash = None

    def identity(self) -> dict[str, Any]:
        self._first()
        parameter = next(itertools.chain(self._module.parameters(), self._module.buffers()), None)
        return {
            "module": {
                "name": self._name,
                "class": f"{type(self._module).__module__}.{type(self._module).__qualname__}",
                "hash": state_hash(self._module),
                "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
                "device": self._device.type,
            },
            "batches": {"first": self._first_hash},
            "settings": {
                "hook": list(self._axes),
                "axes": {site: list(names) for site, names in self._axes.items() if names},
                "tokens": self._max_rows,
                "dtype": self._dtype,
                "shard_rows": self._shard_rows,
            },
        }

    def prepare(self) -> None:
        """The first batch, run to its end, so that all that is wrong with sites and columns is found."""
        first = self._first()
        values = self._run(first, 1, stop=False)
        self._layouts = {site: self._layout(site, value) for site, value in values.items()}
        n_units, n_positions = self._size(values)
        if (shapes := signature(first)) is not None:
            self._sizes[shapes] = n_units, n_positions
        if self._columns is not None:
            self._columns_of, _ = read_columns(self._columns(first), n_units, n_positions, None)

    def open(self) -> Mapping[str, Site]:
        return {
            site: Site(site, layout.axes, self._dtype, "module") for site, layout in self._layouts.items()
        }

    def columns(self) -> Mapping[str, ColumnType]:
        of, int32 = find_modality(self.modality), ColumnType("int32")
        sites = {
            HOOK_PREFIX + site: ColumnType(self._dtype, (layout.width,))
            for site, layout in self._layouts.items()
        }
        own = {
            (UNIT_PREFIX if column.per_unit else ROW_PREFIX) + name: ColumnType(column.dtype)
            for name, column in self._columns_of.items()
            if name not in RESERVED_COLUMNS
        }
        usual = dict.fromkeys((of.unit_column, of.position_column, of.length_column), int32)
        return {**sites, **usual, "held_out": ColumnType("bool"), **own}

    def batches(self) -> Iterator[UnitBatch]:
        first_unit, n_rows = 0, 0
        for number, batch in enumerate(self._iterate(), 1):
            shapes = signature(batch)
            values: Mapping[str, Tensor] | None = None
            if shapes is None or shapes not in self._sizes:  # only running it tells the number of positions
                values = self._run(batch, number)
                size = self._size(values)
                if shapes is not None:
                    self._sizes[shapes] = size
            else:
                size = self._sizes[shapes]
            left = None if self._max_rows is None else self._max_rows - n_rows
            made = self._unit_batch(batch, number, values, first_unit, size, left)
            yield made
            first_unit, n_rows = first_unit + size[0], n_rows + made.n_rows
            if n_rows == self._max_rows:
                return
        if n_rows == 0:
            raise UserError(f"no batch of {self._name} has a row to store; check batches and columns")

    def files(self) -> Mapping[str, bytes]:
        return {}

    def nonfinite(self, column: str, batch: UnitBatch, row: int) -> str:
        what, site = split_column(column)
        of = find_modality(self.modality)
        place = of.place(*(int(batch.rows[name][row]) for name in (of.unit_column, of.position_column)))
        way_out = "check the module and its input, or choose another site"
        if self._dtype == "fp16":  # the other types hold all numbers that a module computes in float32
            way_out = "if the module's own numbers are finite, fp16 is too small: try dtype bf16 or fp32"
        return f"{what} at {site} of {self._name} hold NaN or infinity ({place}); {way_out}"

    @property
    def _device(self) -> torch.device:
        tensors = itertools.chain(self._module.parameters(), self._module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _iterate(self) -> Iterator[Any]:
        made = self._batches() if callable(self._batches) else self._batches
        if not isinstance(made, Iterable):
            raise UserError(f"batches() is a {type(made).__name__}; it must be an iterable of batches")
        first = True
        for batch in made:
            if first:
                self._require_same_first(batch_hash(batch))
            first = False
            yield batch
        if first:
            self._require_same_first(None)

    def _require_same_first(self, found: str | None) -> None:
        """Keep the hash of the first batch, or check that it is that of the passes before."""
        if self._first_hash is None:
            self._first_hash = found
        elif found != self._first_hash:
            raise UserError(
                f"batches of {self._name} begins with {'nothing' if found is None else 'another batch'} in a "
                "second pass, and each pass must give the same batches; do not shuffle or augment, and let a "
                "function return a new iterable each time"
            )

    def _first(self) -> Any:
        for batch in self._iterate():
            return batch
        raise UserError(f"batches of {self._name} is empty; give at least one batch")

    def _run(self, batch: Any, number: int, *, stop: bool = True) -> dict[str, Tensor]:
        """The values at the sites of batch ``number`` (from 1), in evaluation mode and without gradients."""

        def run() -> object:
            return self._forward(self._module, move(batch, self._device))

        with self._running, torch.no_grad(), _evaluating(self._module):
            try:
                return self._sites.read(run, stop=stop)
            except (UserError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of the user's own code
                which = "the first batch" if number == 1 else f"batch {number}"
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise UserError(
                    f"{self._name} cannot run {which} ({reason}); pass forward, or other batches"
                ) from error

    def _layout(self, site: str, value: Tensor) -> _Layout:
        shape = list(value.shape)
        if 0 in shape[1:]:
            raise UserError(f"{site} of {self._name} has shape {shape}, which is empty; choose another site")
        if not value.is_floating_point():
            raise UserError(f"{site} of {self._name} holds {value.dtype}; choose a site with floats")
        names = self._axes[site] or _USUAL_AXES.get(value.ndim)
        if names is None:
            raise UserError(
                f"{site} of {self._name} has shape {shape}; name its axes after the first with axes, such as "
                "('pos', 'head', 'd_head'), where 'pos' is an axis whose places are rows"
            )
        if len(names) != value.ndim - 1 or set(names) == {POSITION}:
            raise UserError(
                f"{site} of {self._name} has shape {shape} but axes names {', '.join(names)}; name every "
                "axis after the first, at least one of them not 'pos'"
            )
        sizes = zip(names, value.shape[1:], strict=True)
        return _Layout(names, tuple((name, size) for name, size in sizes if name != POSITION))

    def _size(self, values: Mapping[str, Tensor]) -> tuple[int, int]:
        """Units and positions of a batch; they must be those of all sites."""
        sizes = {}
        for site, value in values.items():
            layout = self._layouts[site]
            shape = value.shape[1:]
            fits = len(shape) == len(layout.names)
            axes = tuple(
                (name, size) for name, size in zip(layout.names, shape, strict=False) if name != POSITION
            )
            if not fits or axes != layout.axes:
                raise UserError(
                    f"{site} of {self._name} has shape {list(value.shape)}, but rows of {dict(layout.axes)} "
                    "in the first batch; give batches that make equal rows"
                )
            sizes[site] = len(value), layout.n_positions(value)
        first = next(iter(sizes))
        for site, size in sizes.items():
            if size != sizes[first]:
                (b, p), (b_1, p_1) = sizes[first], size
                raise UserError(
                    f"{first} has {b} units of {p} rows but {site} has {b_1} units of {p_1} rows in one "
                    f"batch of {self._name}; harvest them into two caches"
                )
        return sizes[first]

    def _unit_batch(
        self,
        batch: Any,
        number: int,
        values: Mapping[str, Tensor] | None,
        first_unit: int,
        size: tuple[int, int],
        left: int | None,
    ) -> UnitBatch:
        """Columns of a batch, and what computes its activations; at most ``left`` rows are kept."""
        n_units, n_positions = size
        of = find_modality(self.modality)
        unit_N = torch.arange(n_units, dtype=torch.int32).repeat_interleave(n_positions)
        rows = {
            of.unit_column: unit_N + first_unit,
            of.position_column: torch.arange(n_positions, dtype=torch.int32).repeat(n_units),
        }
        units = {of.length_column: torch.full((n_units,), n_positions, dtype=torch.int32)}
        given: dict[str, Tensor] = {}
        if self._columns is not None:
            _, given = read_columns(self._columns(batch), n_units, n_positions, self._columns_of)
        for name, value in given.items():
            per_unit = self._columns_of[name].per_unit
            if name in RESERVED_COLUMNS:
                rows[name] = value[unit_N.long()] if per_unit else value
            elif per_unit:
                units[UNIT_PREFIX + name] = value
            else:
                rows[ROW_PREFIX + name] = value
        if "held_out" not in rows:
            held_out_B = torch.tensor(
                [is_held_out(str(unit)) for unit in range(first_unit, first_unit + n_units)],
                dtype=torch.bool,
            )
            rows["held_out"] = held_out_B[unit_N.long()]
        keep_N = rows.pop("keep", torch.ones(len(unit_N), dtype=torch.bool)).nonzero()[:, 0][:left]
        rows = {name: column[keep_N] for name, column in rows.items()}
        return UnitBatch(rows, units, functools.partial(self._activations, batch, number, values, keep_N))

    def _activations(
        self, batch: Any, number: int, values: Mapping[str, Tensor] | None, keep_N: Tensor
    ) -> dict[str, Tensor]:
        """Columns [N, D] of the rows ``keep_N``."""
        if values is None:
            values = self._run(batch, number)
            self._size(values)
        return {
            HOOK_PREFIX + site: self._layouts[site].rows(value)[keep_N.to(value.device)]
            for site, value in values.items()
        }


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while it is open; then each submodule is in the mode that it had."""
    modes = [(part, part.training) for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
