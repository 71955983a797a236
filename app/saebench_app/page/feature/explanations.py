"""The explanations of a feature, their scores, and the verdicts that these were made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saebench.core.formatting import count, is_absent, number, visible
from saebench_app.components.head import heading
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.page.feature.common import exact, fold
from saebench_app.page.feature.verdicts import verdicts
from saebench_app.session import Here


def show_explanations(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    head = fold(view, feature, "explanations", "Explanations")
    found = here.store.explanations(feature)
    if found.empty:
        heading(head, key="explanations-head")
        command = f"saebench explain {here.store.path} --features {feature}"
        notice(f"This feature has no explanation yet. Make one with: {command}", key="unexplained")
        return
    rows = [_explanation(one) for one in found.to_dict("records")]
    headings = [
        Heading("explainer", align="left"),
        Heading("explanation", align="left"),
        Heading("score", help="F1 of a rule, balanced accuracy of a text, on held-out documents"),
        Heading("95% interval"),
    ]
    table(headings, rows, name="Explanations", key="explanations", head=head)
    scores = here.store.explanation_scores(feature)
    if len(scores):
        headings = [Heading("explainer", align="left"), Heading("scorer", align="left")]
        headings += [
            Heading(label) for label in ("value", "95% interval", "precision", "recall", "AUC", "unanswered")
        ]
        table(
            headings,
            [_score(one) for one in scores.to_dict("records")],
            name="Scores and baselines",
            key="scores",
        )
    items = here.store.explanation_items(feature)
    if items.empty:
        return
    heading(fold(view, feature, "verdicts", f"All {len(items)} verdicts"), key="verdicts-head")
    if "verdicts" in view.open:
        verdicts(here.store, items, key="verdicts")


def _explanation(one: Mapping[str, Any]) -> list[Cell]:
    reason = one["status"] if is_absent(one["reason"]) else one["reason"]
    said = f"none: {reason}" if is_absent(one["text"]) else one["text"]
    return [
        Cell(visible(f"{one['provider']} {one['model'] or ''}".strip())),
        Cell(visible(said), kind="text"),
        Cell(number(one["score"]), exact=exact(one["score"])),
        Cell(_interval(one)),
    ]


def _score(one: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(visible(f"{one['provider']} {one['model'] or ''}".strip())),
        Cell(visible(one["scorer"])),
        Cell(number(one["value"]), exact=exact(one["value"])),
        Cell(_interval(one)),
        *(Cell(number(one[name]), exact=exact(one[name])) for name in ("precision", "recall", "auc")),
        Cell(count(one["n_failed"])),
    ]


def _interval(one: Mapping[str, Any]) -> str:
    low, high = exact(one["ci_lo"]), exact(one["ci_hi"])
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"
