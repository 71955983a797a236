"""Every page's parameters: what is written into a URL is read back, and any URL can be read."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any
from urllib.parse import parse_qs, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saebench_app.page.compare.comparison as comparison
import saebench_app.page.context as context
import saebench_app.page.explain as explain
import saebench_app.page.lists as lists
import saebench_app.page.map as map_page
import saebench_app.page.prompt.query as prompt
import saebench_app.page.sql as sql
import saebench_app.page.steer as steer
import saebench_app.page.token as token
import saebench_app.page.train as train
from saebench_app import view
from saebench_app.url import (
    Bounds,
    Choice,
    Decimal,
    Flag,
    Names,
    Query,
    Text,
    Texts,
    Whole,
    Wholes,
    parameters,
)

COLUMNS = ("feature", "density", "max_act")
ALLOWED = {"sort": COLUMNS, "columns": (*COLUMNS, view.LABEL), "color": ("cluster", "density")}
"""Values that a store or page names when a URL is read."""

PAGES: list[type[Query]] = [
    view.Focus,
    comparison.Comparison,
    context.Place,
    explain.Asked,
    lists.Part,
    map_page.Projection,
    prompt.Prompt,
    sql.Asked,
    steer.Steer,
    token.Asked,
    train.Curves,
]
QUERIES = [view.View, *PAGES]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text("abcdefgh_", min_size=1, max_size=6)


def values(name: str, codec: Any) -> st.SearchStrategy[Any]:
    """Values that a codec can write so that it reads them back."""
    match codec:
        case Text(longest):
            return texts.map(lambda text: text[:longest])
        case Flag():
            return st.booleans()
        case Whole(low, high):
            return st.integers(low, 10**6 if high is None else high)
        case Decimal(low, high):
            return st.integers(round(10 * low), round(10 * high)).map(lambda n: n / 10)
        case Choice(allowed):
            return st.sampled_from(ALLOWED.get(name, allowed))
        case Wholes(most):
            return st.lists(st.integers(0, 10**6), unique=True, max_size=min(most, 5)).map(tuple)
        case Names(allowed):
            known = ALLOWED.get(name, allowed)
            one = names if known is None else st.sampled_from(known)
            return st.lists(one, unique=True, max_size=3).map(tuple)
        case Texts():
            return st.lists(texts.filter(bool), max_size=3).map(tuple)
        case Bounds():
            ends = st.none() | st.integers(-60, 60).map(lambda n: n / 10)
            pairs = st.tuples(ends, ends).filter(lambda pair: pair != (None, None))
            return pairs.filter(lambda pair: None in pair or pair[0] <= pair[1])
    raise AssertionError(f"no values of {codec}")


def instances(query: type[Query]) -> st.SearchStrategy[Query]:
    made = {}
    for one in fields(query):
        own = values(one.name, one.metadata["codec"])
        made[one.name] = st.none() | own if one.default is None else own
    return st.builds(query, **made)


def reread(query: Query) -> Query:
    """What is read from the URL that ``query`` is written into."""
    params = parse_qs(urlencode(query.query(), doseq=True), keep_blank_values=True)
    given = {one.name: getattr(query, one.name) for one in fields(query) if one.default is MISSING}
    return type(query).read(params, allowed=ALLOWED, **given)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.one_of(*map(instances, QUERIES)))
def test_a_url_gives_back_what_was_written_into_it(query: Query) -> None:
    assert reread(query) == query


ODD = ["", "nan", "inf..", "nan..1", "1..0", "..", "-1", "1e999", "²", "1,,x,2", "99999999999999", ",", "<b>"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(QUERIES), st.data())
def test_any_url_can_be_read_and_read_again(query: type[Query], data: st.DataObject) -> None:
    wanted = st.dictionaries(st.sampled_from(sorted(parameters(query))), texts | st.sampled_from(ODD))
    given_ = {one.name: "x" for one in fields(query) if one.default is MISSING}
    read = query.read(data.draw(wanted), allowed=ALLOWED, **given_)
    assert reread(read) == read


@pytest.mark.parametrize("query", QUERIES)
def test_defaults_stay_out_of_the_url(query: type[Query]) -> None:
    required = {one.name: "x" for one in fields(query) if one.default is MISSING}
    assert query(**required).query() == required


@pytest.mark.parametrize("query", PAGES)
def test_a_page_has_no_parameter_of_the_view(query: type[Query]) -> None:
    assert not parameters(query).keys() & parameters(view.View).keys()


def test_names_of_earlier_versions_are_read() -> None:
    assert view.View.read({"labelled": "1", "colours": "rank"}, sae="s") == view.View(
        sae="s", labeled=True, colors="rank"
    )
    found = map_page.Projection.read({"colour": "density"}, allowed=ALLOWED)
    assert found == map_page.Projection(color="density")
    both = map_page.Projection.read({"colour": "density", "color": "cluster"}, allowed=ALLOWED)
    assert both == map_page.Projection()


def test_numbers_outside_their_bounds_move_to_the_nearest_bound() -> None:
    read = steer.Steer.read({"new": "0", "temp": "7", "seed": "99999999999"})
    assert (read.new, read.temp, read.seed) == (1, 2.0, steer.MOST_SEED)
    assert steer.Steer.read({"new": "5000"}).new == steer.MOST_TOKENS
    assert prompt.Prompt.read({"cut": "3"}).cut == 0.0


def test_a_name_with_a_comma_is_a_parameter_of_its_own() -> None:
    curves = train.Curves(of=("a,b", "c"))
    assert urlencode(curves.query(), doseq=True) == "of=a%2Cb&of=c"
    assert reread(curves) == curves


@given(instances(context.Place), st.integers(0, 10**6))
def test_a_context_shows_at_most_four_features(place: context.Place, feature: int) -> None:
    more = place.with_(feature)
    assert feature in more.features
    assert len(set(more.features)) == len(more.features) <= 4
    assert feature not in more.without(feature).features
    assert replace(more, f1=None, f2=None, f3=None, f4=None).features == ()
