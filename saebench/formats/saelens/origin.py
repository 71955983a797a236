"""What a run says about where its SAE is from, in the words that SAELens and SAEBench ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import read_json
from saebench.runs.run_file import RUN_FILE, read_run
from saebench.saes.base import read_description

_OF_AN_IMPORT = ("model_name", "context_size", "prepend_bos", "seqpos_slice", "dataset_path", "l0")


def origin_of(run: Path) -> dict[str, Any]:
    """``hook_name``, ``model_name`` and, as far as it is known, how contexts were made and the mean L0.

    How contexts were made is written in the activation cache, which may be gone; then these words are left
    out. ``l0`` is what ``saebench eval`` measured.
    """
    facts = read_description(run)
    imported = facts.get("imported") or {}
    known = {name: imported[name] for name in _OF_AN_IMPORT if name in imported}
    if facts.get("model"):
        known["model_name"] = facts["model"]["name"]
    known |= _contexts(run)
    if (run / "eval.json").exists():
        known["l0"] = read_json(run / "eval.json", what="the evaluation").get("l0")
    return {"hook_name": facts.get("hook_name"), "hook_head_index": None, **known}


def _contexts(run: Path) -> dict[str, Any]:
    """From the cache that the run was trained on; nothing where it is gone or was made of an array."""
    from saebench.activations.cache import open_cache

    if not (run / RUN_FILE).exists():
        return {}
    settings = read_run(run, needs=("train",))["train"]
    try:
        made_from = open_cache(Path(settings["cache"])).manifest["made_from"]
    except (UserError, KeyError):
        return {}
    if not made_from.get("model"):
        return {}
    made = made_from["settings"]
    return {
        "context_size": made["ctx"],
        "prepend_bos": made["bos"],
        "seqpos_slice": [None] if made["keep_first"] else [1, None],
        "exclude_special_tokens": False,
        "dataset_path": made_from["text"]["name"],
    }
