"""Import and export of all annotations as one JSON file."""

from __future__ import annotations

import json

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.reading import parse_json
from saebench_app.access import read_only
from saebench_app.components.notice import notice
from saebench_app.session import Here, attempt


def show_files(here: Here) -> None:
    st.caption(
        "One JSON file holds the labels, bookmarks, comments, lists and saved views of all SAEs of this "
        "store. They are keyed by the hash of the SAE's weights, so another store with the same SAE can "
        "import them."
    )
    st.download_button(
        "Export as JSON",
        lambda: json.dumps(here.annotations.export_json(), ensure_ascii=False, indent=1),
        "annotations.json",
        mime="application/json",
        on_click="ignore",
    )
    if read_only():
        return
    file = st.file_uploader("Import from JSON", type="json", key="import", max_upload_size=50)
    if file is None:
        return

    def take_in() -> None:
        try:
            content = parse_json(file.getvalue())
        except ValueError:
            raise UserError("the file is not JSON; export one here or with export_json") from None
        if not isinstance(content, dict):
            raise UserError("the file is not an export of annotations; make one with export_json")
        st.session_state["imported"] = here.annotations.import_json(content)

    st.button("Import", on_click=attempt, args=(take_in,))
    if (n := st.session_state.pop("imported", None)) is not None:
        notice(f"{n} new or newer entries were imported.", key="imported-notice")
