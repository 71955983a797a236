"""Lists: what people said of the SAE's features, to look through, put right, take away and bring along."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import share, visible
from saebench_app.components.head import Choice, Head, Option, heading
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.session import Here, attempt
from saebench_app.view import View

PATH = "lists"
TITLE = "Lists"
SECTION = "Work"
PARTS = {"lists": "Lists", "bookmarks": "Bookmarks", "labels": "Labels", "comments": "Comments",
         "files": "Import and export"}  # fmt: skip
LONGEST_NAME = 100
TICKED = "ticked entries"
"""Key of the session: the part of the page, and what is ticked in its table."""


def show(here: Here) -> None:
    st.title("Lists")
    part = st.query_params.get("part", "lists")
    part = part if part in PARTS else "lists"
    options = [Option(label, here.view.url(PATH, part=name), name == part) for name, label in PARTS.items()]
    heading(Head("", choices=(Choice("What people said", options),)), key="parts")
    {"lists": _lists, "bookmarks": _bookmarks, "labels": _labels, "comments": _comments, "files": _files}[
        part
    ](here)


# Lists


def _lists(here: Here) -> None:
    lists = here.annotations.lists().to_dict("records")
    if not lists:
        notice(
            "There is no list yet. Tick features in the table of features and add them to a list, or use "
            "“Lists” on the page of a feature.",
            key="none",
        )
        return
    name = here.view.list if here.view.list in {one["name"] for one in lists} else None
    rows = [
        [
            Cell(visible(one["name"]), href=_at(here, one["name"])),
            Cell(str(one["n_features"]), exact=one["n_features"]),
            Cell(_time(one["time"])),
            Cell("show in the table", href=_listed(here, one["name"])),
        ]
        for one in lists
    ]
    headings = [Heading("list", align="left"), Heading("features"), Heading("changed"), Heading("")]
    table(headings, rows, name="Lists", key="lists")
    if name is None:
        st.caption("Choose a list to see and change what is on it.")
        return
    _one_list(here, name)


def _one_list(here: Here, name: str) -> None:
    features = here.annotations.list_features(name)
    heading(Head(f"On the list “{visible(name)}”"), key="list-head")

    def rename() -> None:
        new = st.session_state["new-name"].strip()
        attempt(
            lambda: here.annotations.rename_list(name, new),
            then=lambda: here.show(replace(here.view, list=new), part="lists"),
        )

    def remove() -> None:
        attempt(
            lambda: here.annotations.remove_list(name),
            then=lambda: here.show(replace(here.view, list=""), part="lists"),
        )

    st.session_state["new-name"] = name
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.text_input("Name", key="new-name", on_change=rename, max_chars=LONGEST_NAME, width=280)
        st.download_button(
            "Save as one HTML page", lambda: _page(here, features), "features.html", mime="text/html",
            on_click="ignore", help="The features of the list as one HTML file that needs nothing else.",
            disabled=len(features) > _most(),
        )  # fmt: skip
        with st.popover("Remove the list"):
            st.caption(f"The list of {len(features)} features goes; their labels and comments stay.")
            st.button("Remove it", on_click=remove, type="primary")
    if len(features) > _most():
        st.caption(f"One page holds up to {_most()} features; saebench store export writes others.")
    _entries(
        here, "lists", features,
        lambda feature: here.annotations.remove_from_list(name, feature),
    )  # fmt: skip


def _page(here: Here, features: Sequence[int]) -> str:
    from saebench.store.exports.html import page

    return page(here.store, features)


def _most() -> int:
    from saebench.store.exports.html import MOST_FEATURES

    return MOST_FEATURES


def _bookmarks(here: Here) -> None:
    features = here.annotations.bookmarks()["feature"].tolist()
    if not features:
        notice("There is no bookmark yet. B on the page of a feature sets one.", key="none")
        return
    _entries(
        here, "bookmarks", features,
        lambda feature: here.annotations.bookmark(feature, False),
    )  # fmt: skip


def _entries(here: Here, part: str, features: Sequence[int], remove: Callable[[int], object]) -> None:
    """A row a feature; those that are ticked can be taken off."""
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
        Heading("feature"), Heading("label", align="left"), Heading("top token", align="left"),
        Heading("density"), Heading("explanation", align="left"),
    ]  # fmt: skip
    ticked = _ticked(part)
    table(headings, rows, name=PARTS[part], key=f"{part}-entries", selected=ticked,
          on_select=lambda features: st.session_state.update({TICKED: (part, features)}))  # fmt: skip
    _take_off(part, ticked, remove)


def _take_off(part: str, ticked: list[int], remove: Callable[[int], object]) -> None:
    def take() -> None:
        st.session_state.pop(TICKED, None)
        for one in ticked:
            remove(one)

    if ticked:
        st.button(f"Remove the {len(ticked)} ticked", on_click=attempt, args=(take,))


def _ticked(part: str) -> list[int]:
    of, numbers = st.session_state.get(TICKED, (part, []))
    return list(numbers) if of == part else []


# Labels and comments


def _labels(here: Here) -> None:
    labels = here.annotations.labels().to_dict("records")
    if not labels:
        notice("There is no label yet. L on the page of a feature names it.", key="none")
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
    table(headings, rows, name="Labels", key="labels-entries", selected=ticked,
          on_select=lambda features: st.session_state.update({TICKED: ("labels", features)}))  # fmt: skip
    _take_off("labels", ticked, lambda feature: here.annotations.set_label(feature, ""))


def _comments(here: Here) -> None:
    comments = here.annotations.comments().to_dict("records")
    if not comments:
        notice("There is no comment yet; the page of a feature takes them.", key="none")
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
        Heading("number", align="left"), Heading("feature"), Heading("comment", align="left"), *WHOSE,
    ]  # fmt: skip
    ticked = [at for at in _ticked("comments") if at < len(comments)]
    table(headings, rows, name="Comments", key="comments-entries", selected=ticked,
          on_select=lambda chosen: st.session_state.update({TICKED: ("comments", chosen)}))  # fmt: skip
    _take_off(
        "comments", ticked,
        lambda at: here.annotations.remove_comment(comments[at]["id"]),
    )  # fmt: skip


WHOSE = [Heading("by", align="left"), Heading("when")]


def _whose(one: dict[str, Any]) -> list[Cell]:
    return [text_cell(one["author"]), Cell(_time(one["time"]))]


# Files


def _files(here: Here) -> None:
    st.caption(
        "One JSON file holds the labels, bookmarks, comments, lists and saved views of all SAEs of this "
        "store. They go by the weights of an SAE, so another store with the same SAE takes them."
    )
    st.download_button(
        "Export as JSON", lambda: json.dumps(here.annotations.export_json(), ensure_ascii=False, indent=1),
        "annotations.json", mime="application/json", on_click="ignore",
    )  # fmt: skip
    file = st.file_uploader("Import from JSON", type="json", key="import", max_upload_size=50)
    if file is None:
        return

    def take_in() -> None:
        try:
            content = json.loads(file.getvalue())
        except (ValueError, RecursionError):
            raise UserError("the file is not JSON; export one here or with export_json") from None
        if not isinstance(content, dict):
            raise UserError("the file is not an export of annotations; make one with export_json")
        st.session_state["imported"] = here.annotations.import_json(content)

    st.button("Take it in", on_click=attempt, args=(take_in,))
    if (n := st.session_state.pop("imported", None)) is not None:
        notice(f"{n} entries were new or newer.", key="imported-notice")


# Links


def _at(here: Here, name: str) -> str:
    return replace(here.view, list=name).url(PATH, part="lists")


def _listed(here: Here, name: str) -> str:
    return View(sae=here.view.sae, list=name).url("features")


def _time(time: str) -> str:
    return f"{time[:10]} {time[11:16]}"
