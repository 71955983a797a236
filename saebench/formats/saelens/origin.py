"""What a run says about where its SAE is from, in the words that SAELens and SAEBench ask for."""

from __future__ import annotations

from typing import Any

from saebench.core.errors import UserError
from saebench.runs.run import Run

_OF_AN_IMPORT = ("model_name", "context_size", "prepend_bos", "seqpos_slice", "dataset_path", "l0")


def origin_of(run: Run) -> dict[str, Any]:
    """``hook_name``, ``model_name`` and, as far as it is known, how contexts were made and the mean L0.

    ``l0`` is what ``saebench eval`` measured.
    """
    facts = run.description()
    imported = facts.get("imported") or {}
    known = {name: imported[name] for name in _OF_AN_IMPORT if name in imported}
    if facts.get("model"):
        known["model_name"] = facts["model"]["name"]
    if not imported:
        known |= _contexts(run)
    evaluation = run.evaluation()
    if evaluation is not None:
        known["l0"] = evaluation.get("l0")
    return {"hook_name": facts.get("hook_name"), "hook_head_index": None, **known}


def _contexts(run: Run) -> dict[str, Any]:
    """Nothing where no model read contexts, or where an earlier version's cache is gone."""
    try:
        made = run.contexts()
    except UserError:
        return {}
    if made is None:
        return {}
    return {
        "context_size": made.ctx,
        "prepend_bos": made.bos,
        "seqpos_slice": [None] if made.keep_first else [1, None],
        "exclude_special_tokens": False,
        "dataset_path": made.text,
    }
