"""The grammar of rules: TokenIndex over a corpus agrees with apply_rule on each context."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.explaining import grammar
from saebench.explaining.grammar import CLASSES, OFFSETS, apply_rule, check_rule, describe
from saebench.explaining.token_index import TokenIndex
from saebench.store import open_store
from tests.store.small_store import CTX_LEN, VOCAB

words_ = st.sampled_from(["the", "senate", "e", "", "bo", "*bold*", "te", "of", "nate", "evil"])
offsets = st.sampled_from(OFFSETS)
bounds = st.none() | st.integers(0, CTX_LEN)
atoms = st.one_of(
    st.fixed_dictionaries({"at": offsets, "in": st.lists(st.integers(0, len(VOCAB) - 1), max_size=8)}),
    st.fixed_dictionaries({"at": offsets, "is": st.sampled_from(list(CLASSES))}),
    st.fixed_dictionaries({"at": offsets, "word": words_}),
    st.fixed_dictionaries({"at": offsets, "begins": words_}),
    st.fixed_dictionaries({"at": offsets, "ends": words_}),
    st.fixed_dictionaries({"position": st.tuples(bounds, bounds).map(list)}),
    st.just({"repeated": True}),
)
terms = st.fixed_dictionaries({"all": st.lists(atoms, min_size=1, max_size=3)})
rules = st.fixed_dictionaries({"version": st.just(1), "any": st.lists(terms, max_size=3)})


@pytest.fixture(scope="module")
def index(wide_store):
    with open_store(wide_store) as store:
        return TokenIndex(store)


@pytest.fixture(scope="module")
def contexts(wide_store):
    with open_store(wide_store) as store:
        return [store.context(ctx) for ctx in range(store.info()["n_contexts"])]


@given(rules)
def test_token_index_equals_apply_rule_on_every_context(index, contexts, rule):
    some = contexts[:60]
    there = [apply_rule(rule, context["tokens"], VOCAB) for context in some]
    held = {
        (context["ctx"], pos)
        for context, holds in zip(some, there, strict=True)
        for pos in range(1, context["n_tokens"])
        if holds[pos]
    }
    rows = np.concatenate([index.rows_where(rule, fold) for fold in (0, 1)])
    last = index.row_of(np.array([59]), np.array([some[-1]["n_tokens"] - 1]))[0]
    rows = np.sort(rows[rows <= last])
    everywhere = [(c["ctx"], pos) for c in some for pos in range(1, c["n_tokens"])]
    assert {everywhere[row] for row in rows} == held
    every = np.arange(last + 1)
    holds = np.zeros(len(every), dtype=bool)
    for term in rule["any"]:
        holds |= np.logical_and.reduce([index.holds(atom, every) for atom in term["all"]])
    assert np.array_equal(every[holds], rows)


@given(rules)
def test_rule_round_trips_json_and_has_description(rule):
    check_rule(json.loads(json.dumps(rule)))
    assert describe(rule, VOCAB).startswith("fires ")


@pytest.mark.parametrize(
    "rule",
    [
        {},
        None,
        [],
        {"version": 1},
        {"version": 1, "any": [{"all": []}]},
        {"version": 1, "any": [{"all": [{"at": 1, "in": [3]}]}]},
        {"version": 1, "any": [{"all": [{"at": 0, "in": ["3"]}]}]},
        {"version": 1, "any": [{"all": [{"at": 0, "is": "a regex of mine"}]}]},
        {"version": 1, "any": [{"all": [{"at": 0, "matches": "(a+)+$"}]}]},
        {"version": 1, "any": [{"all": [{"position": [1]}]}]},
    ],
)
def test_invalid_rule_is_refused(rule):
    with pytest.raises(UserError, match="is not a rule"):
        check_rule(rule)


def test_later_rule_version_is_refused():
    with pytest.raises(UserError, match="version 2 and this saebench knows 1"):
        check_rule({"version": 2, "any": []})


def test_docstring_examples_of_grammar_run():
    assert doctest.testmod(grammar).attempted > 0
    assert doctest.testmod(grammar).failed == 0


def test_describe_gives_words_of_rule():
    rule = {
        "version": 1,
        "any": [
            {"all": [{"at": -1, "is": "punctuation"}, {"at": 0, "in": [1]}]},
            {"all": [{"at": -1, "word": "of"}, {"position": [0, 4]}]},
        ],
    }
    expected = "fires on ' the' after punctuation; or on what comes after the word 'of' up to position 4"
    assert describe(rule, VOCAB) == expected
