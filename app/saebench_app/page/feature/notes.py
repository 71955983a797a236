"""The annotations of a feature: label, bookmark, lists and comments, in one line under its name."""

from __future__ import annotations

import streamlit as st

from saebench_app.access import read_only
from saebench_app.page.feature.comments import comments
from saebench_app.session import AUTHOR, Here, attempt

LONGEST_LABEL, LONGEST_COMMENT, LONGEST_NAME = 200, 10_000, 100


def notes(here: Here, feature: int) -> None:
    if read_only():
        _comments(here, feature)
        return
    marked = feature in here.bookmarks
    st.session_state["label"] = here.names.get(feature, "")

    def name() -> None:
        here.annotations.set_label(feature, st.session_state["label"].strip())

    def mark() -> None:
        here.annotations.bookmark(feature, not marked)

    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button(
            "Bookmarked" if marked else "Bookmark",
            key="bookmark",
            shortcut="B",
            type="primary" if marked else "secondary",
            on_click=attempt,
            args=(mark,),
        )
        st.text_input(
            "Label",
            key="label",
            placeholder="Label (L)",
            label_visibility="collapsed",
            width=200,
            max_chars=LONGEST_LABEL,
            on_change=attempt,
            args=(name,),
        )
        _lists(here, feature)
        _comments(here, feature)


def _lists(here: Here, feature: int) -> None:
    popover = st.popover("Lists", key="lists", on_change="rerun")
    if not popover.open:
        return
    with popover:
        known = here.annotations.lists()["name"].tolist()
        on = [name for name in known if feature in here.annotations.list_features(name)]
        st.session_state["on-lists"] = on

        def change() -> None:
            wanted = set(st.session_state["on-lists"])
            for name in wanted.difference(on):
                here.annotations.add_to_list(name, feature)
            for name in set(on) - wanted:
                here.annotations.remove_from_list(name, feature)

        st.multiselect(
            "Lists with this feature",
            known,
            key="on-lists",
            on_change=attempt,
            args=(change,),
            accept_new_options=True,
            placeholder="a list, or a name for a new one",
        )


def _comments(here: Here, feature: int) -> None:
    said = here.annotations.comments(feature)
    popover = st.popover(
        f"Comments ({len(said)})" if len(said) else "Comments", key="comments", on_change="rerun"
    )
    if not popover.open:
        return
    with popover:
        comments(said.to_dict("records"), key="comments-list")
        if read_only():
            return
        st.text_area("Comment", key="comment", max_chars=LONGEST_COMMENT, height=90)
        st.session_state.setdefault("author-name", st.session_state.get(AUTHOR, ""))
        st.text_input(
            "Your name",
            key="author-name",
            max_chars=LONGEST_NAME,
            help="Optional. Stored with what you write, until this tab is closed.",
            on_change=lambda: st.session_state.update({AUTHOR: st.session_state["author-name"]}),
        )

        def add() -> None:
            author = st.session_state["author-name"].strip()
            st.session_state[AUTHOR] = author
            here.annotations.comment(feature, st.session_state["comment"], author=author)
            st.session_state["comment"] = ""

        st.button("Add comment", on_click=attempt, args=(add,))
