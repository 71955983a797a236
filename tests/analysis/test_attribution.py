"""logit_attribution against finite differences and manual edits of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.analysis.attribution import logit_attribution
from saebench.analysis.prompts import features_of
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import SAE
from saebench.sources.models import Model
from saebench.store.text import token_text

TEXT = "The Congress of the United States"
TARGET, AGAINST = 70, 290
LAST = "blocks.1.hook_resid_post"


def ids(model: Model) -> Tensor:
    return torch.tensor([model.tokens.encode(TEXT)])


def score_of(model: Model, edit: dict[str, Callable[[Tensor], Tensor]] | None = None, at: int = -1) -> float:
    logits_V = model.logits(ids(model), edit=edit)[0, at].double()
    return float(logits_V[TARGET] - logits_V[AGAINST])


def scaled(sae: SAE, feature: int, pos: int, factor: float) -> Callable[[Tensor], Tensor]:
    """The model with the SAE and its error term spliced in, and one value of the codes multiplied."""

    def edit(x_BTD: Tensor) -> Tensor:
        z_TM = sae.encode(x_BTD[0]).to_dense()
        error_TD = x_BTD[0] - (z_TM @ sae.W_dec + sae.b_dec)
        z_TM[pos, feature] *= factor
        return (z_TM @ sae.W_dec + sae.b_dec + error_TD)[None]

    return torch.no_grad()(edit)


@pytest.mark.parametrize("name", ["topk", "mutual-choice", "matching-pursuit"])
@pytest.mark.parametrize(
    "place", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"]
)
def test_gradient_attribution_equals_finite_differences(
    make_sae: Callable[[str], SAE], tiny_model: Model, place: str, name: str
) -> None:
    sae, at = make_sae(name), 9
    found = logit_attribution(
        TEXT, sae, tiny_model, place, target=TARGET, against=AGAINST, position=at, keep_first=True
    )
    assert found.score == pytest.approx(score_of(tiny_model, at=at), abs=1e-5)
    largest, step = found.latents.head(5), 0.05
    for row in largest.itertuples():
        more, less = (
            score_of(tiny_model, {place: scaled(sae, row.feature, row.pos, 1 + sign * step)}, at)
            for sign in (1, -1)
        )
        assert (more - less) / (2 * step) == pytest.approx(row.attribution, rel=1e-2)
    assert largest["attribution"].abs().is_monotonic_decreasing


@pytest.mark.parametrize("by", ["gradient", "direct"])
def test_check_equals_manual_ablation(run: Path, tiny_model: Model, hook: str, by: str) -> None:
    plain = logit_attribution(TEXT, run, tiny_model, target=TARGET, against=AGAINST, by=by)
    assert plain.correlation is None
    found = logit_attribution(TEXT, run, tiny_model, target=TARGET, against=AGAINST, by=by, check=4)
    assert found.latents.drop(columns="effect").equals(plain.latents)
    tried, sae = found.latents.head(4), load(run)
    for row in tried.itertuples():
        without = score_of(tiny_model, {hook: scaled(sae, row.feature, row.pos, 0)})
        assert row.effect == pytest.approx(score_of(tiny_model) - without, abs=2e-6)
    assert found.latents["effect"].isna().tolist() == [False] * 4 + [True] * (len(found.latents) - 4)
    expected = np.corrcoef(tried["attribution"], tried["effect"])[0, 1]
    assert found.correlation == pytest.approx(expected)
    assert expected > 0.9 or by == "direct"
    of_all = logit_attribution(TEXT, run, tiny_model, target=TARGET, by=by, position=2, check=99)
    assert of_all.latents["effect"].notna().all()


@pytest.mark.parametrize("against", [AGAINST, None])
@pytest.mark.parametrize("place", ["blocks.0.hook_resid_post", LAST])
def test_direct_attribution_equals_unembedding_with_frozen_norm(
    run: Path, tiny_model: Model, tiny_model_folder: Path, place: str, against: int | None
) -> None:
    from transformers import GPT2LMHeadModel

    gpt2, sae, at = GPT2LMHeadModel.from_pretrained(tiny_model_folder), load(run), 5
    found = logit_attribution(
        TEXT, sae, tiny_model, place, target=TARGET, against=against, by="direct", position=at
    )
    seen = tiny_model.run_to(ids(tiny_model), [place, LAST])
    norm, W_U_VD, last_D = gpt2.transformer.ln_f, gpt2.lm_head.weight, seen[LAST][0, at]
    other_D = W_U_VD.mean(0) if against is None else W_U_VD[against]
    with torch.no_grad():
        scale = (last_D.var(correction=0) + norm.eps).sqrt()
        z_M = sae.encode(seen[place][0, at]).to_dense()
        for row in found.latents.itertuples():
            written_D = z_M[row.feature] * sae.W_dec[row.feature]
            read_D = norm.weight * (written_D - written_D.mean()) / scale
            assert row.attribution == pytest.approx(float(read_D @ (W_U_VD[TARGET] - other_D)), abs=1e-5)
    assert set(found.latents["feature"]) == set(z_M.nonzero()[:, 0].tolist())
    assert found.latents["pos"].unique().tolist() == [at]
    logits_V = tiny_model.logits(ids(tiny_model))[0, at]
    expected = logits_V[TARGET] - (logits_V.mean() if against is None else logits_V[against])
    assert found.score == pytest.approx(float(expected), abs=1e-5)


def test_rows_are_the_latents_that_fire_up_to_the_position(run: Path, tiny_model: Model) -> None:
    fires = features_of(TEXT, run, tiny_model).set_index(["pos", "feature"])["value"]
    for keep_first in (False, True):
        found = logit_attribution(
            TEXT, run, tiny_model, target=TARGET, position=-4, keep_first=keep_first
        ).latents
        at = ids(tiny_model).shape[1] - 4
        wanted = fires[[int(not keep_first) <= pos <= at for pos, _ in fires.index]]
        got = found.set_index(["pos", "feature"])["value"].sort_index()
        assert got.equals(wanted.sort_index())


def test_tokens_as_strings_equal_their_ids(run: Path, tiny_model: Model) -> None:
    [a], [b] = (tiny_model.tokens.encode(text) for text in "ab")
    by_id = logit_attribution(TEXT, run, tiny_model, target=a, against=np.int64(b))  # type: ignore[arg-type]
    by_name = logit_attribution(TEXT, run, tiny_model, target="a", against="b")
    assert by_name.latents.equals(by_id.latents)
    assert by_name.score == by_id.score


def test_default_target_is_the_predicted_token(run: Path, tiny_model: Model) -> None:
    predicted = int(tiny_model.logits(ids(tiny_model))[0, -3].argmax())
    found = logit_attribution(TEXT, run, tiny_model, position=-3)
    named = logit_attribution(TEXT, run, tiny_model, position=-3, target=predicted)
    assert found.latents.equals(named.latents)
    assert found.target == named.target == token_text(tiny_model.token_bytes()[predicted])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target": "a#"}, "target is 'a#', which is 2 tokens \\('a', '#'\\); give exactly one, or an id"),
        ({"against": "#" * 9}, r"against is '#########', which is 9 tokens \('#', .*, \.\.\.\)"),
        ({"target": ""}, "target is '', which is empty; give exactly one"),
        ({"target": 400}, "target is 400, which is not a token id of .*; give 0 to 399"),
        ({"target": -1}, "target is -1"),
        ({"target": 1.5}, "target is 1.5; give a token as a string, or its id"),
        ({"target": 9, "against": 9}, r"target and against are both token 9"),
        ({"position": 99}, "position 99 is outside the text"),
        ({"position": [1, 2]}, r"position is \[1, 2\]; give one whole number"),
        ({"position": 0}, "position is 0, .* keep_first=True"),
        ({"by": "logits"}, "by is 'logits'; give 'gradient' or 'direct'"),
        ({"check": -1}, "check is -1"),
        ({"check": 2.0}, "check is 2.0"),
        ({"by": "direct", "hook": "blocks.1.attn.hook_z"}, r"hook_z is not in the residual .* by='gradient'"),
        ({"text": ""}, "has no token"),
    ],
)
def test_invalid_arguments_raise_user_error(
    run: Path, tiny_model: Model, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        logit_attribution(**{"text": TEXT, "sae": run, "model": tiny_model, "target": 3, **settings})
