"""What is wrong with an SAE, or with how its numbers read: the warnings of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.activations.diagnosis import MASSIVE

if TYPE_CHECKING:
    from saebench.evaluation.faithfulness import FaithfulnessMetrics
    from saebench.evaluation.reconstruction import ReconstructionMetrics
    from saebench.saes.base import SAE

MOST_DEAD = 0.9
ENOUGH_PICKS = 10
"""Picks per latent below which rare latents cannot be told from dead ones."""
FARTHEST_L0 = 2.0
MISLEADING = 0.02
"""Difference of explained variance between all and ordinary rows above which there is a warning."""


def warnings_of(
    found: ReconstructionMetrics, sae: SAE, faithfulness: FaithfulnessMetrics | None = None
) -> list[str]:
    """What is wrong with an SAE, or with how its numbers read, one sentence each; [] where all is well."""
    sentences = []
    if found.explained_variance < 0:
        sentences.append(
            f"the reconstruction is worse than the mean activation: explained variance is "
            f"{found.explained_variance:.3g}, that of the mean is 0; check that these activations are those "
            "the SAE was trained on, or train it again with a lower --lr"
        )
    if found.l0 == 0:
        sentences.append(f"no latent is active on any of the {found.n_tokens:,} measured rows")
    elif found.dead_fraction > MOST_DEAD and found.n_tokens * found.l0 > ENOUGH_PICKS * sae.d_sae:
        sentences.append(
            f"{found.dead_fraction:.1%} of the latents are active on none of the {found.n_tokens:,} rows"
        )
    if found.l0 > FARTHEST_L0 * sae.k or 0 < found.l0 < sae.k / FARTHEST_L0:
        sentences.append(f"mean L0 is {found.l0:.4g}, far from the k = {sae.k} of the SAE")
    if found.fvu_ordinary is not None and found.fvu_ordinary - found.fvu > MISLEADING:
        sentences.append(
            f"explained variance is {found.explained_variance:.3f} over all rows, but "
            f"{1 - found.fvu_ordinary:.3f} without the {found.massive_rows:,} massive rows (norm above "
            f"{MASSIVE:g} times the median), which make up most of the variance"
        )
    if faithfulness is not None and faithfulness.ce_spliced > faithfulness.ce_mean > faithfulness.ce_clean:
        sentences.append(
            f"the model's loss with the reconstruction is {faithfulness.ce_spliced:.3f} nats, higher than "
            f"with the mean activation ({faithfulness.ce_mean:.3f})"
        )
    return sentences
