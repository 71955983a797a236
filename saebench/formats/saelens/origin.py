"""The origin of a run's SAE as metadata in the keys that SAELens and SAEBench read."""

from __future__ import annotations

from typing import Any

from saebench.core.errors import UserError
from saebench.core.heads import head_of
from saebench.runs.run import Run

_OF_AN_IMPORT = ("model_name", "context_size", "prepend_bos", "seqpos_slice", "dataset_path", "l0")


def origin_of(run: Run) -> dict[str, Any]:
    """``hook_name``, ``model_name`` and, where known, how contexts were made and the mean L0; of a transcoder
    also ``hook_name_out``, what it writes.

    ``l0`` is the value that ``saebench eval`` measured.
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
    hook_name, spec = facts.get("hook_name"), facts["spec"]
    if spec.get("targets"):
        hook_name, known["hook_name_out"] = spec["sites"][0]["name"], spec["targets"][0]["name"]
    whole, head = head_of(hook_name) if isinstance(hook_name, str) else (hook_name, None)
    return {"hook_name": whole, "hook_head_index": head, **known}


def _contexts(run: Run) -> dict[str, Any]:
    """Context settings; empty if no model read contexts, or if an old run's cache was deleted."""
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
