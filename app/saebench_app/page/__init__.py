"""The pages, one module each: PATH in the URL, TITLE, and show(here)."""
