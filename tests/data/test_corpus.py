"""Extraction of prose from documentation pages, and packing into contexts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_data.scripts.packing import pack
from saebench_data.scripts.prose import paragraphs_of

PAGE = """<html><head><title>A title that is long enough to be a paragraph</title></head><body>
<div class="nosearch"><ul><li>Navigation, as long as any real paragraph is</div>
<h1>A heading of more than twenty-five characters</h1>
<p>Text with <b>bold</b> words, an &amp; entity
   and   white space.<p>An unclosed paragraph before a program:
<pre>SELECT this FROM program WHERE it IS NOT prose;</pre>
<ul><li>One item that is long enough to be kept<li>short</ul>
<div class="box toc"><p>A table of contents, <img src=x> in <br> several parts and more</div>
<table><tr><td>A cell with as many words as a sentence has</td></tr></table>
<p align=center><small>This page last modified on <a>2021-10-05 17:51:47</a> UTC</small></p></body></html>"""


def test_only_prose_is_kept() -> None:
    assert paragraphs_of(PAGE) == [
        "A heading of more than twenty-five characters",
        "Text with bold words, an & entity and white space.",
        "An unclosed paragraph before a program:",
        "One item that is long enough to be kept",
    ]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    width=st.integers(2, 9),
    overlap=st.booleans(),
)
@settings(deadline=None)
def test_contexts_cover_the_stream(lengths: list[int], width: int, overlap: bool) -> None:
    stream = np.arange(sum(lengths))
    documents = np.split(stream, np.cumsum(lengths)[:-1])
    if len(stream) < width:
        return
    step = width - 1 if overlap else width
    contexts = pack(documents, width, step=width - 1 if overlap else None)
    assert contexts.shape == ((len(stream) - width) // step + 1, width)
    for row, context in enumerate(contexts):
        np.testing.assert_array_equal(context, stream[row * step : row * step + width])
