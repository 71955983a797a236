"""Rules are found on the training fold, and their scores on the test fold are exact."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import saebench as sb
from saebench.core.errors import UserError
from saebench.explaining.finished import WORK
from saebench.explaining.grammar import apply_rule
from saebench.explaining.induction import Induction
from saebench.explaining.rules import LEAST_FIRINGS, RuleExplainer
from saebench.explaining.scoring import RuleScorer
from saebench.explaining.token_index import TokenIndex
from saebench.store import check_store, open_store
from saebench.store.folds import TEST, TRAIN, fold_of
from tests.explaining.test_grammar import rules
from tests.store.small_store import VOCAB, build_small_store


@pytest.fixture(scope="module")
def wide_index(wide_store):
    with open_store(wide_store) as store:
        return TokenIndex(store)


def test_stored_scores_equal_brute_force_counts(own_store):
    with sb.explain(own_store, quiet=True) as store:
        contexts = [store.context(ctx) for ctx in range(store.info()["n_contexts"])]
        fold = fold_of(np.arange(store.info()["n_documents"]))
        n_scores = 0
        for feature in store.features(["feature"])["feature"]:
            fires = set(zip(*store.activations(feature)[["ctx", "pos"]].to_numpy().T, strict=True))
            for score in store.explanation_scores(feature).itertuples():
                said = {
                    (context["ctx"], pos)
                    for context in contexts
                    for pos, holds in enumerate(apply_rule(json.loads(score.rule), context["tokens"], VOCAB))
                    if holds and pos >= 1 and fold[context["docs"][pos]] == TEST
                }
                true = {at for at in fires if fold[contexts[at[0]]["docs"][at[1]]] == TEST}
                tp, fp, fn = len(said & true), len(said - true), len(true - said)
                assert (score.tp, score.fp, score.fn) == (tp, fp, fn)
                assert score.value == pytest.approx(2 * tp / (2 * tp + fp + fn))
                assert 0 <= score.ci_lo <= score.ci_hi <= 1
                n_scores += 1
        assert n_scores >= 3 * 15
        scorers = set(store.explanation_scores(0)["scorer"])
        assert scorers == {"rule", "best token", "shuffled"}
    assert check_store(own_store) == []


def plantable(term: dict) -> bool:
    """Whether the search covers the term: one atom per place, and positions with one bound."""
    places = ["position" if "position" in atom else atom.get("at", "repeated") for atom in term["all"]]
    bounds = [atom["position"] for atom in term["all"] if "position" in atom]
    return len(set(places)) == len(places) and all(low is None or high is None for low, high in bounds)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(rules)
def test_induction_finds_planted_rule(wide_index, rule):
    """For any short rule that decides the firings, a rule about as good is found on the training fold."""
    train, test = (wide_index.rows_where(rule, fold) for fold in (TRAIN, TEST))
    n_rows = wide_index.n_rows
    assume(n_rows / 200 < len(train) < n_rows / 3 and len(test) >= 20)
    assume(len(rule["any"]) == 1 and plantable(rule["any"][0]))
    found = Induction(wide_index).rule(train)
    score = RuleScorer(wide_index, 0).score(wide_index.rows_where(found, TEST), test)
    assert score.ci_hi > 0.75  # not the value: with few firings it is noisy


@pytest.mark.parametrize(
    "term",
    [
        [{"at": 0, "in": [3]}],
        [{"at": -1, "in": [1, 2, 5]}],
        [{"at": 0, "is": "punctuation"}],
        [{"at": -2, "is": "white space"}, {"at": 0, "word": "the"}],
        [{"position": [0, 2]}],
    ],
)
def test_induction_finds_simple_rule_exactly(wide_index, term):
    rule = {"version": 1, "any": [{"all": term}]}
    found = Induction(wide_index).rule(wide_index.rows_where(rule, TRAIN))
    for fold in (TRAIN, TEST):
        assert np.array_equal(wide_index.rows_where(found, fold), wide_index.rows_where(rule, fold))
    assert len(found["any"]) == 1


def test_confidence_interval_contains_the_value(wide_index):
    scorer = RuleScorer(wide_index, 0)
    fires = wide_index.rows[TEST][::7]
    perfect = scorer.score(fires, fires)
    assert (perfect.value, perfect.ci_lo, perfect.ci_hi) == (1, 1, 1)
    half = scorer.score(fires[::2], fires)
    assert half.ci_lo <= half.value <= half.ci_hi
    assert half.tp + half.fp + half.fn + half.tn == len(wide_index.rows[TEST])
    assert scorer.score(fires[:0], fires).precision is None


@given(st.integers(1, 30), st.integers(0, 3))
def test_resamplings_have_constant_size_and_are_seeded(n, seed):
    from saebench.explaining.scoring import resamplings

    drawn = resamplings(n, seed)
    assert (drawn.sum(1) == n).all()
    assert np.array_equal(drawn, resamplings(n, seed))


def test_feature_with_few_firings_has_reason_and_no_score(own_store):
    with sb.explain(own_store, features=(0, 22), quiet=True) as store:
        [dead] = store.explanations(22).to_dict("records")
        assert dead["status"] == "few"
        assert dead["text"] is None
        assert np.isnan(dead["score"])
        assert "it fires on 0 tokens of the documents from which rules are made and on 0 of" in dead["reason"]
        assert store.explanation_scores(22).empty
        assert store.feature(22)["explanation"] is None
        assert store.feature(0)["explanation_score"] == store.explanations(0)["score"][0]
        assert store.explanations(1).empty
        assert store.explanation_items(0).empty
    assert LEAST_FIRINGS > 0


def test_explain_resumes_after_interrupt(own_store, two_saes, tmp_path, monkeypatch):
    with sb.explain(own_store, sae="other", quiet=True) as store:
        whole = {table: store.arrow(f"FROM explanations.{table}") for table in ("explanation", "expl_score")}
    store = shutil.copytree(two_saes, tmp_path / "second")
    real, explained = RuleExplainer._explain, []

    def interrupted(self, feature, rows):
        explained.append(feature)
        if len(explained) == 7:
            raise KeyboardInterrupt
        return real(self, feature, rows)

    monkeypatch.setattr(RuleExplainer, "_explain", interrupted)
    generation = open_store(store).generation
    with pytest.raises(KeyboardInterrupt):
        sb.explain(store, sae="other", quiet=True)
    with open_store(store, "other") as opened:
        assert opened.generation == generation
        assert opened.explanations(0).empty
    [journal] = (store / WORK).glob("*/finished.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"feature": 6, "provi')  # what a killed process may leave
    with sb.explain(store, sae="other", quiet=True) as opened:
        for table, rows in whole.items():
            assert opened.arrow(f"FROM explanations.{table}").equals(rows)
    assert explained.count(explained[6]) == 2
    assert len(explained) == len(set(explained)) + 1  # the one that was interrupted, twice
    assert not (store / WORK).exists()
    assert check_store(store) == []


def test_explain_keeps_existing_explanations(own_store):
    sb.explain(own_store, features=(0, 1, 2), quiet=True).close()
    with sb.explain(own_store, features=(2, 3), seed=5, quiet=True) as store:
        assert [len(store.explanations(i)) for i in range(5)] == [1, 1, 1, 1, 0]
        assert len(store.explanation_scores(2)) == 3
    with open_store(own_store, "other") as store:
        assert store.explanations(0).empty
    assert check_store(own_store) == []


def test_invalid_explain_settings_are_refused(own_store, tmp_path):
    textless_store = build_small_store(tmp_path / "textless", text=False)
    with pytest.raises(UserError, match="feature 99 is not in the SAE; it has 0 to 23"):
        sb.explain(own_store, features=(99,))
    with pytest.raises(UserError, match="'smal' is not an SAE"):
        sb.explain(own_store, sae="smal")
    with pytest.raises(UserError, match="without tokens and contexts"):
        sb.explain(textless_store, quiet=True)
    with pytest.raises(UserError, match="is not a feature store"):
        sb.explain(tmp_path / "nothing")
    with pytest.raises(UserError, match="--features and --limit"):
        sb.explain(own_store, features=(1,), limit=2)
    with pytest.raises(UserError, match="name it with --model"):
        sb.explain(own_store, provider="hf")
    assert not (tmp_path / "nothing").exists()
    assert not (own_store / WORK).exists()


def test_check_finds_changed_score(own_store):
    import duckdb

    from saebench.store import publish

    sb.explain(own_store, features=(0, 1), quiet=True).close()
    [file] = publish.read_manifest(own_store).sae("small").extras.values()
    path = own_store / file.path
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE expl_score SET value = 0.987654 WHERE feature = 1 AND scorer = 'rule'")
    for manifest in (own_store / "manifest.json", path.parent / "manifest.json"):
        content = json.loads(manifest.read_text())
        described = publish.describe(path)
        content["saes"][0]["extras"]["explanations"] |= {"bytes": described.bytes, "sha256": described.sha256}
        manifest.write_text(json.dumps(content))
    problems = [finding.problem for finding in check_store(own_store)]
    assert any("scores of rules do not follow from their counts" in problem for problem in problems)


def test_explain_command_prints_scores(own_store, capsys):
    from saebench.cli import main

    assert main(["explain", str(own_store), "--limit", "5", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["status"] == {"ok": 5}
    assert {row["scorer"] for row in data["scores"]} == {"rule", "best token", "shuffled"}
    assert main(["explain", str(own_store), "--features", "3,4"]) == 0
    out = capsys.readouterr()
    assert "2 features" in out.err
    assert "fires on" in out.out
    assert main(["explain", str(own_store), "--features", "77"]) == 2
