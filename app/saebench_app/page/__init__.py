"""The pages, one module or package each: PATH in the URL, TITLE, SECTION of the sidebar, show(here)."""
