"""ablate and steer against manual edits of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.analysis import prompts
from saebench.analysis.attach import attach
from saebench.analysis.edits import LatentEdit, latent_values
from saebench.analysis.interventions import ablate, steer
from saebench.core.errors import UserError
from saebench.evaluation import splice
from saebench.runs.run import load
from saebench.saes.base import SAE
from saebench.saes.registry import ARCHITECTURES
from saebench.sources.models import Model

TEXT = "The Congress of the United States"
MODES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda z, s: z + s,
    "clamp": lambda z, s: z * 0 + s,
    "scale": lambda z, s: z * s,
}


def top_latents(run: Path, model: Model, n: int = 2) -> list[int]:
    """The latents with the largest values in the text after position 0."""
    found = prompts.features_of(TEXT, run, model)
    values = found[~found["first"]].groupby("feature")["value"].max()
    return [int(feature) for feature in values.nlargest(n).index]


def ids(model: Model) -> Tensor:
    return torch.tensor([model.tokens.encode(TEXT)])


def by_hand(
    sae: SAE, model: Model, hook: str, positions: list[int], new: Callable[[Tensor], Tensor]
) -> Tensor:
    """Log probabilities [T, V] when ``new`` changes the codes [T, d_sae] at ``positions``."""

    def edit(x_BTD: Tensor) -> Tensor:
        z = sae.encode(x_BTD[0]).to_dense()
        edited = z.clone()
        edited[positions] = new(z[positions])
        error = x_BTD[0] - (z @ sae.W_dec + sae.b_dec)
        return (error + edited @ sae.W_dec + sae.b_dec)[None]

    with torch.no_grad():
        return model.logits(ids(model), edit={hook: edit})[0].log_softmax(-1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_splicing_without_an_edit_leaves_logits_unchanged(
    make_sae: Callable[[str], SAE], tiny_model: Model, hook: str, name: str
) -> None:
    attached = attach(make_sae(name), tiny_model, hook)
    edit = LatentEdit(list(range(attached.sae.d_sae)), "scale", 1.0, list(range(ids(tiny_model).shape[1])))
    with torch.no_grad():
        spliced = tiny_model.logits(ids(tiny_model), edit=edit.spliced(attached, ids(tiny_model)))
    torch.testing.assert_close(spliced, tiny_model.logits(ids(tiny_model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_edit_adds_the_difference_of_reconstructions(
    make_sae: Callable[[str], SAE], tiny_model: Model, hook: str, mode: str, name: str
) -> None:
    sae = make_sae(name)
    with torch.no_grad():
        x_PD = tiny_model.run_to(ids(tiny_model), [hook])[hook][0]
        z = sae.encode(x_PD).to_dense()
        features = [int(z[1].argmax()), int(z[2].argmin())]  # one that fires, one that does not
        torch.testing.assert_close(latent_values(sae.encode(x_PD), features), z[:, features], rtol=0, atol=0)
        edited = z.clone()
        edited[:, features] = MODES[mode](z[:, features], 1.7)
        got = LatentEdit(features, mode, 1.7, []).apply(sae, x_PD, x_PD)
        torch.testing.assert_close(got - x_PD, (edited - z) @ sae.W_dec, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "at"), [(None, range(1, 13)), ([2], range(2, 3)), (slice(3, None), range(3, 13))]
)
def test_ablate_equals_manual_edit_of_the_residual_stream(
    run: Path, tiny_model: Model, hook: str, positions: Any, at: range
) -> None:
    fires = prompts.features_of(TEXT, run, tiny_model, top=1)
    features, sae = fires["feature"][fires["pos"].isin([2, 3])].unique().tolist(), load(run)
    length = ids(tiny_model).shape[1]
    assert length == 13
    found = ablate(TEXT, features, run, tiny_model, positions=positions)

    def off(z: Tensor) -> Tensor:
        return z.index_fill(1, torch.tensor(features), 0.0)

    clean = tiny_model.logits(ids(tiny_model))[0].log_softmax(-1)
    edited = by_hand(sae, tiny_model, hook, list(at), off)
    then = ids(tiny_model)[0, 1:, None]
    for name, rows in (("logp_clean", clean), ("logp_edited", edited)):
        np.testing.assert_allclose(found[name][:-1], rows[:-1].gather(1, then)[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["kl"], (clean.exp() * (clean - edited)).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(found["difference"], found["logp_edited"] - found["logp_clean"])
    assert found["edited"].to_numpy().nonzero()[0].tolist() == list(at)
    assert found["logp_clean"].isna().tolist() == [False] * (length - 1) + [True]
    assert found["next_token"][:-1].tolist() == found["token"][1:].tolist()
    assert found["next_token"].isna().tolist() == found["logp_clean"].isna().tolist()
    assert (found["kl"][: at[0]] == 0).all() and found["kl"].max() > 1e-4


def test_inactive_latent_has_no_effect(run: Path, tiny_model: Model) -> None:
    fired = set(prompts.features_of(TEXT, run, tiny_model)["feature"])
    inactive = next(feature for feature in range(load(run).d_sae) if feature not in fired)
    found = ablate(TEXT, inactive, run, tiny_model)
    assert (found["kl"] == 0).all()
    assert (found["difference"][:-1] == 0).all()


def test_several_strengths_equal_single_calls(run: Path, tiny_model: Model, hook: str) -> None:
    [feature] = top_latents(run, tiny_model, 1)
    swept = steer(TEXT, feature, run, tiny_model, strength=(0.5, 8), mode="clamp", new_tokens=3)
    length = ids(tiny_model).shape[1]
    assert swept.effects["strength"].tolist() == [0.5] * length + [8] * length
    assert swept.texts["strength"].tolist() == [0.5, 8]
    for strength, effects in swept.effects.groupby("strength"):
        alone = steer(TEXT, feature, run, tiny_model, strength=strength, mode="clamp", new_tokens=3)
        np.testing.assert_array_equal(effects["kl"], alone.effects["kl"])
        assert alone.texts["steered"].tolist() == [swept.texts.set_index("strength")["steered"][strength]]
    off = steer(TEXT, feature, run, tiny_model, strength=0, mode="scale", new_tokens=0)
    ablated = ablate(TEXT, feature, run, tiny_model)
    assert off.effects.drop(columns="strength").equals(ablated)
    assert off.texts[["clean", "steered"]].to_numpy().tolist() == [["", ""]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_uses_the_edited_model_and_repeats(
    run: Path, tiny_model: Model, hook: str, temperature: float
) -> None:
    [feature] = top_latents(run, tiny_model, 1)

    def write(strength: float, seed: int = 0) -> Any:
        return steer(
            TEXT, feature, run, tiny_model,
            strength=strength, new_tokens=12, temperature=temperature, seed=seed,
        ).texts.iloc[0]  # fmt: skip

    steered = write(60)
    assert steered.equals(write(60))
    assert steered["steered"] != steered["clean"]
    assert write(0)["steered"] == steered["clean"]  # the same random numbers for both
    if temperature:
        assert write(60, seed=1)["clean"] != steered["clean"]


def test_greedy_generation_equals_manual_steps(run: Path, tiny_model: Model, hook: str) -> None:
    [feature] = top_latents(run, tiny_model, 1)
    sae, vocab = load(run), tiny_model.token_bytes()

    def push(x_BTD: Tensor) -> Tensor:
        moved = x_BTD.clone()
        moved[:, 1:] += 9 * sae.W_dec[feature]
        return moved

    now = ids(tiny_model)
    with torch.no_grad():
        for _ in range(8):
            new = tiny_model.logits(now, edit={hook: push})[0, -1].argmax()
            now = torch.cat([now, new.view(1, 1)], dim=1)
    expected = b"".join(vocab[i] for i in now[0, ids(tiny_model).shape[1] :]).decode("utf-8", "replace")
    got = steer(TEXT, feature, run, tiny_model, strength=9, new_tokens=8)
    assert got.texts["steered"].tolist() == [expected]


@pytest.mark.parametrize(
    ("positions", "edited"),
    [(None, {1, 2, 3, 4, 5, 6}), (slice(2, None), {2, 3, 4, 5, 6}), (slice(0, None, 3), {0, 3, 6}),
     (slice(2, 4), {2, 3}), ([1], {1}), (-1, {3})],
)  # fmt: skip
def test_open_positions_include_generated_tokens(
    run: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, positions: Any, edited: set[int]
) -> None:
    kept: list[Tensor] = []
    real = splice.replace_at
    monkeypatch.setattr(splice, "replace_at", lambda keep, new: kept.append(keep) or real(keep, new))
    text = "etc:"
    assert len(tiny_model.tokens.encode(text)) == 4
    monkeypatch.setattr(tiny_model.tokens, "separator", -1)  # no token ends the text early
    steer(text, 0, run, tiny_model, strength=1, positions=positions, new_tokens=4)
    for keep in kept:
        length = keep.shape[1]
        assert set(keep[0].nonzero()[:, 0].tolist()) == {p for p in edited if p < length}
    assert {keep.shape[1] for keep in kept} == {4, 5, 6, 7}


def test_end_of_text_token_ends_generation(
    run: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = int(tiny_model.logits(ids(tiny_model))[0, -1].argmax())
    monkeypatch.setattr(tiny_model.tokens, "separator", first)
    texts = steer(TEXT, 0, run, tiny_model, strength=0).texts
    assert texts[["clean", "steered"]].to_numpy().tolist() == [["", ""]]


def test_next_tokens_are_the_most_likely_of_both_predictions(run: Path, tiny_model: Model, hook: str) -> None:
    [feature] = top_latents(run, tiny_model, 1)
    found = steer(TEXT, feature, run, tiny_model, strength=[0, 40], new_tokens=0).next_tokens
    sae, last = load(run), len(ids(tiny_model)[0]) - 1

    def more(z_TM: Tensor) -> Tensor:
        z_TM[:, feature] += 40
        return z_TM

    clean = tiny_model.logits(ids(tiny_model))[0, -1].log_softmax(-1)
    edited = by_hand(sae, tiny_model, hook, list(range(1, last + 1)), more)[-1]
    steered = found[found["strength"] == 40]
    assert set(steered["token"]) == {*clean.topk(10).indices.tolist(), *edited.topk(10).indices.tolist()}
    np.testing.assert_allclose(steered["logp_clean"], clean[steered["token"].tolist()], atol=1e-5)
    np.testing.assert_allclose(steered["logp_steered"], edited[steered["token"].tolist()], atol=1e-4)
    assert steered["difference"].is_monotonic_decreasing
    assert (found.loc[found["strength"] == 0, "difference"] == 0).all()


def test_exception_in_on_token_ends_steer(run: Path, tiny_model: Model) -> None:
    seen: list[int] = []

    def on_token() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        steer(TEXT, 0, run, tiny_model, strength=[1, 2], new_tokens=9, on_token=on_token)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strength": float("nan")}, "strength is nan; give a number between"),
        ({"strength": [1, float("inf")]}, "strength is inf"),
        ({"strength": []}, "strength is empty"),
        ({"strength": None}, "strength is None; give a number or several"),
        ({"strength": 1e39}, "strength is 1e\\+39; give a number between"),
        ({"strength": 3e38, "features": range(96)}, r"with strength 3e\+38 .* NaN or infinity"),
        ({"mode": "multiply"}, "mode is 'multiply'; give 'add', 'clamp', 'scale'"),
        ({"new_tokens": -1}, "new_tokens is -1; it must be at least 0"),
        ({"new_tokens": 1.5}, "new_tokens is 1.5; give a whole number"),
        ({"new_tokens": 60}, r"and 60 new ones, but .* at most 64; shorten it or lower new_tokens"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"features": 96}, "feature is 96, but the SAE has 96 latents"),
        ({"positions": 99}, "position 99 is outside the text"),
        ({"positions": slice(40, 50)}, r"includes none of the \d+ tokens"),
        ({"text": "a", "new_tokens": 0}, r"one token.* positions=\[0\]"),
        ({"text": ""}, "has no token"),
    ],
)
def test_invalid_arguments_raise_user_error(
    run: Path, tiny_model: Model, settings: dict[str, Any], sentence: str
) -> None:
    feature = top_latents(run, tiny_model, 1)
    settings = {"text": TEXT, "features": feature, "strength": 1.0, "new_tokens": 2, **settings}
    with pytest.raises(UserError, match=sentence):
        steer(sae=run, model=tiny_model, **settings)


def test_single_token_can_be_edited_when_given(run: Path, tiny_model: Model) -> None:
    with pytest.raises(UserError, match=r"positions=\[0\]"):
        ablate("a", 0, run, tiny_model)
    assert ablate("a", 0, run, tiny_model, positions=0)["edited"].tolist() == [True]
    steer("a", 0, run, tiny_model, strength=1)  # edits what it generates
