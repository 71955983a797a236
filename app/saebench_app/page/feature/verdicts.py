"""The verdicts of a language model on examples, from which an explanation was scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saebench.core.formatting import is_absent, number, visible
from saebench.store.query import FeatureStore
from saebench_app.components.tokens import Colors, show_examples

if TYPE_CHECKING:
    import pandas as pd

MOST = 100
MARKED = Colors(1.0)


def verdicts(store: FeatureStore, items: pd.DataFrame, *, key: str) -> None:
    """``items`` is what ``FeatureStore.explanation_items`` gives; the first 100 are shown."""
    rows = items.head(MOST).to_dict("records")
    contexts = {ctx: store.context(ctx)["pieces"] for ctx in {int(row["ctx"]) for row in rows}}
    show_examples([verdict(row, contexts[int(row["ctx"])]) for row in rows], colors=MARKED, key=key)


def verdict(row: Mapping[str, Any], pieces: list[str]) -> dict[str, Any]:
    """One verdict: the text with its marked tokens, the truth and the answer."""
    start, end = int(row["start"]), int(row["start"]) + int(row["n_shown"])
    marked = {int(pos) for pos in row["marked"]}
    answer = row["status"] if is_absent(row["verdict"]) else "yes" if row["verdict"] else "no"
    right = not is_absent(row["verdict"]) and bool(row["verdict"]) == bool(row["truth"])
    sure = "" if is_absent(row["probability"]) else f", p(yes) {number(row['probability'])}"
    return {
        "value": ("✓ " if right else "✗ ") + str(answer),
        "exact": None,
        "spans": [
            [visible(piece), 0.6, "marked"] if start + at in marked else [visible(piece)]
            for at, piece in enumerate(pieces[start:end])
        ],
        "peak": -1,
        "before": start > 0,
        "after": end < len(pieces),
        "source": visible(f"{row['provider']} {row['model'] or ''}".strip()),
        "place": f"{row['scorer']}: it is {'yes' if row['truth'] else 'no'}{sure}, context {row['ctx']}",
        "title": "",
    }
