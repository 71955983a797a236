"""features_of and compare_prompts equal encoding the model's activations directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.analysis.prompts import compare_prompts, features_of
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import SAE
from saebench.saes.registry import ARCHITECTURES
from saebench.sources.models import Model

TEXT, OTHER = "The Congress of the United States", "the people, and their peace"


def codes(sae: SAE, model: Model, hook: str, text: str) -> Tensor:
    """Dense activations [T, d_sae], computed directly."""
    ids = torch.tensor([model.tokens.encode(text)])
    with torch.no_grad():
        return sae.encode(model.run_to(ids, [hook])[hook][0]).to_dense()


def dense(frame: pd.DataFrame, shape: torch.Size) -> Tensor:
    values = torch.zeros(shape)
    pos, feature, value = (torch.tensor(frame[name].tolist()) for name in ("pos", "feature", "value"))
    values[pos, feature] = value
    return values


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_equal_direct_encoding(make_sae, tiny_model: Model, hook: str, name: str) -> None:
    sae = make_sae(name)
    found = features_of(TEXT, sae, tiny_model, hook)
    expected = codes(sae, tiny_model, hook, TEXT)
    assert len(found) == int((expected != 0).sum()) > 0
    assert torch.equal(dense(found, expected.shape), expected)


def test_run_directory_gives_hook_and_model(run: Path, tiny_model: Model, hook: str) -> None:
    found = features_of(TEXT, run)
    pd.testing.assert_frame_equal(found, features_of(TEXT, load(run), tiny_model, hook))
    pd.testing.assert_frame_equal(found, features_of(TEXT, str(run), tiny_model.name))


def test_rows_are_sorted_and_spell_the_text(run: Path, tiny_model: Model) -> None:
    found = features_of(TEXT, run, tiny_model)
    assert found.columns.tolist() == ["pos", "token", "feature", "value", "first"]
    order = found.sort_values(["pos", "value"], ascending=[True, False], ignore_index=True)
    pd.testing.assert_frame_equal(found, order)
    assert "".join(found.drop_duplicates("pos")["token"]) == TEXT
    assert (found["first"] == (found["pos"] == 0)).all()


def test_top_keeps_the_largest_values_per_token(run: Path, tiny_model: Model) -> None:
    found, top = features_of(TEXT, run, tiny_model), features_of(TEXT, run, tiny_model, top=2)
    for pos, rows in top.groupby("pos"):
        assert rows["value"].tolist() == found[found["pos"] == pos]["value"].nlargest(2).tolist()
    assert top["pos"].nunique() == found["pos"].nunique()


def test_partial_characters_are_shown_as_bytes(run: Path, tiny_model: Model) -> None:
    found = features_of("a☃", run, tiny_model).drop_duplicates("pos")
    assert found["token"].tolist() == ["a", r"\xe2", r"\x98", r"\x83"]


def test_bos_follows_the_cache_or_the_argument(
    run: Path, tiny_model: Model, tiny_cache: ActivationCache
) -> None:
    assert tiny_cache.manifest["made_from"]["settings"]["bos"] is False
    with_bos = features_of("a", run, tiny_model, bos=True).drop_duplicates("pos")
    assert with_bos["token"].tolist() == ["<|endoftext|>", "a"]
    assert with_bos["first"].tolist() == [True, False]


@pytest.mark.parametrize("by", ["max", "mean"])
@pytest.mark.parametrize("keep_first", [False, True])
def test_compare_prompts_equals_two_calls(
    run: Path, tiny_model: Model, hook: str, by: str, keep_first: bool
) -> None:
    found = compare_prompts(TEXT, OTHER, run, tiny_model, by=by, keep_first=keep_first)
    a, b = (codes(load(run), tiny_model, hook, text)[int(not keep_first) :] for text in (TEXT, OTHER))
    fires = ((a != 0).any(0) | (b != 0).any(0)).nonzero()[:, 0].tolist()
    assert sorted(found["feature"]) == fires
    for name, side in (("a", a), ("b", b)):
        side = side[:, found["feature"].tolist()]
        np.testing.assert_array_equal(found[f"max_{name}"], side.amax(0))
        np.testing.assert_allclose(found[f"mean_{name}"], side.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found["difference"], found[f"{by}_b"] - found[f"{by}_a"])
    assert found["difference"].abs().is_monotonic_decreasing
    assert (compare_prompts(TEXT, TEXT, run, tiny_model)["difference"] == 0).all()


def test_invalid_arguments_raise_user_error(run: Path, tiny_model: Model) -> None:
    with pytest.raises(UserError, match="top is 0; it must be at least 1"):
        features_of(TEXT, run, tiny_model, top=0)
    with pytest.raises(UserError, match="by is 'median'; give 'max' or 'mean'"):
        compare_prompts(TEXT, OTHER, run, tiny_model, by="median")
    with pytest.raises(UserError, match=r"prompt b is 'a', one token.* keep_first=True"):
        compare_prompts(TEXT, "a", run, tiny_model)
    compare_prompts(TEXT, "a", run, tiny_model, keep_first=True)
