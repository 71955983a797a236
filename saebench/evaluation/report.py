"""EvalReport: every number of one evaluation, as eval.json keeps it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from saebench.evaluation.reconstruction import DensityHistogram


def inference_label(inference: str | None) -> str | None:
    """The name of a way of choosing latents, with a warning where it knows what it should not."""
    return "oracle (sees the next tokens)" if inference == "oracle" else inference


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What an SAE keeps of activations that it was not trained on, and of the model's predictions.

    Formulas: ``ReconstructionMetrics`` for the rows, ``FaithfulnessMetrics`` for the model.
    """

    sae: str
    """Architecture."""
    inference: str | None = None
    """How latents were chosen, of an SAE that knows several ways; ``inference_label`` says it to people."""
    d_sae: int
    k: int
    hook_name: str
    n_tokens: int
    """Rows measured; dead_fraction and density refer to these."""
    rows: Literal["held-out", "all"]
    """'all' includes rows that the SAE was trained on."""
    cache_hash: str | None
    """Hash of the cache that the rows come from; None when they come from ``text``."""
    text: str | None
    """The text that was read instead of a cache."""
    fvu: float
    explained_variance: float
    l0: float
    dead_fraction: float
    cosine_similarity: float
    density_histogram: DensityHistogram = field(repr=False)
    picks_changed: float | None = None
    """Share of active latents that the SAE's default way of choosing would not have; None for that way."""
    model: str | None = None
    """The model that the SAE was spliced into; without one all that follows is None."""
    n_tokens_model: int | None = None
    """Predictions scored."""
    ce_clean: float | None = None
    ce_spliced: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None
    ce_delta: float | None = None
    ce_loss_score: float | None = None
    """None also when zeros do not hurt the model."""
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the contents of eval.json."""
        return dataclasses.asdict(self)
