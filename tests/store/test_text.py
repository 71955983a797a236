from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from saebench.store.text import pieces, token_text


@st.composite
def split_bytes(draw: st.DrawFn) -> list[bytes]:
    """Any bytes (often UTF-8) cut into tokens at any place, empty tokens included."""
    data = draw(st.one_of(st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary()))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in pairwise([0, *cuts, len(data)])]


@given(split_bytes())
@example([b"\xf0\x9f", b"\x98", b"\x80", b"x"])
@example([b"\xe2\x80", b"", b"\x8d\xff"])
@example([])
def test_pieces_join_to_decoded_text(tokens):
    assert "".join(pieces(tokens)) == b"".join(tokens).decode("utf-8", "replace")
    assert len(pieces(tokens)) == len(tokens)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.data())
def test_split_character_is_on_its_first_token(text, data):
    encoded = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    bounds = [0, *cuts, len(encoded)]
    offset, expected = 0, ["" for _ in bounds[1:]]
    for character in text:
        owner = max(i for i, low in enumerate(bounds[:-1]) if low <= offset and bounds[i + 1] > offset)
        expected[owner] += character
        offset += len(character.encode())
    assert pieces([encoded[a:b] for a, b in pairwise(bounds)]) == expected


@given(st.binary())
def test_token_text_is_valid_unicode(token):
    text = token_text(token)
    assert json.loads(json.dumps(text)) == text
    text.encode()


def test_token_text_of_partial_character():
    assert token_text(b"\xf0\x9f") == "\\xf0\\x9f"
    assert token_text(b" the") == " the"
