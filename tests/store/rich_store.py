"""The small store with everything that can be added to it, in hostile text: explanations with verdicts,
effects, labels, bookmarks, comments, lists and saved views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.store.database import insert
from saebench.store.extras import publish_extra
from saebench.store.query import open_store
from saebench.store.schema import EFFECT, EXPL_ITEM, EXPL_SCORE, EXPLAINED, EXPLANATION, Table
from tests.store.small_store import build_small_store

HOSTILE = "<img src=x onerror=alert(1)></script>**x**[y](javascript:z) $a$ :red[b] &lt;"
SCORES = {3: 0.5, 4: 0.25, 9: 1.0}
EFFECTS = {0: 0.5, 3: -0.25, 4: 0.125}


def build_rich_store(path: Path) -> Path:
    build_small_store(path)
    _add(path, "explanations", _explain)
    _add(path, "effects", _effects)
    with open_store(path) as store:
        notes = store.annotations
        notes.set_label(3, HOSTILE, author="<b>Ada</b>")
        notes.bookmark(3)
        notes.bookmark(5)
        notes.comment(3, f"{HOSTILE}\nsecond line", author="<i>Ada</i>")
        notes.add_to_list(HOSTILE, [3, 5, 9])
        notes.save_view(HOSTILE, "sort=max_act&desc=1&q=a")
    return path


def _add(path: Path, extra: str, fill: Any) -> None:
    with open_store(path) as store:
        publish_extra(path, store.sae, extra, fill, made_from=store.info())


def _rows(table: Table, *rows: dict[str, Any]) -> dict[str, Any]:
    return {name: [row.get(name) for row in rows] for name in table.names}


def _explain(connection: Any) -> dict[str, Any]:
    whose = {"provider": "hf", "model": "<u>m</u>"}
    insert(connection, EXPLANATION, _rows(EXPLANATION, *(
        {"feature": feature, **whose, "prompt": "1", "text": f"{HOSTILE} {feature}", "status": "ok",
         "n_train": 3, "n_test": 3, "tokens": 7}
        for feature in SCORES)))  # fmt: skip
    insert(connection, EXPL_SCORE, _rows(EXPL_SCORE, *(
        {"feature": feature, **whose, "scorer": "detection", "value": (score + 1) / 2, "ci_lo": 0.1,
         "ci_hi": 0.9, "tp": 1, "fp": 0, "fn": 0, "tn": 1, "n_failed": 0}
        for feature, score in SCORES.items())))  # fmt: skip
    answers = [(True, "ok"), (False, "ok"), (None, "failed")]
    insert(connection, EXPL_ITEM, _rows(EXPL_ITEM, *(
        {"feature": 3, **whose, "scorer": "detection", "rank": rank, "doc": 0, "ctx": 0, "start": 1,
         "n_shown": 6, "marked": [2, 3], "truth": True, "verdict": verdict, "status": status}
        for rank, (verdict, status) in enumerate(answers))))  # fmt: skip
    insert(connection, EXPLAINED, _rows(EXPLAINED, *(
        {"feature": feature, "explanation": f"{HOSTILE} {feature}", "explanation_score": score}
        for feature, score in SCORES.items())))  # fmt: skip
    return {"made_by": "a test"}


def _effects(connection: Any) -> dict[str, Any]:
    insert(connection, EFFECT, _rows(EFFECT, *(
        {"feature": feature, "loss_effect": value, "kl": 0.1, "loss_effect_n": 2, "loss_estimate": value,
         "loss_estimate_n": 2}
        for feature, value in EFFECTS.items())))  # fmt: skip
    return {"made_by": "a test"}
