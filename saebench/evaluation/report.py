"""``EvalReport``: all numbers of one evaluation, as stored in eval.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from saebench.evaluation.reconstruction import DensityHistogram

_WHERE_KNOWN = (
    "sites", "targets", "fvu_by_site", "together", "massive_rows", "fvu_ordinary",
    "explained_variance_ordinary", "warnings",
)  # fmt: skip


def inference_label(inference: str | None) -> str | None:
    """The name of an inference mode for people; the oracle's includes that it sees the next tokens."""
    return "oracle (sees the next tokens)" if inference == "oracle" else inference


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Reconstruction of activations, and faithfulness of the model's predictions, for one SAE.

    Formulas: ``ReconstructionMetrics`` for the rows, ``FaithfulnessMetrics`` for the model.
    """

    sae: str
    """Architecture."""
    inference: str | None = None
    """Inference mode, for an SAE with several; ``inference_label`` formats it for people."""
    d_sae: int
    k: int
    hook_name: str
    n_tokens: int
    """Measured rows; dead_fraction and density refer to them."""
    rows: Literal["held-out", "all"]
    """'all' includes rows that the SAE was trained on."""
    cache_hash: str | None
    """Hash of the cache that the rows come from; None if they come from ``text``."""
    text: str | None
    """The text that the model read instead of the cache's contexts."""
    fvu: float
    explained_variance: float
    l0: float
    dead_fraction: float
    cosine_similarity: float
    density_histogram: DensityHistogram = field(repr=False)
    sites: list[str] | None = None
    """What a transcoder or crosscoder reads; None for an SAE of one site."""
    targets: list[str] | None = None
    """What it reconstructs: the activations that fvu and cosine_similarity are of."""
    fvu_by_site: dict[str, float] | None = None
    """fvu at each of several targets."""
    together: list[str] | None = None
    """The runs that were in the model in the same passes."""
    massive_rows: int | None = None
    """Rows whose norm is above 10 times the median; None without any."""
    fvu_ordinary: float | None = None
    """fvu over the other rows alone."""
    explained_variance_ordinary: float | None = None
    """1 - fvu_ordinary."""
    warnings: list[str] | None = None
    """What is wrong with the SAE or the numbers, one sentence each; None where all is well."""
    picks_changed: float | None = None
    """Share of active latents that the default inference mode does not select; None in that mode."""
    model: str | None = None
    """The model that the SAE was spliced into. If it is None, so are all fields below."""
    n_tokens_model: int | None = None
    """Scored predictions."""
    ce_clean: float | None = None
    ce_spliced: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None
    ce_delta: float | None = None
    ce_loss_score: float | None = None
    """Also None if zeros do not increase the model's loss."""
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the contents of eval.json; what only some SAEs have is left out for others."""
        values = dataclasses.asdict(self)
        return {name: v for name, v in values.items() if v is not None or name not in _WHERE_KNOWN}
