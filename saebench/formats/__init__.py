"""Import and export of SAEs in the formats of other libraries; registry.py lists the formats."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from saebench.core.errors import UserError
from saebench.core.files import is_leftover, remove_dead, require_writable
from saebench.core.settings import accepts_settings
from saebench.formats.registry import Format, SetFormat, formats
from saebench.formats.settings import ExportConfig, ImportSaeConfig


@dataclass(frozen=True, kw_only=True)
class Translation:
    """An SAE, or a set of them, that was converted to another format; d_in, d_sae and k of a set are those of
    its first SAE."""

    path: Path
    """The folder that was written."""
    sae: str
    """Our architecture."""
    architecture: str
    """The other library's name for it."""
    d_in: int
    d_sae: int
    k: int
    notes: tuple[str, ...] = ()
    """Differences that the user should know, one sentence each."""
    folders: tuple[Path, ...] = ()
    """Of an imported set, the folder of each SAE."""


@accepts_settings(ExportConfig)
def export_sae(config: ExportConfig) -> Translation:
    """Write a trained SAE, or those of several runs as a set, in the format of another library.

    >>> sb.export_sae(run, out="theirs", format="saelens").architecture
    'topk'

    Raises:
        UserError: the run has no finished SAE, the format cannot hold it, or ``out`` is not empty.
    """
    from saebench.runs.run import Run

    form: Format | SetFormat = formats.load(config.format)
    runs = [Run(run) for run in config.runs]
    sae = runs[0].load()
    if isinstance(form, SetFormat):
        converted = form.convert_set(runs)
        with _filling(config.directory):
            form.write_set(converted, config.directory)
    elif len(runs) > 1:
        raise UserError(
            f"--format {config.format} holds one SAE, and {len(runs)} runs are named; export them one by one"
        )
    else:
        converted = form.convert(sae)
        with _filling(config.directory):
            form.write(converted, config.directory, sae, runs[0])
    return Translation(
        path=config.directory,
        sae=_joined(run.description()["sae"] for run in runs),
        architecture=converted.architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=sae.k,
        notes=(converted.note,) if converted.note else (),
    )


@accepts_settings(ImportSaeConfig)
def import_sae(config: ImportSaeConfig) -> Translation:
    """Convert an SAE of another library into a folder that ``load``, ``evaluate`` and ``index`` accept.

    >>> theirs = sb.export_sae(run, out="foreign", format="saelens")
    >>> ours = sb.import_sae("foreign", out="ours", format="saelens")
    >>> bool((sb.load("ours").W_dec == sb.load(run).W_dec).all())
    True

    Raises:
        UserError: the source has no SAE, a damaged one, or one that no architecture of saebench computes;
            or ``out`` is not empty.
    """
    form: Format | SetFormat = formats.load(config.format)
    if isinstance(form, SetFormat):
        named = form.read_set(config.source, k=config.k)
    else:
        named = [("", form.read(config.source, k=config.k))]
    made: list[Translation] = []
    with contextlib.ExitStack() as stack:
        for name, foreign in named:  # one in memory at a time
            sae = foreign.build(source=str(config.source))
            if not made:
                stack.enter_context(_filling(config.out))
            origin = {"format": config.format, **foreign.facts}
            sae.save(config.out / name, hook_name=origin.pop("hook_name", None), imported=origin)
            made.append(
                Translation(
                    path=config.out / name,
                    sae=sae.spec.name,
                    architecture=origin["architecture"],
                    d_in=sae.d_in,
                    d_sae=sae.d_sae,
                    k=sae.k,
                    notes=foreign.notes,
                )
            )
    notes = dict.fromkeys(note for one in made for note in one.notes)
    folders = tuple(one.path for one in made) if made[0].path != config.out else ()
    names = _joined(one.sae for one in made)
    return replace(made[0], path=config.out, sae=names, notes=tuple(notes), folders=folders)


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


@contextlib.contextmanager
def _filling(directory: Path) -> Iterator[None]:
    """Fill an empty directory. It is empty again if that fails, so that the same command can be run again.

    Raises:
        UserError: the directory is not empty, or cannot be made.
    """
    require_writable(directory, what="the folder")
    remove_dead(directory)
    unexpected = sorted(path.name for path in directory.iterdir() if not is_leftover(path))
    if unexpected:
        raise UserError(f"{directory} is not empty (it holds {unexpected[0]}); choose another folder")
    try:
        yield
    except BaseException:
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
