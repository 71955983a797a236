"""Explanations by language models: requests, retries, parsing of answers, scores and failures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saebench as sb
from saebench.core.errors import UserError
from saebench.explaining import prompting
from saebench.explaining.finished import WORK
from saebench.explaining.openai import OpenAICompatible, _retry_after
from saebench.explaining.provider import Question
from saebench.explaining.scored_items import score_items
from saebench.store import check_store, open_store
from tests.explaining.server import serving

YES_OR_NO = Question("system", "user", True, 4)
TEXT = Question("system", "tell me", False, 20)
KEY = "sk-secret-of-a-test"


def client(served, tmp_path, **changes):
    settings = {
        "key_env": "KEY_OF_A_TEST",
        "timeout": 5.0,
        "retries": 2,
        "concurrency": 4,
        "first_wait": 0.001,
    }
    settings |= {"base_url": served.url, "answers": tmp_path / "answers"} | changes
    return OpenAICompatible("some-model", **settings)


def in_turn(*answers):
    left = list(answers)
    return lambda handler, body: (left.pop(0) if len(left) > 1 else left[0])(handler)


def test_answer_has_text_tokens_and_probability(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    with serving(lambda handler, body: handler.say("Yes", yes=0.75)) as served:
        [reply] = client(served, tmp_path).ask([YES_OR_NO])
    assert (reply.status, reply.text, reply.tokens) == ("ok", "Yes", 50)
    assert reply.probability == pytest.approx(0.75)
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert served.bodies[0]["model"] == "some-model"
    assert served.bodies[0]["temperature"] == 0


def test_local_server_needs_no_key_and_no_logprobs(tmp_path, monkeypatch):
    monkeypatch.delenv("KEY_OF_A_TEST", raising=False)

    def answer(handler, body):
        if "logprobs" in body:
            return handler.send(400, b'{"error": "logprobs are not supported"}')
        return handler.say("No.")

    with serving(answer) as served:
        asked = client(served, tmp_path, concurrency=1)
        replies = asked.ask([YES_OR_NO, TEXT])
        assert [(r.status, r.text, r.probability) for r in replies] == [("ok", "No.", None)] * 2
        asked.ask([Question("system", "another", True, 4)])
    assert len(served.bodies) == 4  # once with log-probabilities, then never again
    assert "Authorization" not in served.headers[0]


@pytest.mark.parametrize(
    "bad",
    [
        lambda h: h.send(500, b"oops"),
        lambda h: h.send(503, b"", Retry_After="0"),
        lambda h: h.send(429, b"slow down", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        lambda h: h.send(200, b'{"choices": [{"mess'),
        lambda h: h.send(200, b"\xff\xfe\x00"),
        lambda h: h.send(200, b"[]"),
        lambda h: h.send(200, b'{"choices": []}'),
        lambda h: h.say(None),
        lambda h: h.send(200, b"[" * 100_000),
        lambda h: h.connection.close(),
        lambda h: h.send(200, b"x" * (5 << 20)),
        lambda h: h.dribble(header=False),
        lambda h: h.dribble(header=True),
    ],
    ids="500 503 429 cut bytes list empty null deep closed huge slow-body slow-header".split(),
)
def test_temporary_failure_is_retried_then_reported(tmp_path, bad):
    good = [lambda h: h.say("Yes", yes=0.9)]
    with serving(in_turn(bad, *good)) as served:
        [reply] = client(served, tmp_path, timeout=0.3).ask([YES_OR_NO])
    assert reply.status == "ok"
    assert len(served.bodies) == 2
    with serving(in_turn(bad)) as served:
        [reply] = client(served, tmp_path / "other", timeout=0.3, retries=1).ask([YES_OR_NO])
    assert (reply.status, reply.probability) == ("failed", None)
    assert reply.reason
    assert len(served.bodies) == 2
    assert not (tmp_path / "other").exists()


def test_lone_surrogates_and_huge_token_counts_are_replaced(tmp_path):
    half, much = b'{"message": {"content": "a\\ud800b"}}', b"1" + b"0" * 30
    with serving(
        lambda h, body: h.send(200, b'{"choices": [%s], "usage": {"total_tokens": %s}}' % (half, much))
    ) as served:
        [reply] = client(served, tmp_path).ask([TEXT])
        [again] = client(served, tmp_path).ask([TEXT])
    assert reply.text == again.text == "a?b"
    assert reply.tokens < 2**63
    assert len(served.bodies) == 1


def test_permanent_failure_is_not_retried(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    for status, match in (
        (401, "refuses the key in KEY_OF_A_TEST"),
        (404, "does not know the model 'some-model'"),
    ):
        with serving(lambda h, body, status=status: h.send(status, b"")) as served:
            with pytest.raises(UserError, match=match) as error:
                client(served, tmp_path).ask([YES_OR_NO] * 3)
            assert KEY not in str(error.value)
    with serving(lambda h, body: h.send(418, b"")) as served:
        assert client(served, tmp_path).ask([TEXT])[0].status == "failed"
        assert len(served.bodies) == 1
    with serving(lambda h, body: h.say(None, refusal="I will not")) as served:
        assert client(served, tmp_path).ask([TEXT])[0].status == "refused"
    with pytest.raises(UserError, match=r"nothing answers at http://127\.0\.0\.1:.*check --base-url"):
        client(served, tmp_path).ask([TEXT])
    monkeypatch.delenv("KEY_OF_A_TEST")
    with pytest.raises(UserError, match="environment variable KEY_OF_A_TEST"):
        client(served, tmp_path, base_url="https://api.openai.com/v1")


def test_same_question_is_sent_once(tmp_path):
    with serving(lambda h, body: h.say("Yes", yes=0.6)) as served:
        first = client(served, tmp_path).ask([YES_OR_NO])
        again = client(served, tmp_path).ask([YES_OR_NO])
        assert len(served.bodies) == 1
        assert (again[0].text, again[0].probability, again[0].kept) == ("Yes", first[0].probability, True)
        [kept] = (tmp_path / "answers").iterdir()
        kept.write_text(kept.read_text()[:-9])
        client(served, tmp_path).ask([YES_OR_NO])
        assert len(served.bodies) == 2


def test_retry_after_accepts_number_or_date():
    assert _retry_after({"retry-after": "3"}) == 3
    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert _retry_after({"retry-after": "soon"}) is None
    assert _retry_after({"retry-after": "nan"}) is None
    assert _retry_after({}) is None


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([True, False, None]), st.floats(0, 1), st.integers(0, 5)),
        max_size=40,
    )
)
def test_scores_use_answered_items_only(rows):
    items = [
        {
            "truth": truth,
            "verdict": verdict,
            "doc": doc,
            "probability": None if verdict is None else chance,
            "status": "failed" if verdict is None else "ok",
        }
        for truth, verdict, chance, doc in rows
    ]
    score = score_items("detection", items, 0)
    answered = [(t, v, c) for t, v, c, _ in rows if v is not None]
    true, false = [a for a in answered if a[0]], [a for a in answered if not a[0]]
    assert score["n_failed"] == len(rows) - len(answered)
    assert score["tp"] + score["fn"] == len(true)
    assert score["fp"] + score["tn"] == len(false)
    if 20 * score["n_failed"] > len(rows) or not true or not false:
        assert score["value"] is score["auc"] is score["ci_lo"] is None
        return
    share = (sum(v for _, v, _ in true) / len(true) + sum(not v for _, v, _ in false) / len(false)) / 2
    assert score["value"] == pytest.approx(share)
    wins = [(a[2] > b[2]) + (a[2] == b[2]) / 2 for a in true for b in false]
    assert score["auc"] == pytest.approx(np.mean(wins))
    if score["ci_lo"] is not None:
        assert 0 <= score["ci_lo"] <= score["ci_hi"] <= 1


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("Yes", True), (" yes.", True), ("**No**", False), ("Nope", None), ("", None), ("I say yes", None)],
)
def test_read_verdict_needs_leading_yes_or_no(answer, verdict):
    assert prompting.read_verdict(answer) is verdict


def test_read_explanation_finds_text_in_answer():
    assert prompting.read_explanation("\n 'the word the' \nand more") == "the word the"
    assert prompting.read_explanation("Explanation: commas") == "commas"
    assert prompting.read_explanation("The feature responds to commas.") == "commas."
    assert prompting.read_explanation("  \n") is None
    assert prompting.read_explanation("x" * 1000) is None


def oracle(handler, body):
    """Explains every feature as bold type; says yes to texts that contain the word bold."""
    user = body["messages"][1]["content"]
    if "Text:" not in user:
        return handler.say("Words in bold type")
    text = user.split("Text:")[1]
    return handler.say("Yes" if "bold" in text else "No", yes=0.9 if "bold" in text else 0.1)


def explain(store, served, **settings):
    given_ = {"features": (3, 4), "examples": 4, "window": 8, "quiet": True, "retries": 0}
    return sb.explain(store, provider="openai", model="some-model", base_url=served.url, **given_ | settings)


def test_explain_with_server_stores_explanations_and_scores(own_store, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sb.explain(own_store, quiet=True, features=(3,)).close()
    with serving(oracle) as served:
        with explain(own_store, served, quiet=False) as store:
            found = store.explanations(3)
            assert found["provider"].tolist().count("openai") == 1
            asked = found[found["provider"] == "openai"].iloc[0]
            assert (asked["text"], asked["status"], asked["model"]) == (
                "Words in bold type",
                "ok",
                "some-model",
            )
            scores = store.explanation_scores(3).set_index("scorer")
            assert set(scores.index) == {"rule", "best token", "detection", "fuzzing"}
            assert 0 <= scores.loc["detection", "auc"] <= 1
            items = store.explanation_items(3)
            assert len(items) == 16
            assert (items["verdict"] == (items["probability"] >= 0.5)).all()
            assert asked["tokens"] == 50 * 17
            wrong = items[(items["scorer"] == "fuzzing") & ~items["truth"]]
            fires = set(map(tuple, store.activations(3)[["ctx", "pos"]].to_numpy()))
            assert not {(row.ctx, pos) for row in wrong.itertuples() for pos in row.marked} & fires
            best = max(found["score"].iloc[0], 0)
            assert store.feature(3)["explanation_score"] in (best, 2 * best - 1)
        n = len(served.bodies)
        explain(own_store, served).close()
        assert len(served.bodies) == n  # every answer was kept
    assert check_store(own_store) == []
    err = capsys.readouterr().err
    assert "at most 34 questions" in err
    assert KEY not in err
    for path in own_store.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_command_prints_results_of_requested_provider(own_store, monkeypatch, capsys):
    from saebench.cli import main

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sb.explain(own_store, quiet=True, features=(3,)).close()
    words = ["explain", str(own_store), "--provider", "openai", "--features", "3,4", "--examples", "4"]
    words += ["--retries", "0", "--quiet", "--base-url"]
    with serving(lambda h, body: h.send(418, b"")) as served:
        assert main([*words, served.url, "--model", "broken"]) == 0
    out = capsys.readouterr().out
    assert "failed: the server answers with status 418" in out
    assert "fires on" not in out  # that is what the rules say
    with serving(oracle) as served:
        assert main([*words, served.url, "--model", "sound"]) == 0
    out = capsys.readouterr().out
    assert "Words in bold type" in out
    assert "fires on" not in out


def test_failed_answers_give_no_score(own_store):
    def sometimes(handler, body):
        user = body["messages"][1]["content"]
        if "Text:" in user and "exactly" not in body["messages"][0]["content"]:
            return handler.send(400, b"no")
        return oracle(handler, body)

    with serving(sometimes) as served, explain(own_store, served) as store:
        scores = store.explanation_scores(3).set_index("scorer")
        assert np.isnan(scores.loc["detection", "value"])
        assert scores.loc["detection", "n_failed"] == 8
        assert scores.loc["fuzzing", "value"] >= 0
        assert store.explanations(3)["status"].tolist() == ["ok"]
        assert store.feature(3)["explanation_score"] is None
    with serving(lambda h, body: h.send(400, b"")) as served, explain(own_store, served, seed=1) as store:
        assert store.explanations(3)["status"].tolist() == ["failed"]
        assert "status 400" in store.explanations(3)["reason"][0]
    with serving(lambda h, body: h.say(" ")) as served, explain(own_store, served, seed=1) as store:
        assert store.explanations(3)["status"].tolist() == ["unparsed"]
        assert store.explanation_scores(3).empty
    assert check_store(own_store) == []


def test_budget_stops_and_next_run_resumes(own_store, capsys):
    with serving(oracle) as served:
        with pytest.raises(UserError, match="--budget 50; raise it"):
            explain(own_store, served, budget=50)
        assert served.bodies == []
        with explain(own_store, served, features=tuple(range(8)), budget=3000, quiet=False) as store:
            done = [i for i in range(8) if len(store.explanations(i))]
        assert "features are left; run the same command again" in capsys.readouterr().err
        assert 0 < len(done) < 8
        assert 50 * len(served.bodies) <= 3000
        with explain(own_store, served, features=tuple(range(8)), budget=3000) as store:
            more = [i for i in range(8) if len(store.explanations(i))]
        assert len(more) > len(done)
    assert check_store(own_store) == []


def test_interrupted_run_repeats_no_question(own_store):
    import threading

    release = threading.Event()

    def until(handler, body):
        if len(served.bodies) > 20 and not release.is_set():
            return handler.send(401, b"")
        return oracle(handler, body)

    with serving(until) as served:
        with pytest.raises(UserError, match="refuses the key"):
            explain(own_store, served)
        with open_store(own_store) as store:
            assert store.explanations(3).empty
        [journal] = (own_store / WORK).glob("*/finished.jsonl")
        assert [json.loads(line)["feature"] for line in journal.read_text().splitlines()] == [3]
        release.set()
        n = len(served.bodies)
        with explain(own_store, served) as store:
            assert len(store.explanations(4)) == 1
        assert len(served.bodies) - n <= 17


def test_base_url_with_password_or_query_is_refused(own_store):
    with pytest.raises(UserError, match="no password and no query"):
        sb.explain(own_store, provider="openai", model="m", base_url="http://user:password@127.0.0.1/v1")
    with pytest.raises(UserError, match="is not an address"):
        sb.explain(own_store, provider="openai", model="m", base_url="file:///etc/passwd")
