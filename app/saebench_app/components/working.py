"""A job on a page: a button starts it, a bar shows its progress, another button stops it."""

from __future__ import annotations

from functools import partial

import streamlit as st

from saebench_app.access import read_only
from saebench_app.components.notice import notice
from saebench_app.session import attempt
from saebench_app.work import Task, start, work_on

SECONDS_BETWEEN_UPDATES = "1s"


def working(task: Task, label: str, *, note: str = "", done: str = "") -> None:
    """The button ``label`` and ``note`` beside it; while ``task`` is running, its progress.

    ``done`` is shown when the job has ended well and the page itself shows nothing of its result. A read-only
    explorer has no button.
    """
    work = work_on(task)
    if work is not None and work.state() == "running":
        st.fragment(_watch, run_every=SECONDS_BETWEEN_UPDATES)(task)
        return
    if work is not None and work.state() == "failed":
        notice(work.error_message(), key=f"failed-{task.kind}", kind="error")
    elif work is not None and work.state() == "stopped":
        notice("Stopped.", key=f"stopped-{task.kind}")
    elif work is not None and done:
        notice(done, key=f"done-{task.kind}")
    if read_only():
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(label, key=f"start-{task.kind}", on_click=attempt, args=(partial(start, task),))
        if note:
            st.caption(note, width="content")


def _watch(task: Task) -> None:
    work = work_on(task)
    if work is None or work.state() != "running":
        st.rerun()
        return
    progress = work.progress()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(progress.share or 0.0, text=progress.text)
        st.button("Stop", key=f"stop-{task.kind}", on_click=work.stop, width="content")
