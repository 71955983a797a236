"""The data sets of the synthetic suite, and the activation caches of their training rows.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.importing import HELD_OUT_SHARE, import_activations
from saebench.core.errors import UserError
from saebench.core.files import make_directory, require_disk, write_json_atomic
from saebench.core.reading import read_json
from saebench.evaluation.synthetic import ReadoutWorld, SuperpositionWorld, TreeWorld, World, ZipfWorld
from saebench.synth.settings import SyntheticData

DESCRIPTION = "data.json"
SMALL_LEVELS = (0, 4, 8)
FULL_LEVELS = tuple(range(9))
MOST_TEST_ROWS = 20_000
HOOK = "synthetic"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Rows of one world, and the settings shared by all SAEs that are trained on them.

    The SAEs have as many latents as there are true features, and a ``k`` near the true number of active
    features (for the readout, half of it, on purpose). Each training row is used once.
    """

    name: str
    kind: SyntheticData
    world: World
    k: int
    tokens: int
    """Rows to train on."""
    batch_size: int

    @property
    def d_sae(self) -> int:
        return self.world.features_FD.shape[0]

    @property
    def d_in(self) -> int:
        return self.world.features_FD.shape[1]

    @property
    def test_rows(self) -> int:
        """Number of rows to measure on; none of them is used in training."""
        return min(MOST_TEST_ROWS, self.tokens // 20)

    def describe(self) -> dict[str, Any]:
        """The settings of the data and of the training, as plain JSON values."""
        world = {"name": type(self.world).__name__, **dataclasses.asdict(self.world)}
        settings = {"k": self.k, "tokens": self.tokens, "batch_size": self.batch_size, "d_sae": self.d_sae}
        return {"world": world, **settings}


def data_sets(kinds: Sequence[SyntheticData], *, full: bool, tokens: int | None = None) -> list[DataSet]:
    """The data of these kinds, in the order of the suite; ``tokens`` replaces the rows to train on."""
    made: list[DataSet] = []
    if "tree" in kinds:
        # The authors train for 15,000 steps of 200 rows; the full suite uses the same rows in larger batches.
        size = _size(full, tokens, (3_000_000, 2000))
        made += [
            DataSet(name=f"tree-{level}", kind="tree", world=TreeWorld(level=level), k=2, **size)
            for level in (FULL_LEVELS if full else SMALL_LEVELS)
        ]
    size = _size(full, tokens, (1_000_000, 1000))
    if "zipf" in kinds:
        twin = ZipfWorld(difficulty="constant")
        made += [
            DataSet(name="zipf", kind="zipf", world=ZipfWorld(), k=8, **size),
            DataSet(name="zipf-constant", kind="zipf", world=twin, k=8, **size),
        ]
    if "readout" in kinds:
        made.append(DataSet(name="readout", kind="readout", world=ReadoutWorld(), k=8, **size))
    if "superposition" in kinds:
        world = SuperpositionWorld()
        made.append(DataSet(name="superposition", kind="superposition", world=world, k=10, **size))
    return made


def _size(full: bool, tokens: int | None, of_full: tuple[int, int]) -> dict[str, int]:
    """Rows to train on, and rows in a batch."""
    rows, batch_size = of_full if full else (150_000, 500)
    return {"tokens": tokens or rows, "batch_size": batch_size}


def claim_directory(data: DataSet, directory: Path) -> None:
    """Record in ``directory`` that it holds this data and the SAEs that are trained on it.

    Raises:
        UserError: the directory was made with other settings.
    """
    description, file = data.describe(), directory / DESCRIPTION
    before = read_json(file, what="the description of the data") if file.exists() else description
    if not isinstance(before, dict):
        raise UserError(f"{file} is damaged: it is not an object; choose another --out")
    for name, value in description.items():
        if before.get(name) != value:
            raise UserError(
                f"{directory} was made with {name} {_short(before.get(name))}, but this call has "
                f"{_short(value)}; choose another --out"
            )
    make_directory(directory)
    write_json_atomic(file, description)


def make_cache(data: DataSet, directory: Path, *, quiet: bool) -> ActivationCache:
    """Open the fp32 cache of the training rows in ``directory``/cache; make it if it does not exist.

    It has the rows for training and, in addition, the 5% of rows that an import holds out. The held-out rows
    calibrate thresholds; they are not the test rows.

    Raises:
        UserError: the disk is full.
    """
    cache = directory / "cache"
    if (cache / "manifest.json").exists():
        return open_cache(cache)
    arrays = directory / "arrays"
    with_gradients = data.world.readout_weights() is not None
    n_rows = math.ceil(data.tokens * HELD_OUT_SHARE / (HELD_OUT_SHARE - 1))
    n_bytes = 4 * n_rows * data.d_in * (1 + with_gradients)
    require_disk(directory, 2 * n_bytes, what=f"the data {data.name} (the array and its cache)")
    make_directory(arrays)
    _write_arrays(data, arrays, n_rows, with_gradients)
    made = import_activations(
        source=arrays / "x.npy",
        gradients=arrays / "gradients.npy" if with_gradients else None,
        out=cache,
        hook=HOOK,
        quiet=quiet,
    )
    shutil.rmtree(arrays)
    return made


def _write_arrays(data: DataSet, directory: Path, n_rows: int, with_gradients: bool) -> None:
    """Write x.npy and, if the world has a readout, gradients.npy, in chunks."""
    from numpy.lib.format import open_memmap

    names = ["x", "gradients"] if with_gradients else ["x"]
    shape = (n_rows, data.d_in)
    files = [
        open_memmap(directory / f"{name}.npy", mode="w+", dtype="float32", shape=shape) for name in names
    ]
    start = 0
    for piece in data.world.chunks(n_rows):
        for file, rows_ND in zip(files, (piece.x_ND, piece.gradient_ND), strict=False):
            assert rows_ND is not None
            file[start : start + piece.n_rows] = rows_ND.numpy()
        start += piece.n_rows
    for file in files:
        file.flush()


def _short(value: object) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
