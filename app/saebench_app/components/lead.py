"""The label and explanation of a feature, links to other pages, and the key that goes to its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from saebench.core.formatting import visible
from saebench_app.components.head import Option
from saebench_app.components.web import show


def lead(
    *, label: str, explanation: str, note: str, links: Sequence[Option], label_field: str, key: str
) -> None:
    """``note`` follows the explanation; L puts the cursor into the field that is called ``label_field``."""
    show(
        "lead",
        {
            "label": visible(label) if label else "",
            "explanation": visible(explanation) if explanation else "",
            "note": note,
            "links": [asdict(link) for link in links],
            "labelField": label_field,
        },
        key=key,
    )
