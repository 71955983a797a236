"""Diagnosis of a cache: norms of rows, where the variance is, and the rounding error of the stored type.

For the rows x_i of a sample, with their mean m and V = sum_i |x_i - m|^2, of each site:

    norm             quantiles of |x_i|; 'max' is over all rows of the cache
    top_rows         share of V in the 0.1% of rows that are farthest from m (at least one row)
    top_dimension    share of V in the dimension of largest variance
    top_10_dimensions  and in the ten dimensions of largest variance
    massive_rows     share of the rows whose norm is above 10 times the median norm (attention sinks)
    massive_variance  share of V that is there because of these rows: 1 - (V of the other rows) / V
    fvu_floor        sum over all values x of ulp(x)^2 / 12, divided by V

ulp(x) = 2^(floor(log2 |x|) - b) is the distance of neighboring numbers of the stored type, which has b bits
after the leading one (bf16 7, fp16 10, fp32 23). Rounding to the nearest number makes an error that is nearly
uniform in [-ulp/2, ulp/2], so its square is ulp^2 / 12 on average: an SAE that reproduced the unrounded
activations exactly would have this FVU.

The sample has at most `SAMPLE_ROWS` rows, all of a smaller cache, and is the same for equal caches. Numbers
are rounded to six digits. A share is None if V is 0.

Shapes: N rows, M rows of the sample, D width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saebench.core.hashing import hash_random, uniform_below

SAMPLE_ROWS = 65_536
SAMPLE_VALUES = 2**25
"""Values of a sample: sites wider than 512 have fewer rows in it."""
QUANTILES = {"min": 0.0, "1%": 0.01, "50%": 0.5, "99%": 0.99, "99.9%": 0.999}
NORMS = (*QUANTILES, "max")
TOP_ROWS = 0.001
MOST_IN_TOP_ROWS = 0.2
HIGHEST_FLOOR = 1e-3
MASSIVE = 10.0
"""Multiple of the median norm above which a row is massive."""
MOST_MASSIVE_ROWS = 0.05
"""Share of the rows above which massive rows are no outliers: norms vary that much."""
FEWEST_ROWS = 1000
"""Rows of a sample that an advice on its top rows needs."""
_CHUNK_VALUES = 2**22
_FLOATS = {
    torch.bfloat16: (7, torch.int16, 0x7F80, -126),
    torch.float16: (10, torch.int16, 0x7C00, -14),
    torch.float32: (23, torch.int32, 0x7F800000, -126),
}
"""Type -> bits after the leading one; an integer type of its size, and the bits of the exponent in it; the
smallest exponent of a normal number."""


def diagnose(
    sites: Mapping[str, Tensor], max_norms: Mapping[str, float], held_out_N: Tensor, doc_N: Tensor | None
) -> dict[str, Any]:
    """The diagnosis of a cache as JSON: its rows, its documents if it is of a text, and its ``sites``.

    Args:
        sites: name -> rows [N, D] in their stored type.
        max_norms: name -> the largest norm of all rows; see `largest_norm`.
        held_out_N: bool.
        doc_N: the document of each row.
    """
    n_rows = len(held_out_N)
    found: dict[str, Any] = {
        "n_rows": n_rows,
        "held_out_rows": _rounded(int(held_out_N.sum()) / n_rows),
        "sample_rows": {name: len(_sample(n_rows, x_ND.shape[1])) for name, x_ND in sites.items()},
    }
    if doc_N is not None:
        n_documents, n_held_out = _documents(doc_N, held_out_N)
        found |= {"n_documents": n_documents, "held_out_documents": _rounded(n_held_out / n_documents)}
    return {
        **found,
        "sites": {name: _diagnose_site(x_ND, max_norms[name]) for name, x_ND in sites.items()},
    }


def largest_norm(x_ND: Tensor) -> float:
    """The largest Euclidean norm of the rows, computed in float32; 0 without rows."""
    return max((float(_norms(chunk_MD).max()) for chunk_MD in _chunks(x_ND)), default=0.0)


def has_massive_rows(found: Mapping[str, Any]) -> bool:
    """Whether the massive rows of a site, by its diagnosis, are few and hold much of its variance."""
    return (found["massive_variance"] or 0) > MOST_IN_TOP_ROWS and found["massive_rows"] <= MOST_MASSIVE_ROWS


def about_massive_rows(site: str, found: Mapping[str, Any]) -> str:
    """What a warning says about them, with numbers."""
    norm = found["norm"]
    share = f"{found['massive_rows']:.2%}" if found["massive_rows"] else "a few"
    return (
        f"{share} of the rows at {site} have a norm above {MASSIVE:g} times the "
        f"median (largest {norm['max']:.3g}, median {norm['50%']:.3g}) and hold "
        f"{found['massive_variance']:.1%} of the variance"
    )


def advice(diagnosis: Mapping[str, Any], *, of_text: bool) -> list[str]:
    """A sentence for each thing that is off; empty where all is well."""
    sentences = []
    for site, found in diagnosis["sites"].items():
        top, floor = found["top_rows"] or 0, found["fvu_floor"] or 0
        if diagnosis["sample_rows"][site] >= FEWEST_ROWS:
            if has_massive_rows(found):
                way_out = "harvest --max-norm 10 leaves them out" if of_text else "or remove them"
                sentences.append(
                    f"{about_massive_rows(site, found)}, and an SAE would learn little else; train scales "
                    f"them down unless --clip-norm is 0, {way_out}"
                )
            elif top > MOST_IN_TOP_ROWS:
                multiple = found["norm"]["99.9%"] / found["norm"]["50%"] if found["norm"]["50%"] else 0
                way_out = "remove rows of huge norm before importing"
                if of_text:
                    way_out = f"harvest with --max-norm {max(2, round(multiple))}, and without --keep-first"
                sentences.append(
                    f"0.1% of the rows at {site} hold {top:.0%} of the variance, and an SAE would learn "
                    f"little else; {way_out}"
                )
        if floor > HIGHEST_FLOOR:
            sentences.append(
                f"rounding to the stored type alone gives an FVU of {floor:.2g} at {site}; use --dtype fp32"
            )
    return sentences


def _diagnose_site(x_ND: Tensor, max_norm: float) -> dict[str, Any]:
    n, d = x_ND.shape
    index_M = _sample(n, d)
    norm_M = np.empty(len(index_M))
    total_D = torch.zeros(d, dtype=torch.float64)
    rounding = 0.0
    for at, stored_MD in _sampled(x_ND, index_M):
        chunk_MD = stored_MD.float()
        norm_M[at] = _norms(chunk_MD).numpy()
        total_D += chunk_MD.sum(dim=0, dtype=torch.float64)
        rounding += float((_norms(_ulp(stored_MD)).numpy().astype(np.float64) ** 2).sum()) / 12
    mean_D = (total_D / len(index_M)).float()
    with np.errstate(invalid="ignore"):  # infinite norms
        quantiles = np.quantile(norm_M, list(QUANTILES.values()))
        massive_M = norm_M > MASSIVE * np.median(norm_M)
    massive_total_D = torch.zeros(d, dtype=torch.float64)
    distance_M = np.empty(len(index_M))
    variance_D = torch.zeros(d, dtype=torch.float64)
    for at, stored_MD in _sampled(x_ND, index_M):
        chunk_MD = stored_MD.float()
        massive_total_D += chunk_MD[torch.from_numpy(massive_M[at])].sum(dim=0, dtype=torch.float64)
        square_MD = (chunk_MD - mean_D).square_()
        distance_M[at] = square_MD.sum(dim=1).numpy()
        variance_D += square_MD.sum(dim=0, dtype=torch.float64)
    total = float(variance_D.numpy().sum())
    n_top = max(1, round(TOP_ROWS * len(index_M)))
    by_dimension = np.sort(variance_D.numpy())[::-1]

    def share(part: float) -> float | None:
        return _rounded(part / total) if total > 0 else None  # None too where squares are infinite

    n_other = max(1, int((~massive_M).sum()))
    offset = float(((total_D - massive_total_D) / n_other - mean_D.double()).square().sum())
    massive = max(0.0, total - (float(distance_M[~massive_M].sum()) - n_other * offset))
    if not massive_M.any() and MASSIVE * quantiles[2] < max_norm < math.inf:  # the sample has missed them
        most = (max_norm - float(mean_D.double().norm())) ** 2 * len(index_M) / len(x_ND)
        massive, total_with = most, total + most
    else:
        total_with = total
    return {
        "norm": {
            **{name: _rounded(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
            "max": _rounded(max_norm),
        },
        "top_rows": share(np.sort(distance_M)[-n_top:].sum()),
        "top_dimension": share(by_dimension[0]),
        "top_10_dimensions": share(by_dimension[:10].sum()),
        "fvu_floor": share(rounding),
        "massive_rows": _rounded(float(massive_M.mean())),
        "massive_variance": _rounded(massive / total_with) if total_with > 0 else None,
    }


def _sample(n_rows: int, width: int) -> npt.NDArray[np.int64]:
    """Row numbers in order: all, or one drawn from each of equally many parts of the cache."""
    size = min(SAMPLE_ROWS, max(1, SAMPLE_VALUES // width))
    if n_rows <= size:
        return np.arange(n_rows)
    # A fixed step could meet one position of every context.
    edges = np.arange(size + 1) * n_rows // size
    return edges[:-1] + uniform_below(hash_random(np.arange(size), 0, 0), np.diff(edges))


def _sampled(x_ND: Tensor, index_M: npt.NDArray[np.int64]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the sample in their stored type, and their places in it."""
    step = max(1, _CHUNK_VALUES // x_ND.shape[1])
    for start in range(0, len(index_M), step):
        at = slice(start, start + step)
        yield at, x_ND[torch.from_numpy(index_M[at])]


def _chunks(x_ND: Tensor) -> Iterator[Tensor]:
    for chunk_MD in torch.split(x_ND, max(1, _CHUNK_VALUES // x_ND.shape[1])):
        yield chunk_MD.float()


def _norms(x_MD: Tensor) -> Tensor:
    norm_M: Tensor = torch.linalg.vector_norm(x_MD, dim=1)
    return norm_M


def _ulp(stored_MD: Tensor) -> Tensor:
    """The distance of each value's neighbors in its type, in float32."""
    bits, integer, exponent, smallest = _FLOATS[stored_MD.dtype]
    power_MD = (stored_MD.view(integer) & exponent).view(stored_MD.dtype).float()
    return power_MD.clamp_(min=2.0**smallest).mul_(2.0**-bits)


def _documents(doc_N: Tensor, held_out_N: Tensor) -> tuple[int, int]:
    """The number of documents that have rows, and of those whose rows are held out."""
    seen = np.zeros(0, np.uint8)
    for doc_M, held_out_M in zip(torch.split(doc_N, 2**22), torch.split(held_out_N, 2**22), strict=True):
        doc = doc_M.numpy()
        if (largest := int(doc.max())) >= len(seen):
            seen = np.concatenate([seen, np.zeros(2 * largest + 1 - len(seen), np.uint8)])
        seen[doc] = 1 + held_out_M.numpy()
    return int((seen > 0).sum()), int((seen == 2).sum())


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
