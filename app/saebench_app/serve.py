"""The server: Streamlit, which imports what the first page needs while the browser is starting."""

from __future__ import annotations

import importlib
import threading

NEEDED = ("duckdb", "pandas", "pyarrow", "saebench_app.page.features", "saebench_app.page.feature")


def read_ahead() -> None:
    for name in NEEDED:
        importlib.import_module(name)


def main() -> None:
    from streamlit.web.cli import main as streamlit

    threading.Thread(target=read_ahead, daemon=True).start()
    streamlit(prog_name="streamlit")


if __name__ == "__main__":
    main()
