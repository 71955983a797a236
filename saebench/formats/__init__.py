"""Import and export of SAEs in the formats of other libraries; registry.py lists the formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saebench.core.errors import UserError
from saebench.core.files import is_leftover, require_writable
from saebench.core.settings import accepts_settings
from saebench.formats.registry import Format, formats
from saebench.formats.settings import ExportConfig, ImportSaeConfig


@dataclass(frozen=True, kw_only=True)
class Translation:
    """An SAE that was converted to another format."""

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


@accepts_settings(ExportConfig)
def export_sae(config: ExportConfig) -> Translation:
    """Write a trained SAE in the format of another library.

    >>> sb.export_sae(run, out="theirs", format="saelens").architecture
    'topk'

    Raises:
        UserError: the run has no finished SAE, the format cannot hold it, or ``out`` is not empty.
    """
    from saebench.runs.run import Run

    form: Format = formats.load(config.format)
    run = Run(config.run)
    sae = run.load()
    converted = form.convert(sae)
    _make_empty(config.out)
    form.write(converted, config.out, sae, run)
    return Translation(
        path=config.out,
        sae=sae.spec.name,
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
    form: Format = formats.load(config.format)
    foreign = form.read(config.source, k=config.k)
    sae = foreign.build(source=str(config.source))
    origin = {"format": config.format, **foreign.facts}
    _make_empty(config.out)
    sae.save(config.out, hook_name=origin.pop("hook_name", None), imported=origin)
    return Translation(
        path=config.out,
        sae=sae.spec.name,
        architecture=origin["architecture"],
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=sae.k,
        notes=foreign.notes,
    )


def _make_empty(directory: Path) -> None:
    require_writable(directory, what="the folder")
    unexpected = sorted(path.name for path in directory.iterdir() if not is_leftover(path))
    if unexpected:
        raise UserError(f"{directory} is not empty (it holds {unexpected[0]}); choose another folder")
