"""The SAE, model and hook that arguments name, and the errors when they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from saebench.analysis.attach import attach, check_features, check_positions
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.sources.models import Model, load_model


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Model:
    """The tiny model with another epsilon, and therefore another hash."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    return load_model(str(folder))


def test_other_model_than_trained_on_raises_user_error(run: Path, other_model: Model, hook: str) -> None:
    for model in (other_model, other_model.name):
        with pytest.raises(UserError, match=r"is not the one that .* was trained on"):
            attach(run, model)
    assert attach(load(run), other_model, hook).model is other_model


def test_every_path_type_names_a_run(run: Path, tiny_model: Model, hook: str) -> None:
    """A finished training, as train returns it, is one."""

    class Finished:
        def __fspath__(self) -> str:
            return str(run)

    for named in (run, str(run), Finished()):
        attached = attach(named, tiny_model)  # type: ignore[arg-type]
        assert attached.hook == hook and attached.sae.d_sae == load(run).d_sae


def test_sae_in_memory_without_model_or_hook_raises_user_error(
    run: Path, tiny_model: Model, hook: str
) -> None:
    sae = load(run)
    with pytest.raises(UserError, match=r"the hook that .*site=\.\.\."):
        attach(sae, tiny_model)
    with pytest.raises(UserError, match=r"the model that .*model=\.\.\."):
        attach(sae, site=hook)
    with pytest.raises(UserError, match="the call of attach has both site and hook"):
        attach(sae, hook=hook, site=hook)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("blocks.0.hook_resid_pots", "did you mean blocks.0.hook_resid_post"),
        ("blocks.7.hook_resid_post", "beyond the 2 layers"),
        ("blocks.0.mlp.hook_post", r"reads 32 dimensions but blocks\.0\.mlp\.hook_post .* has 128"),
    ],
)
def test_hook_of_other_width_raises_user_error(
    run: Path, tiny_model: Model, place: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(run, tiny_model, place)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "text is '', which has no token"),
        (None, "text is None, which is not a string"),
        ("a\ud800", "not valid Unicode"),
        ("peace " * 80, r"text has \d+ tokens, but .* reads at most 64; shorten it"),
    ],
)
def test_invalid_texts_raise_user_error(run: Path, tiny_model: Model, text: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(run, tiny_model).read(text)


def test_arguments_of_wrong_type_raise_user_error(run: Path, tiny_model: Model, tmp_path: Path) -> None:
    for sae, sentence in ((tmp_path, "sae.json"), (7, "sae is 7; give a run directory")):
        with pytest.raises(UserError, match=sentence):
            attach(sae, tiny_model)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model is None; give a name"):
        attach(run, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("recorded", [True, False])
def test_prompts_begin_with_bos_as_the_contexts_of_the_training_did(
    tmp_path: Path, run: Path, tiny_model: Model, recorded: bool
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    description = json.loads((copy / "sae.json").read_text())
    (copy / "sae.json").write_text(json.dumps({**description, "contexts": {"ctx": 32, "bos": recorded}}))
    expected = tiny_model.tokens.bos if recorded else None
    assert attach(copy, tiny_model).bos == expected
    assert attach(copy, tiny_model, bos=not recorded).bos != expected


@pytest.mark.parametrize(
    ("positions", "expected"),
    [(None, [1, 2, 3, 4]), (0, [0]), ([-1, 1, 1], [1, 4]), (slice(None), [0, 1, 2, 3, 4]),
     (slice(-2, None), [3, 4]), (slice(None, None, -2), [0, 2, 4]), (slice(7, 9), []), (range(2), [0, 1])],
)  # fmt: skip
def test_positions_are_sorted_and_resolved(positions: Any, expected: list[int]) -> None:
    assert check_positions(positions, 5) == expected


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [(5, "position 5 is outside the text, which has 5 tokens; give 0 to 4"), ([0, -6], "position -6"),
     (1.5, "positions is 1.5; give whole numbers"), ("ab", "give whole numbers")],
)  # fmt: skip
def test_invalid_positions_raise_user_error(positions: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_positions(positions, 5)


@pytest.mark.parametrize(
    ("features", "sentence"),
    [(96, "feature is 96, but the SAE has 96 latents; give 0 to 95"), ([3, -1], "feature is -1"),
     ([], "features is empty"), ("topk", "give whole numbers"), (0.5, "features is 0.5")],
)  # fmt: skip
def test_invalid_features_raise_user_error(run: Path, features: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_features(features, load(run))
