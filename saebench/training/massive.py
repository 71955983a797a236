"""What --clip-norm does to a cache: which of its rows are scaled down in a training, and the warnings."""

from __future__ import annotations

import sys
from typing import Any

from saebench.activations.cache import ActivationCache
from saebench.activations.diagnosis import MASSIVE, about_massive_rows, has_massive_rows
from saebench.core.errors import UserError
from saebench.runs.layout import RUN_FILE, read_run
from saebench.saes.scales import NormClip, NormLimit
from saebench.training.settings import TrainConfig

FACT = "clipped"
"""Key in run.json: site -> the norm above which its rows are scaled down, and the norm that they get."""


def norm_clip(
    config: TrainConfig, cache: ActivationCache, sites: list[str]
) -> tuple[NormClip, dict[str, Any], list[str]]:
    """How rows are scaled down; what run.json says of it; and the sentences of a warning, with numbers.

    With 'auto', a resumed run goes on as it was begun, also if an earlier version has begun it.

    Raises:
        UserError: a multiple was given and the median norm of a site is 0.
    """
    multiple, limits, sentences = config.clip_norm, {}, []
    if multiple == "auto" and config.resume and (config.out / RUN_FILE).is_file():
        multiple = "auto" if FACT in read_run(config.out, needs=()) else 0
    diagnosis = cache.diagnosis["sites"]
    for site in dict.fromkeys([*sites, *config.target]):
        found = diagnosis[site]
        median, largest = found["norm"]["50%"], found["norm"]["max"]
        if median is None or largest is None:  # infinite: training says so when it meets the row
            continue
        massive = has_massive_rows(found)
        if multiple == "auto":
            limit = MASSIVE * median if massive else None
        else:
            limit = multiple * median if multiple else None
            if limit == 0:
                raise UserError(
                    f"the median norm at {site} is 0, so --clip-norm has no meaning there; leave it out"
                )
        if limit is not None and largest > limit:
            limits[site] = NormLimit(limit, median)
        if massive and site in limits:
            sentences.append(
                f"{about_massive_rows(site, found)}; this training scales them down to the median norm "
                "(--clip-norm 0 keeps them as they are)"
            )
        elif massive:
            sentences.append(
                f"{about_massive_rows(site, found)}, and an SAE learns little else; leave --clip-norm "
                f"{multiple:g} out, or harvest with --max-norm"
            )
    clip = NormClip(
        tuple(limits.get(site) for site in sites), tuple(limits.get(site) for site in config.target)
    )
    facts = {site: at._asdict() for site, at in limits.items()}
    return clip, {FACT: facts} if facts else {}, sentences


def warn(sentences: list[str]) -> None:
    """Print warnings once for all SAEs of a sweep."""
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr)
