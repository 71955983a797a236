from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from saebench.core.errors import UserError
from saebench.store import open_store, schema
from saebench.store.schema import FEATURE
from tests.store.small_store import D_SAE, LABELS, N_CONTEXTS, VOCAB, SmallCache


@pytest.fixture(scope="module")
def store(small_store):
    with open_store(small_store) as opened:
        yield opened


def test_info_has_metadata(store):
    info = store.info()
    assert info["name"] == store.sae == "small"
    assert info["n_dead"] == store.count_features(flags={"dead": True}) >= 2
    assert info["n_dense"] == store.count_features(flags={"dense": True}) >= 1
    assert info["n_activations"] == sum(len(store.activations(i)) for i in range(D_SAE))
    assert info["model"] == info["text"] == "small"
    json.dumps(info)


def test_features_returns_columns_in_requested_order(store):
    assert store.features().columns.tolist() == FEATURE.names
    assert store.features(["density", "feature"]).columns.tolist() == ["density", "feature"]


@pytest.mark.parametrize("order_by", ["density", "max_act", "top_token", "entropy_tok", "dead", "feature"])
@pytest.mark.parametrize("descending", [False, True])
def test_filter_sort_and_pages_equal_pandas(store, order_by, descending):
    ranges = {"density": (0.01, None), "max_act": (None, 12.0)}
    every = store.features()
    wanted = every[(every["density"] >= 0.01) & (every["max_act"] <= 12) & ~every["dead"]]
    wanted = wanted.sort_values("feature").sort_values(
        order_by, ascending=not descending, kind="stable", na_position="last"
    )
    settings = {"ranges": ranges, "flags": {"dead": False}}
    found = store.features(order_by=order_by, descending=descending, **settings)
    assert found["feature"].tolist() == wanted["feature"].tolist()
    assert store.count_features(**settings) == len(wanted)
    pages = [
        store.features(["feature"], order_by=order_by, descending=descending, limit=4, offset=at, **settings)
        for at in range(0, len(wanted), 4)
    ]
    assert [f for page in pages for f in page["feature"]] == wanted["feature"].tolist()
    order = found["feature"].tolist()
    for at, feature in enumerate(order):
        before, after = store.neighbors_in_order(
            feature, order_by=order_by, descending=descending, **settings
        )
        assert before == (order[at - 1] if at else None)
        assert after == (order[at + 1] if at + 1 < len(order) else None)
    outside = next(i for i in range(D_SAE) if i not in order)
    assert store.neighbors_in_order(outside, **settings) == (None, None)


def test_text_search_is_literal_and_case_insensitive(store):
    tokens = store.features(["feature", "top_token"]).dropna()
    for text in tokens["top_token"].unique():
        hits = store.features(["top_token"], text=text.upper())["top_token"]
        assert text in hits.tolist()
        assert all(text.lower() in hit.lower() for hit in hits)
    for hostile in ("'; DROP TABLE feature; --", "%", "_____", "\\", "x' OR 1=1"):
        expected = tokens["top_token"].str.lower().str.contains(hostile.lower(), regex=False).sum()
        assert store.count_features(text=hostile) == expected
    assert store.count_features() == D_SAE


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s.features(["densty"]), "did you mean density"),
        (lambda s: s.features(["feature; DROP TABLE x"]), "not a column"),
        (lambda s: s.features(order_by="max"), "not a column"),
        (lambda s: s.features(ranges={"nact": (0, 1)}), "did you mean n_act"),
        (lambda s: s.features(ranges={"top_token": (0, 1)}), "not a number"),
        (lambda s: s.features(flags={"density": True}), "flags are dead, dense"),
        (lambda s: s.feature(D_SAE), f"0 to {D_SAE - 1}"),
        (lambda s: s.feature(-1), "feature -1"),
        (lambda s: s.tokens(99), "feature 99"),
        (lambda s: s.examples("3"), "feature '3' is not"),
        (lambda s: s.feature(1.5), "feature 1.5"),
        (lambda s: s.feature(float("nan")), "feature nan"),
        (lambda s: s.features(limit=-1), "limit is -1"),
        (lambda s: s.examples(0, "topp"), "did you mean top"),
        (lambda s: s.context(N_CONTEXTS), f"0 to {N_CONTEXTS - 1}"),
        (lambda s: s.context(-1), "context -1"),
        (lambda s: open_store(s.path, "smal"), "did you mean small"),
        (lambda s: open_store(s.path / "nowhere"), "not a feature store"),
    ],
)
def test_invalid_arguments_raise_user_error(store, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(store)


def test_hostile_tokens_round_trip(store):
    found = set()
    for ctx in range(N_CONTEXTS):
        context = store.context(ctx)
        assert "".join(context["pieces"]) == b"".join(VOCAB[t] for t in context["tokens"]).decode(
            errors="replace"
        )
        assert context["label"] == LABELS[context["doc"]]
        assert len(context["docs"]) == context["n_tokens"] == len(context["tokens"])
        found |= set(context["pieces"])
    assert {"</script>", "<img src=x onerror=alert(1)>", "\N{GRINNING FACE}", "\n", "\u202eevil"} <= found
    assert store.context(0)["pieces"][1:3] == ["\N{GRINNING FACE}", ""]


def test_context_documents_match_rows(store):
    cache = SmallCache()
    for doc, ctx, pos in zip(cache.doc.tolist(), cache.ctx.tolist(), cache.pos.tolist(), strict=True):
        assert store.context(ctx)["docs"][pos] == doc


def test_position_differences_can_be_negative(store):
    frame = store.activations(0)
    assert (frame["pos"] - 1000 < 0).all()
    assert frame["value"].dtype == np.float32


def test_concurrent_queries_give_equal_answers(store):
    expected = {i: store.examples(i)["value"].tolist() for i in range(D_SAE)}
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(D_SAE):
            if store.examples(int(i))["value"].tolist() != expected[int(i)]:
                wrong.append(int(i))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_feature_details_are_consistent(store):
    for feature in (0, 3, 22):
        row, n_act = store.feature(feature), store.feature(feature)["n_act"]
        quantiles = store.quantiles(feature).set_index("q")["value"]
        positions, labels = store.positions(feature), store.labels(feature)
        assert positions["n"].sum() == labels["n"].sum() == n_act
        assert store.histogram(feature, "log10")["count"].sum() == n_act
        if not n_act:
            assert quantiles.empty and positions.empty and labels.empty
            continue
        assert quantiles[0.9] == row["p90"]
        assert quantiles[1.0] == row["max_act"]
        assert positions["lo"].iloc[0] == 0
        assert (positions["lo"].iloc[1:].to_numpy() == positions["hi"].iloc[:-1].to_numpy()).all()
        assert positions["p_fire"].between(0, 1).all()
        token = int(store.tokens(feature)["token"][0])
        mine = store.features_on(token).set_index("feature").loc[feature]
        assert mine["p_fire_given_token"] == pytest.approx(row["top_token_p_fire"])


def test_examples_have_fold_weight_and_group(store):
    examples = store.examples(1)
    assert list(examples["group"].unique()) == [
        group for group in schema.GROUPS if group in set(examples["group"])
    ]
    deciles = examples[examples["group"].str.startswith("decile")]
    assert deciles["weight"].sum() == store.feature(1)["n_act"]
    assert (examples.groupby("doc")["fold"].nunique() == 1).all()
    silent = examples[examples["group"].isin(["near-miss", "negative"])]
    assert (silent["value"] == 0).all()
    assert not any(any(acts) for acts in silent["acts"])


def test_unknown_kind_is_refused(store):
    for ask in (store.neighbors, store.tokens, store.histogram):
        with pytest.raises(UserError, match="'nearly' is not a"):
            ask(3, "nearly")


def test_single_column_name_is_accepted(store):
    assert store.features("n_act").equals(store.features(["n_act"]))


def test_huge_limit_returns_all_rows(store):
    """A limit beyond the integers of the database returns all rows."""
    most = 2**64
    assert len(store.features(limit=most)) == D_SAE
    assert store.features(offset=most).empty
    assert len(store.activations(3, limit=most)) == store.feature(3)["n_act"]
    assert store.features_on(1, limit=most).equals(store.features_on(1, limit=10**6))
