"""match and splits: corresponding latents of two SAEs of other seeds, widths, architectures or checkpoints.

Shapes: N rows, D = d_in, A and B latents of the two SAEs, P = min(A, B) pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.analysis.attach import decoder_rows, open_for, read_sae
from saebench.analysis.correlations import BLOCK_BYTES, Correlations
from saebench.core.errors import UserError
from saebench.core.progress import progress
from saebench.core.settings import takes_shown_names
from saebench.evaluation.measure import require_width
from saebench.evaluation.samples import first_rows
from saebench.evaluation.splice import Splice
from saebench.evaluation.synthetic.recovery import absolute_cosines
from saebench.evaluation.synthetic.recovery import match as best_pairs
from saebench.runs.provenance import Provenance
from saebench.saes.base import SAE

if TYPE_CHECKING:
    import pandas as pd

    from saebench.activations.cache import ActivationCache
    from saebench.core.codes import SparseCodes

METHODS = ("decoder", "activation")
BYTES_PER_PAIR = 20
"""The similarities in float32, and two copies in float64 while the best pairs are computed."""
MOST_ROWS = 8192


@dataclass(frozen=True)
class Matching:
    """The result of `match`: P = min(A, B) pairs with similarities s_p."""

    pairs: pd.DataFrame
    """feature_a, feature_b, similarity of each pair, the largest first; and the most similar latent of the
    other SAE for each of the two, which several latents can share: best_of_a (the latent of b most similar to
    feature_a), best_of_a_similarity, best_of_b (the latent of a most similar to feature_b),
    best_of_b_similarity."""
    unmatched: pd.DataFrame
    """side ('a' or 'b'), feature, best, similarity: the latents of the wider SAE that are in no pair, and the
    most similar latent of the other SAE."""
    by: str
    threshold: float
    mean_similarity: float
    """sum of s_p / P. By 'decoder' it is the pairwise mean correlation coefficient of arXiv 2505.20254."""
    stability: float
    """The number of s_p that are at least ``threshold``, divided by P."""
    n_rows: int | None
    """The number of rows that activations were compared on; None by 'decoder'."""

    def __repr__(self) -> str:
        return (
            f"Matching({len(self.pairs):,} pairs by {self.by}, mean similarity {self.mean_similarity:.3f}, "
            f"{self.stability:.1%} at least {self.threshold:g}, {len(self.unmatched):,} unmatched)"
        )


@takes_shown_names
@torch.no_grad()
def match(
    a: SAE | str | PathLike[str],
    b: SAE | str | PathLike[str],
    by: str = "decoder",
    cache: ActivationCache | str | PathLike[str] | None = None,
    *,
    hook: str | None = None,
    rows: int = 65_536,
    threshold: float = 0.7,
    memory_gib: float = 4.0,
    quiet: bool = False,
) -> Matching:
    """Pair the latents of two SAEs one to one so that the sum of the similarities is as large as possible.

    By 'decoder' the similarity is |cos| of the decoder rows (Paulo and Belrose 2025, arXiv 2501.16615, who
    call a latent shared when the similarity is above 0.7 in the decoder and in the encoder). By 'activation'
    it is the Pearson correlation of the values of the two latents over held-out rows of a cache, including
    rows where they are 0:

        (mean z_i z_j - mean z_i mean z_j) / (std z_i std z_j),  0 where a latent is constant (dead).

    The A x B matrix of similarities is kept in memory, at 20 bytes per pair; a line on standard error gives
    the amount. Of activations only sums over rows are kept. Two SAEs of 8,192 latents take a few seconds by
    'decoder'.

    >>> found = sb.match(run, run)
    >>> bool((found.pairs.feature_a == found.pairs.feature_b).all())
    True
    >>> found.stability
    1.0

    Args:
        a: a run directory, or an SAE in memory.
        b: another SAE; by 'decoder' with the same d_in.
        by: 'decoder' or 'activation'.
        cache: the cache to compare activations on; by default the one that a, or else b, was trained on.
        site: the hook of the cache that both read; by default for each the hook it was trained at.
        rows: the largest number of held-out rows to use.
        threshold: the smallest similarity that counts for ``stability``.
        memory_gib: the largest amount of memory to use, in GiB.
        quiet: write nothing to standard error.

    Raises:
        UserError: no such SAE, cache or hook, SAEs or rows of different widths, no held-out rows, rows with
            NaN or infinity, an unknown ``by``, a number outside its bounds, or too much memory.
    """
    if by not in METHODS:
        raise UserError(f"by is {by!r}; give {' or '.join(map(repr, METHODS))}")
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; give a number between -1 and 1")
    if rows < 2:
        raise UserError(f"rows is {rows}; a correlation needs at least 2")
    sides = [read_sae(a, "a"), read_sae(b, "b")]
    sae_a, sae_b = (sae for sae, _ in sides)
    _require_memory(sae_a, sae_b, memory_gib, quiet)
    n_rows = None
    if by == "decoder":
        _require_same_width(sae_a, sae_b)
        similarity_AB = absolute_cosines(decoder_rows(a, sae_a), decoder_rows(b, sae_b)).clamp_max_(1)
    else:
        similarity_AB, n_rows = _correlations(sides, open_for(a, b, cache=cache), hook, rows, quiet)
    return _matching(similarity_AB, by, threshold, n_rows)


@torch.no_grad()
def splits(
    a: SAE | str | PathLike[str], b: SAE | str | PathLike[str], *, threshold: float = 0.7, at_least: int = 2
) -> pd.DataFrame:
    """Latents of the narrow SAE ``a`` that are split in the wide ``b``: feature_a, n, feature_b, cosine.

    A latent j of b belongs to the latent i of a with the nearest decoder row, argmax_i cos(d_i, d_j), if that
    cosine is at least ``threshold``. Latent i is split when the number n of latents that belong to it is at
    least ``at_least``. No latent of b belongs to two latents. With the default 0.7, the parts of a latent can
    be orthogonal: the cosine of two orthogonal directions with their mean is 0.71. (Feature splitting:
    Bricken et al. 2023; this definition is ours. It uses directions only, not activations.)

    The result has one row per part: latents with the most parts first, and their nearest part first.

    >>> sb.splits(run, run).columns.tolist()
    ['feature_a', 'n', 'feature_b', 'cosine']

    Raises:
        UserError: no such SAE, different d_in, ``a`` wider than ``b``, a threshold outside 0 to 1, or
            ``at_least`` below 2.
    """
    import pandas as pd

    if not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}; give a cosine greater than 0 and at most 1")
    if at_least < 2:
        raise UserError(f"at_least is {at_least}; it must be at least 2")
    (narrow, _), (wide, _) = read_sae(a, "a"), read_sae(b, "b")
    _require_same_width(narrow, wide)
    if narrow.d_sae > wide.d_sae:
        raise UserError(
            f"a has {narrow.d_sae:,} latents and b only {wide.d_sae:,}; give the narrower SAE first"
        )
    cosine_B, parent_B = _nearest(decoder_rows(b, wide), decoder_rows(a, narrow))
    frame = pd.DataFrame(
        {"feature_a": parent_B.numpy(), "feature_b": range(wide.d_sae), "cosine": cosine_B.numpy()}
    )
    frame = frame[frame["cosine"] >= threshold]
    frame.insert(1, "n", frame.groupby("feature_a")["feature_b"].transform("size"))
    return frame[frame["n"] >= at_least].sort_values(
        ["n", "feature_a", "cosine"], ascending=[False, True, False], kind="stable", ignore_index=True
    )


def _nearest(rows_ND: Tensor, table_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine [N] of each row with a row of the table, and that row's index [N]; in blocks."""
    unit_ND, unit_MD = (torch.nn.functional.normalize(t.detach().float().cpu()) for t in (rows_ND, table_MD))
    block = max(1, BLOCK_BYTES // (4 * len(unit_MD)))
    found = [(part_ND @ unit_MD.T).clamp_(-1, 1).max(dim=1) for part_ND in torch.split(unit_ND, block)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _matching(similarity_AB: Tensor, by: str, threshold: float, n_rows: int | None) -> Matching:
    import pandas as pd

    if not similarity_AB.isfinite().all():
        raise UserError("the weights of a or b hold NaN or infinity; train that SAE again or restore a copy")
    of_a, of_b = similarity_AB.max(dim=1), similarity_AB.max(dim=0)
    a_P, b_P = best_pairs(similarity_AB)
    similarity_P = similarity_AB[a_P, b_P]
    pairs = pd.DataFrame(
        {
            "feature_a": a_P.numpy(),
            "feature_b": b_P.numpy(),
            "similarity": similarity_P.numpy(),
            "best_of_a": of_a.indices[a_P].numpy(),
            "best_of_a_similarity": of_a.values[a_P].numpy(),
            "best_of_b": of_b.indices[b_P].numpy(),
            "best_of_b_similarity": of_b.values[b_P].numpy(),
        }
    )
    unmatched = []
    for side, paired_P, best in (("a", a_P, of_a), ("b", b_P, of_b)):
        alone = torch.ones(len(best.values), dtype=torch.bool).index_fill_(0, paired_P, False).nonzero()[:, 0]
        columns = {"feature": alone, "best": best.indices[alone], "similarity": best.values[alone]}
        frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        frame.insert(0, "side", side)
        unmatched.append(frame)
    return Matching(
        pairs=pairs.sort_values("similarity", ascending=False, kind="stable", ignore_index=True),
        unmatched=pd.concat(unmatched, ignore_index=True),
        by=by,
        threshold=threshold,
        mean_similarity=similarity_P.double().mean().item(),
        stability=(similarity_P >= threshold).double().mean().item(),
        n_rows=n_rows,
    )


def _correlations(
    sides: list[tuple[SAE, Provenance]],
    opened: ActivationCache,
    hook: str | None,
    rows: int,
    quiet: bool,
) -> tuple[Tensor, int]:
    """The Pearson correlation [A, B] float32 of all pairs, and the number of rows used."""
    row_N = first_rows(opened.held_out, True, limit=rows)
    if len(row_N) < 2:
        raise UserError(
            f"{len(row_N)} of the {opened.n_rows:,} rows of {opened.path} are held out from training, and a "
            "correlation needs 2; give a cache of more documents"
        )
    places = []
    for sae, origin in sides:
        if hook is None and origin.hook_name is None and len(opened.hooks) > 1:
            raise UserError(
                "an SAE in memory does not record its hook, and the cache has several; give site=..., "
                f"one of {', '.join(opened.hooks)}"
            )
        splice = Splice.of(sae, opened.resolve_hook(hook or origin.hook_name))
        for site in splice.sites:
            require_width(opened.d_in(site.name), site, opened.path)
        places.append(splice)
    sums = Correlations(sides[0][0].d_sae, sides[1][0].d_sae)
    widest = max(sae.d_sae for sae, _ in sides)
    size = max(1, min(MOST_ROWS, 2 * BLOCK_BYTES // (4 * widest)))
    with progress("match", total=len(row_N), unit="tok", quiet=quiet) as bar:
        for part_N in torch.split(row_N, size):
            sums.add(*_encoded(sides, opened, places, part_N))
            bar.update(len(part_N))
    return sums.result(), len(row_N)


def _encoded(
    sides: list[tuple[SAE, Provenance]], cache: ActivationCache, places: list[Splice], row_N: Tensor
) -> Iterator[SparseCodes]:
    for (sae, _), splice in zip(sides, places, strict=True):
        x_ND = splice.rows(cache, row_N)[0].float()
        if not x_ND.isfinite().all():
            raise UserError(
                f"held-out rows of {cache.path} at {splice.sites[0].name} hold NaN or infinity; harvest "
                "again in bf16 or fp32"
            )
        yield sae.encode(x_ND.to(sae.W_dec.device))


def _require_same_width(a: SAE, b: SAE) -> None:
    if a.d_out != b.d_out:
        kind = "d_in" if (a.d_out, b.d_out) == (a.d_in, b.d_in) else "d_out"
        raise UserError(
            f"a has {kind} {a.d_out} and b has {kind} {b.d_out}, so their decoder rows cannot be compared; "
            f"give two SAEs of the same {kind}, or match by='activation'"
        )


def _require_memory(a: SAE, b: SAE, limit_gib: float, quiet: bool) -> None:
    needed = (BYTES_PER_PAIR * a.d_sae * b.d_sae + 4 * BLOCK_BYTES) / 2**30
    task = f"matching {a.d_sae:,} with {b.d_sae:,} latents takes up to {needed:.1f} GiB"
    if not needed <= limit_gib:
        raise UserError(f"{task}, and memory_gib is {limit_gib:g}; raise it, or match narrower SAEs")
    if not quiet:
        print(f"match: {task}", file=sys.stderr)
