"""The parts that pages are made of, each with its script and style sheet in ``static/``."""
