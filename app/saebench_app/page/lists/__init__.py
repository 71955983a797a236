"""Lists: the lists, bookmarks, labels and comments of the SAE's features, their import and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from saebench.core.formatting import share, visible
from saebench_app.access import read_only
from saebench_app.components.head import Choice as Links
from saebench_app.components.head import Head, Option, heading
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.page.lists.files import show_files
from saebench_app.session import Here, attempt
from saebench_app.url import Choice, Query, parameter
from saebench_app.view import View

PATH = "lists"
TITLE = "Lists"
SECTION = "Tools"
PARTS = {
    "lists": "Lists",
    "bookmarks": "Bookmarks",
    "labels": "Labels",
    "comments": "Comments",
    "files": "Import and export",
}
LONGEST_NAME = 100
TICKED = "selected entries"
"""Session key: the part of the page, and what is selected in its table."""


@dataclass(frozen=True, kw_only=True)
class Part(Query):
    """The parameter of this page: which kind of annotation is shown."""

    part: str = parameter("lists", Choice(tuple(PARTS)))


def show(here: Here) -> None:
    st.title("Lists")
    part = here.read(Part).part
    options = [
        Option(label, here.view.url(PATH, Part(part=name)), name == part) for name, label in PARTS.items()
    ]
    heading(Head("", choices=(Links("Kind of annotation", options),)), key="parts")
    {"lists": _lists, "bookmarks": _bookmarks, "labels": _labels, "comments": _comments, "files": show_files}[
        part
    ](here)


# Lists


def _lists(here: Here) -> None:
    lists = here.annotations.lists().to_dict("records")
    if not lists:
        notice(
            "There is no list yet. Select features on the Features page and add them to a list, or use "
            "Lists on the page of a feature.",
            key="none",
        )
        return
    name = here.view.list if here.view.list in {one["name"] for one in lists} else None
    rows = [
        [
            Cell(visible(one["name"]), href=_at(here, one["name"])),
            Cell(str(one["n_features"]), exact=one["n_features"]),
            Cell(_time(one["time"])),
            Cell("open in Features", href=_listed(here, one["name"])),
        ]
        for one in lists
    ]
    headings = [Heading("list", align="left"), Heading("features"), Heading("changed"), Heading("")]
    table(headings, rows, name="Lists", key="lists")
    if name is None:
        st.caption("Select a list to see and edit it.")
        return
    _one_list(here, name)


def _one_list(here: Here, name: str) -> None:
    features = here.annotations.list_features(name)
    heading(Head(f"List “{visible(name)}”"), key="list-head")

    def rename() -> None:
        new = st.session_state["new-name"].strip()
        attempt(
            lambda: here.annotations.rename_list(name, new),
            then=lambda: here.show(replace(here.view, list=new)),
        )

    def remove() -> None:
        attempt(
            lambda: here.annotations.remove_list(name),
            then=lambda: here.show(replace(here.view, list="")),
        )

    st.session_state["new-name"] = name
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if not read_only():
            st.text_input("Name", key="new-name", on_change=rename, max_chars=LONGEST_NAME, width=280)
        st.download_button(
            "Save as one HTML page",
            lambda: _page(here, features),
            "features.html",
            mime="text/html",
            on_click="ignore",
            help="The features of the list as one self-contained HTML file.",
            disabled=len(features) > _most(),
        )
        if not read_only():
            with st.popover("Remove the list"):
                st.caption(f"Removes the list of {len(features)} features. Their labels and comments stay.")
                st.button("Remove it", on_click=remove, type="primary")
    if len(features) > _most():
        st.caption(f"An HTML page holds up to {_most()} features; for more, use saebench store export.")
    _entries(
        here,
        "lists",
        features,
        lambda feature: here.annotations.remove_from_list(name, feature),
    )


def _page(here: Here, features: Sequence[int]) -> str:
    from saebench.store.exports.html import page

    return page(here.store, features)


def _most() -> int:
    from saebench.store.exports.html import MOST_FEATURES

    return MOST_FEATURES


def _bookmarks(here: Here) -> None:
    features = here.annotations.bookmarks()["feature"].tolist()
    if not features:
        notice("There is no bookmark yet. Press B on the page of a feature to set one.", key="none")
        return
    _entries(
        here,
        "bookmarks",
        features,
        lambda feature: here.annotations.bookmark(feature, False),
    )


def _entries(here: Here, part: str, features: Sequence[int], remove: Callable[[int], object]) -> None:
    """One row per feature; the selected ones can be removed."""
    names = ["feature", "density", "max_act", "top_token", "explanation"]
    known = here.store.features(names, among=list(features)).set_index("feature").to_dict("index")
    rows = [
        [
            Cell(str(feature), exact=feature, href=here.view.url("feature", f=feature)),
            text_cell(here.names.get(feature)),
            token_cell(known[feature]["top_token"]),
            Cell(share(known[feature]["density"]), exact=known[feature]["density"]),
            text_cell(known[feature]["explanation"]),
        ]
        for feature in features
    ]
    headings = [
        Heading("feature"),
        Heading("label", align="left"),
        Heading("top token", align="left"),
        Heading("density"),
        Heading("explanation", align="left"),
    ]
    ticked = _ticked(part)
    table(
        headings,
        rows,
        name=PARTS[part],
        key=f"{part}-entries",
        selected=ticked,
        on_select=lambda features: st.session_state.update({TICKED: (part, features)}),
    )
    _take_off(part, ticked, remove)


def _take_off(part: str, ticked: list[int], remove: Callable[[int], object]) -> None:
    def take() -> None:
        st.session_state.pop(TICKED, None)
        for one in ticked:
            remove(one)

    if ticked and not read_only():
        st.button(f"Remove selected ({len(ticked)})", on_click=attempt, args=(take,))


def _ticked(part: str) -> list[int]:
    of, numbers = st.session_state.get(TICKED, (part, []))
    return list(numbers) if of == part else []


# Labels and comments


def _labels(here: Here) -> None:
    labels = here.annotations.labels().to_dict("records")
    if not labels:
        notice("There is no label yet. Press L on the page of a feature to write one.", key="none")
        return
    rows = [
        [
            Cell(str(one["feature"]), exact=one["feature"], href=here.view.url("feature", f=one["feature"])),
            Cell(visible(one["label"]), kind="text"),
            *_whose(one),
        ]
        for one in labels
    ]
    headings = [Heading("feature"), Heading("label", align="left"), *WHOSE]
    ticked = _ticked("labels")
    table(
        headings,
        rows,
        name="Labels",
        key="labels-entries",
        selected=ticked,
        on_select=lambda features: st.session_state.update({TICKED: ("labels", features)}),
    )
    _take_off("labels", ticked, lambda feature: here.annotations.set_label(feature, ""))


def _comments(here: Here) -> None:
    comments = here.annotations.comments().to_dict("records")
    if not comments:
        notice("There is no comment yet. Write one on the page of a feature.", key="none")
        return
    rows = [
        [
            Cell(str(at + 1), exact=at, href=here.view.url("feature", f=one["feature"])),
            Cell(str(one["feature"]), exact=one["feature"]),
            Cell(visible(" ".join(one["comment"].split())), kind="text"),
            *_whose(one),
        ]
        for at, one in enumerate(comments)
    ]
    headings = [
        Heading("number", align="left"),
        Heading("feature"),
        Heading("comment", align="left"),
        *WHOSE,
    ]
    ticked = [at for at in _ticked("comments") if at < len(comments)]
    table(
        headings,
        rows,
        name="Comments",
        key="comments-entries",
        selected=ticked,
        on_select=lambda chosen: st.session_state.update({TICKED: ("comments", chosen)}),
    )
    _take_off(
        "comments",
        ticked,
        lambda at: here.annotations.remove_comment(comments[at]["id"]),
    )


WHOSE = [Heading("author", align="left"), Heading("time")]


def _whose(one: dict[str, Any]) -> list[Cell]:
    return [text_cell(one["author"]), Cell(_time(one["time"]))]


# Links


def _at(here: Here, name: str) -> str:
    return replace(here.view, list=name).url(PATH)


def _listed(here: Here, name: str) -> str:
    return View(sae=here.view.sae, list=name).url("features")


def _time(time: str) -> str:
    return f"{time[:10]} {time[11:16]}"
