"""The examples of a feature: which ones, and how they are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saebench.core.formatting import number
from saebench.store.example_windows import distinct
from saebench.store.schema import DECILES
from saebench_app.components.head import Choice, Head, Option, heading
from saebench_app.components.notice import notice
from saebench_app.components.tokens import examples
from saebench_app.page.feature.common import PATH
from saebench_app.session import Here
from saebench_app.view import ABOVE, COLORS, WINDOWS, View

GROUPS = {
    "top": ("Top activations", "The contexts with the largest activations, one example per context."),
    "tenths": ("Deciles", "Examples from each decile of its activations, the strongest decile first."),
    "random": ("Random", "Activations drawn at random."),
    "near-miss": ("Near misses", "It is inactive here, on a token that it fires on elsewhere."),
    "negative": ("Inactive", "Windows drawn at random in which it is inactive."),
}
"""Group in the URL -> its label and help text."""
COLOR_HELP = {
    "linear": "in proportion to the activation",
    "sqrt": "by the square root of the activation: weak ones can be told apart",
    "rank": "by the rank of the activation among those shown",
}
EXAMPLES_OF_BAR = 20


def show_examples(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    head = Head("Examples", choices=(_groups(view, feature), _windows(view, feature)))
    if row["dead"] and view.group not in ("near-miss", "negative"):
        heading(head, key="examples-head")
        notice(
            "This feature is dead: it fires on no token of the indexed text, so it has no examples.",
            key="no-examples",
        )
        return
    opens = here.store.has("context") or here.store.has("unit")
    shown = _chosen_examples(here, row)
    if view.distinct:
        shown = distinct(shown, view.window)
    if not shown:
        heading(head, key="examples-head")
        notice("The store has no examples of this kind. Choose another one.", key="no-examples")
        return
    examples(
        shown,
        scale=row["max_act"],
        window=view.window,
        key="examples",
        kind=view.colors,
        above=view.above / 100,
        lines=view.lines,
        head=head,
        settings=_display(view, feature),
        name=f"Feature {feature} of {here.store.sae}",
        place=lambda one: view.url("context", c=one["ctx"], f1=feature, pos=one["pos"]) if opens else "",
    )


def _chosen_examples(here: Here, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of the chosen bar, the group, or all deciles; the first of a decile has a title."""
    view, feature = here.view, row["feature"]
    if view.bin is not None:
        drawn = here.store.examples_in_bin(feature, view.bin, view.histogram, n=EXAMPLES_OF_BAR)
        return list(drawn.to_dict("records"))
    if view.group != "tenths":
        known = view.group in GROUPS or view.group in [f"decile-{decile}" for decile in DECILES]
        return list(here.store.examples(feature, view.group if known else "top").to_dict("records"))
    frame = here.store.examples(feature)
    shown: list[dict[str, Any]] = []
    for decile in reversed(DECILES):
        own = frame[frame["group"] == f"decile-{decile}"].to_dict("records")
        if own:
            least, most = (number(of(one["value"] for one in own)) for of in (min, max))
            own[0]["title"] = f"Decile {decile} of its activations, shown: {least} to {most}"
        shown += own
    return shown


def _groups(view: View, feature: int) -> Choice:
    options = [
        Option(
            label,
            replace(view, group=group, bin=None).url(PATH, f=feature),
            view.bin is None and view.group == group,
            help,
        )
        for group, (label, help) in GROUPS.items()
    ]
    if view.bin is not None:
        options.append(
            Option(
                f"Bar {view.bin + 1}",
                view.url(PATH, f=feature),
                True,
                "Examples drawn from the chosen bar of the histogram.",
            )
        )
    return Choice("Which examples", options)


def _windows(view: View, feature: int) -> Choice:
    return Choice(
        "Tokens on each side",
        [
            Option(f"±{n}" if n else "all", replace(view, window=n).url(PATH, f=feature), view.window == n)
            for n in WINDOWS
        ],
    )


def _display(view: View, feature: int) -> Head:
    def switch(label: str, off: str, on: str, now: bool, turned: View) -> Choice:
        there, back = view.url(PATH, f=feature), turned.url(PATH, f=feature)
        return Choice(
            label,
            [Option(off, back if now else there, not now), Option(on, there if now else back, now)],
        )

    return Head(
        "Display and copy",
        choices=(
            Choice(
                "Color scale",
                [
                    Option(
                        kind,
                        replace(view, colors=kind).url(PATH, f=feature),
                        view.colors == kind,
                        COLOR_HELP[kind],
                    )
                    for kind in COLORS
                ],
            ),
            Choice(
                "Color threshold",
                [
                    Option(
                        f"{part}%",
                        replace(view, above=part).url(PATH, f=feature),
                        view.above == part,
                        "of the max activation",
                    )
                    for part in ABOVE
                ],
            ),
            switch("Line breaks", "as ↵", "as new lines", view.lines, replace(view, lines=not view.lines)),
            switch(
                "Duplicate examples", "show", "hide", view.distinct, replace(view, distinct=not view.distinct)
            ),
        ),
    )
