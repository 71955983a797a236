"""The parts that pages are made of, each with its script and style sheet in ``static/``."""

CONTROL_WIDTH = 165
"""In pixels: two controls side by side on a telephone, all in one line on a wide screen."""
