from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.store.schema import HIST_BINS, NEIGHBOR_KINDS
from saebench_app.view import ABOVE, COLORS, FOLDED, SHOWN, WINDOWS, View

COLUMNS = ("feature", "density", "max_act")
bounds = st.none() | st.integers(-60, 60).map(lambda n: n / 10)
ranges = st.none() | (
    st.tuples(bounds, bounds).filter(lambda r: r != (None, None) and (None in r or r[0] <= r[1]))
)
views = st.builds(
    View,
    sae=st.text(min_size=1),
    text=st.text(),
    log_density=ranges,
    max_act=ranges,
    dead=st.sampled_from(SHOWN),
    dense=st.sampled_from(SHOWN),
    sort=st.sampled_from(COLUMNS),
    descending=st.booleans(),
    regex=st.booleans(),
    token_share=ranges,
    loss_effect=ranges,
    score=ranges,
    explained=st.sampled_from(SHOWN),
    norm_share=ranges,
    exclusive=st.sampled_from(SHOWN),
    bookmarked=st.booleans(),
    labeled=st.booleans(),
    list=st.text(),
    among=st.lists(st.integers(0, 10**6), max_size=5, unique=True).map(tuple),
    columns=st.lists(st.sampled_from((*COLUMNS, "label")), unique=True).map(tuple),
    page=st.integers(1, 10**6),
    bin=st.none() | st.integers(0, HIST_BINS - 1),
    histogram=st.sampled_from(["value", "log10"]),
    role=st.sampled_from(["active", "previous", "next"]),
    near=st.sampled_from(list(NEIGHBOR_KINDS)),
    colors=st.sampled_from(COLORS),
    above=st.sampled_from(ABOVE),
    lines=st.booleans(),
    distinct=st.booleans(),
    open=st.lists(st.sampled_from(FOLDED), unique=True).map(tuple),
    group=st.sampled_from(["top", "random"]),
    window=st.sampled_from(WINDOWS),
)


@given(
    views.filter(lambda view: not any("\ud800" <= c <= "\udfff" for c in view.sae + view.text + view.list))
)
def test_a_link_holds_one_path_and_the_query(view: View) -> None:
    parts = urlsplit(view.url("feature", f=3))
    assert (parts.scheme, parts.netloc, parts.path, parts.fragment) == ("", "", "feature", "")
    assert dict(parse_qsl(parts.query, keep_blank_values=True)) == view.query(f=3)


def test_filters_are_arguments_of_the_store() -> None:
    view = View(sae="s", text="a", log_density=(-3.0, None), max_act=(None, 2.0), dead="hide", dense="only")
    assert view.filters() == {
        "ranges": {"density": (pytest.approx(1e-3), None), "max_act": (None, 2.0)},
        "flags": {"dead": False, "dense": True},
        "among": None,
        "text": "a",
        "search": ("top_token", "explanation"),
    }
    assert View(sae="s", text="^a", regex=True).filters()["regex"] == "^a"
    assert View(sae="s", explained="hide").filters()["flags"] == {"explained": False}
    scored = View(sae="s", score=(0.5, None), loss_effect=(None, 0.1), selectivity=(0.2, None))
    assert scored.filters()["ranges"] == {
        "explanation_score": (0.5, None),
        "loss_effect": (None, 0.1),
        "top_token_p_fire": (0.2, None),
    }
    assert View(sae="s").lists_all()
    assert not view.lists_all()


def test_a_heading_sorts_descending_first_then_ascending() -> None:
    once = View(sae="s", page=4).sorted_by("density")
    assert (once.sort, once.descending, once.page) == ("density", True, 1)
    assert not once.sorted_by("density").descending
    assert not once.sorted_by("feature").descending


@given(views)
def test_clearing_leaves_order_columns_and_display(view: View) -> None:
    cleared = view.cleared()
    assert cleared.lists_all()
    kept = ("sae", "sort", "descending", "columns", "window", "colors", "near", "role", "open")
    assert all(getattr(cleared, name) == getattr(view, name) for name in kept)


@given(views, st.sampled_from(FOLDED))
def test_a_fold_opens_and_closes(view: View, part: str) -> None:
    assert (part in view.toggled(part).open) != (part in view.open)
    assert set(view.toggled(part).toggled(part).open) == set(view.open)
