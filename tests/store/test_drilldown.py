"""Search and drill-down agree with the table of all activations."""

from __future__ import annotations

import math
import threading
import time

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.store import open_store
from saebench.store.limits import LONGEST_PATTERN, TimeLimitError, check_pattern, time_limit
from saebench.store.readers.activations import ACTIVATION_ORDERS
from saebench.store.readers.summaries import TOKEN_FEATURE_ORDERS
from saebench.store.text import token_text
from tests.store.small_store import (
    D_SAE,
    N_CONTEXTS,
    VOCAB,
    SmallCache,
    build_store,
    small_options,
    small_sae,
)

TEXTS = [token_text(token) for token in VOCAB]


@pytest.fixture(scope="module")
def store(small_store):
    with open_store(small_store) as opened:
        yield opened


@pytest.fixture(scope="module")
def truth(store):
    """All activations: feature -> {(ctx, pos): value}."""
    every = {i: store.activations(i) for i in range(D_SAE)}
    return {
        i: {(c, p): v for c, p, v in zip(f["ctx"], f["pos"], f["value"], strict=True)}
        for i, f in every.items()
    }


@pytest.fixture(scope="module")
def contexts(store):
    return {ctx: store.context(ctx) for ctx in range(N_CONTEXTS)}


def refusal(question):
    """The error of a query that is refused; None when it is answered."""
    try:
        question()
    except UserError as error:
        return str(error)
    return None


features = st.integers(0, D_SAE - 1)
bounds = st.tuples(st.floats(-1, 25, width=32), st.floats(-1, 25, width=32)).map(sorted)


@settings(max_examples=30, deadline=None)
@given(feature=features, between=bounds, token=st.sampled_from([None, *TEXTS, 7]),
       limit=st.integers(0, 30) | st.none(), order=st.sampled_from(sorted(ACTIVATION_ORDERS)))  # fmt: skip
def test_filtered_activations_equal_brute_force(
    store, truth, contexts, feature, between, token, limit, order
):
    def wanted_token(ctx, pos):
        at = contexts[ctx]["tokens"][pos]
        return token is None or (at == token if isinstance(token, int) else TEXTS[at] == token)

    wanted = [
        (ctx, pos, value)
        for (ctx, pos), value in truth[feature].items()
        if between[0] <= value <= between[1] and wanted_token(ctx, pos)
    ]
    wanted.sort(key=(lambda row: (-row[2], *row)) if order == "value" else None)
    found = store.activations(feature, between=tuple(between), token=token, limit=limit, order=order)
    assert list(found.itertuples(index=False, name=None)) == wanted[:limit]


@settings(max_examples=30, deadline=None)
@given(feature=features, between=bounds, n=st.integers(0, 30), seed=st.integers(0, 9),
       window=st.integers(1, 40))  # fmt: skip
def test_drawn_examples_are_in_the_interval(store, truth, contexts, feature, between, n, seed, window):
    drawn = store.examples_between(feature, *between, n=n, seed=seed, window=window)
    inside = {at: v for at, v in truth[feature].items() if between[0] <= v <= between[1]}
    assert len(drawn) == min(n, len(inside))
    assert drawn["value"].is_monotonic_decreasing
    labels = dict(store.sql("SELECT doc, label FROM document").itertuples(index=False, name=None))
    places = list(zip(drawn["ctx"], drawn["pos"], strict=True))
    assert len(set(places)) == len(places)
    again = store.examples_between(feature, *between, n=n, seed=seed, window=window)
    assert again.equals(drawn)
    for row in drawn.itertuples():
        context = contexts[row.ctx]
        assert inside[row.ctx, row.pos] == row.value
        assert (row.doc, row.label) == (context["docs"][row.pos], labels[row.doc])
        stop = row.start + len(row.tokens)
        assert row.start <= row.pos < stop <= context["n_tokens"]
        assert len(row.tokens) == min(window, context["n_tokens"])
        assert row.tokens == context["tokens"][row.start : stop]
        assert "".join(row.pieces) == b"".join(VOCAB[t] for t in row.tokens).decode(errors="replace")
        expected = [truth[feature].get((row.ctx, pos), 0.0) for pos in range(row.start, stop)]
        assert row.acts == expected


def test_different_seeds_draw_different_examples(store):
    draws = {tuple(store.examples_between(0, 0, 99, n=5, seed=seed)["value"]) for seed in range(8)}
    assert len(draws) > 1


@pytest.mark.parametrize("group", ["top", "random"])
def test_drawn_windows_equal_windows_of_stored_examples(store, group):
    for feature in range(D_SAE):
        drawn = store.examples_between(feature, -99, 99, n=10**6)
        by_place = {(row.ctx, row.pos): row for row in drawn.itertuples()}
        for stored in store.examples(feature, group).itertuples():
            again = by_place[stored.ctx, stored.pos]
            for name in ("value", "doc", "label", "start", "tokens", "pieces", "acts"):
                assert getattr(again, name) == getattr(stored, name)


@pytest.fixture(scope="module")
def indexed_store(tmp_path_factory):
    """The same store, with the activations sorted by context."""
    path = tmp_path_factory.mktemp("indexed") / "store"
    build_store(path, small_sae(), SmallCache(), small_options(context_index=True), no_logits="none")
    with open_store(path) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["store", "indexed_store"])
def test_features_of_context_equal_brute_force(request, truth, kind):
    store = request.getfixturevalue(kind)
    assert store.has("act_by_ctx") == (kind == "indexed_store")
    for ctx in range(N_CONTEXTS):
        wanted = sorted(
            (pos, feature, value)
            for feature, acts in truth.items()
            for (c, pos), value in acts.items()
            if c == ctx
        )
        assert list(store.context_features(ctx).itertuples(index=False, name=None)) == wanted
        some = store.context_features(ctx, [3, 0, 22, 3])
        assert list(some.itertuples(index=False, name=None)) == [w for w in wanted if w[1] in (0, 3)]
        for pos in (0, 1, 2, 10**6):
            here = store.firing_at(ctx, pos)
            assert dict(zip(here["feature"], here["value"], strict=True)) == {
                feature: value for p, feature, value in wanted if p == pos
            }
            assert here["value"].is_monotonic_decreasing


@pytest.mark.parametrize("order_by", sorted(TOKEN_FEATURE_ORDERS))
def test_features_of_token_equal_brute_force(store, truth, contexts, order_by):
    for token, text in enumerate(TEXTS):
        found = store.features_on(token, order_by=order_by, limit=None)
        assert set(found["token"]) <= {token}
        assert set(found["text"]) <= {text}
        fires = {
            feature: sum(contexts[ctx]["tokens"][pos] == token for ctx, pos in acts)
            for feature, acts in truth.items()
        }
        assert dict(zip(found["feature"], found["n"], strict=True)) == {f: n for f, n in fires.items() if n}
        for row in found.itertuples():
            assert row.p_token_given_fire == pytest.approx(row.n / len(truth[row.feature]))
            n_rows = store.find_tokens(limit=99).set_index("token")["n"][token]
            assert row.p_fire_given_token == pytest.approx(row.n / n_rows)
            assert row.lift == pytest.approx(row.p_token_given_fire / (n_rows / store.info()["n_tokens"]))
        by = found["n"] * found["lift"].map(math.log) if order_by == "specificity" else found[order_by]
        assert by.is_monotonic_decreasing
        assert store.features_on(token, order_by=order_by, limit=2).equals(found.head(2))


def test_text_matches_exact_token_else_tokens_that_contain_it(store):
    assert set(store.features_on(" of")["token"]) == {2}
    assert set(store.features_on("SENATE")["token"]) == {26}
    angled = {i for i, text in enumerate(TEXTS) if "<" in text}
    assert set(store.find_tokens("<")["token"]) == angled
    assert set(store.features_on("<", limit=None)["token"]) <= angled
    both = store.features_on([2, 26], limit=None)
    assert set(both["token"]) == {2, 26}


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=6))
def test_any_text_is_answered_or_refused(store, text):
    found = store.find_tokens(text)
    assert all(text.lower() in each.lower() for each in found["text"]) or not text.isascii()
    unknown = text not in TEXTS and (text == "" or found.empty)
    assert (refusal(lambda: store.features_on(text)) is not None) == unknown


@settings(max_examples=40, deadline=None)
@given(pattern=st.text(alphabet="ab(|)[]*+?{}\\^$.1<é", max_size=12))
def test_any_pattern_is_answered_or_refused(store, pattern):
    refused = refusal(lambda: store.features(regex=pattern))
    assert refused is None or "is not a regular expression" in refused
    assert refusal(lambda: store.find_tokens(regex=pattern)) == refused
    if refused is None:
        assert len(store.features(regex=pattern)) == store.count_features(regex=pattern)


def test_regex_filters_features_and_tokens(store):
    tops = store.features(["feature", "top_token"]).dropna()
    wanted = tops[tops["top_token"].str.contains(r"^ \w+$")]["feature"].tolist()
    assert wanted
    assert store.features(["feature"], regex=r"^ \w+$")["feature"].tolist() == wanted
    assert store.neighbors_in_order(wanted[0], regex=r"^ \w+$")[0] is None
    assert set(store.find_tokens(regex="(?i)SENATE$")["text"]) == {" Senate"}
    for number, text in enumerate(TEXTS):
        alike = {other for other, same in enumerate(TEXTS) if same == text}
        assert set(store.find_tokens(token=text)["token"]) == alike
        assert store.find_tokens(token=number)["text"].tolist() == [text]


@settings(max_examples=40, deadline=None)
@given(among=st.lists(st.integers(-3, D_SAE + 3)))
def test_among_filters_by_feature_list(store, among):
    wanted = sorted(set(among) & set(range(D_SAE)))
    assert store.features(["feature"], among=among)["feature"].tolist() == wanted
    assert store.count_features(among=among) == len(wanted)


def test_slow_query_times_out_and_next_query_works(store):
    assert check_pattern("(a*)*b" * 20)  # RE2 takes it in linear time
    stopped = pytest.raises(UserError, match=r"took longer than 0\.1 s")
    with duckdb.connect() as connection, stopped, time_limit(connection, 0.1):
        connection.execute("SELECT count(*) FROM range(10000000000) a, range(100) b").fetchall()
    before = threading.active_count()
    slow = open_store(store.path)
    with slow:
        slow.time_limit = 0.0
        for _ in range(50):  # some end before the interrupt, some do not; all end in an answer or a sentence
            for question in (
                lambda: slow.features(text="a"),
                lambda: slow.context_features(0),
                lambda: slow.features_on(2),
            ):
                assert "took longer than 0 s" in (refusal(question) or "took longer than 0 s")
        slow.time_limit = 60.0
        assert slow.context_features(0).equals(store.context_features(0))
        assert slow.features_on(2).equals(store.features_on(2))
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_scan_timeout_raises_user_error(store, monkeypatch):
    def stopped(*args, **kwargs):
        raise TimeLimitError("the question took longer than 5 s and was stopped")

    monkeypatch.setattr(store._connection, "frame", stopped)
    with pytest.raises(UserError, match="no table act_by_ctx and all of act was read; name some features"):
        store.firing_at(0, 1)


def test_activations_without_contexts(textless_store):
    with open_store(textless_store) as store:
        drawn = store.examples_between(0, 0, 99, n=3)
        assert len(drawn) == 3
        assert drawn["tokens"].tolist() == [[], [], []]
        row = int(drawn["ctx"][0])
        assert 0 in store.firing_at(row, 0)["feature"].tolist()
        last = store.info()["n_tokens"] - 1
        assert len(store.context_features(last)) == store.info()["k"]
        for question in (
            lambda: store.features_on(1),
            lambda: store.find_tokens("a"),
            lambda: store.activations(0, token=1),
        ):
            with pytest.raises(UserError, match="imported without tokens"):
                question()
        with pytest.raises(UserError, match=f"context {last + 1} is not in the store"):
            store.context_features(last + 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s.features_on(len(VOCAB)), f"0 to {len(VOCAB) - 1}"),
        (lambda s: s.features_on(-1), "token -1 is not in the vocabulary"),
        (lambda s: s.features_on(True), "token True"),
        (lambda s: s.features_on([1, 99]), "token 99"),
        (lambda s: s.features_on(1.5), r"token 1\.5"),
        (lambda s: s.features_on("Parliament"), "no token of 'small' is or contains 'Parliament'"),
        (lambda s: s.features_on(1, order_by="liftt"), "did you mean lift"),
        (lambda s: s.features_on(1, limit=-1), "limit is -1"),
        (lambda s: s.find_tokens(limit=-1), "limit is -1"),
        (lambda s: s.find_tokens(regex="("), r"'\(' is not a regular expression \(missing \)"),
        (lambda s: s.features(regex="["), "search for it as text"),
        (lambda s: s.features(regex="a" * (LONGEST_PATTERN + 1)), "501 characters; it may have 500"),
        (lambda s: s.features(regex="\ud800"), "not a regular expression"),
        (lambda s: s.activations(D_SAE), f"0 to {D_SAE - 1}"),
        (lambda s: s.activations(0, between=(2, 1)), "nothing between 2 and 1"),
        (lambda s: s.activations(0, between=(math.nan, 1)), "nothing between nan"),
        (lambda s: s.activations(0, token=99), "token 99"),
        (lambda s: s.activations(0, limit=-2), "limit is -2"),
        (lambda s: s.activations(0, order="vlaue"), "did you mean value"),
        (lambda s: s.examples_between(99, 0, 1), "feature 99"),
        (lambda s: s.examples_between(0, 1, 0), "nothing between"),
        (lambda s: s.examples_between(0, 0, 1, n=-1), "n is -1"),
        (lambda s: s.examples_between(0, 0, 1, window=0), "window is 0"),
        (lambda s: s.firing_at(N_CONTEXTS, 0), f"0 to {N_CONTEXTS - 1}"),
        (lambda s: s.firing_at(0, -1), "pos is -1"),
        (lambda s: s.context_features(-1), "context -1"),
        (lambda s: s.context_features("0"), "context 0"),
        (lambda s: s.context_features(0, [99]), "feature 99"),
    ],
)
def test_invalid_arguments_raise_user_error(store, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(store)


@pytest.mark.parametrize("kind", ["value", "log10"])
@pytest.mark.parametrize("feature", [0, 3, 23])
def test_examples_of_histogram_bar_equal_its_count(store, truth, feature, kind):
    bars = store.histogram(feature, kind)
    drawn = {bar: store.examples_in_bin(feature, bar, kind, n=10_000) for bar in range(40)}
    if feature == 23:
        assert all(frame.empty for frame in drawn.values()) and bars.empty
        return
    places = {(row.ctx, row.pos) for frame in drawn.values() for row in frame.itertuples()}
    assert places == {place for place, value in truth[feature].items() if value > 0 or kind == "value"}
    for bar, frame in drawn.items():  # a value on an edge belongs to both sides
        assert len(frame) >= bars["count"][bar]
        edges = bars["lo"][bar], bars["hi"][bar]
        lo, hi = (10**edge for edge in edges) if kind == "log10" else edges
        assert frame["value"].between(lo * (1 - 1e-5), hi * (1 + 1e-5)).all()
    with pytest.raises(UserError, match="bin 40 is not in the histogram"):
        store.examples_in_bin(feature, 40, kind)
