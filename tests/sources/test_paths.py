"""Which path serves a hook, native or TransformerLens's bridge, and what is recorded of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError
from saebench.core.journal import Journal
from saebench.sources import families
from saebench.sources.models import load_model, peek_model
from tests.conftest import TINY_VOCABULARY

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, TINY_VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(str(tiny_model_folder))


@pytest.fixture
def no_families(monkeypatch):
    """Every model goes through TransformerLens, as in version 0.1."""
    monkeypatch.setattr(families, "FAMILIES", {})


@pytest.fixture
def settings(tiny_model_folder, tiny_text, tmp_path):
    return {
        "model": str(tiny_model_folder),
        "text": str(tiny_text),
        "site": (HOOK,),
        "tokens": 300,
        "ctx": 32,
        "dtype": "fp32",
        "quiet": True,
        "out": tmp_path / "cache",
    }


def test_the_bridge_is_loaded_only_for_a_hook_that_the_table_lacks(tiny_model_folder, tokens_BT):
    model = load_model(str(tiny_model_folder))
    model.run_to(tokens_BT, [HOOK, "blocks.0.attn.hook_q"])
    model.logits(tokens_BT, edit={HOOK: torch.zeros_like})
    model.unembedding()
    assert "bridge" not in vars(model._bridge_path)
    assert model.path_of("blocks.1.ln1.hook_normalized") == "bridge"
    own = {parameter.data_ptr() for parameter in model.module.parameters()}
    shared = model._bridge_path.bridge.original_model.get_output_embeddings().weight
    assert shared.data_ptr() in own
    found = model.run_to(tokens_BT, [HOOK, "ln_final.hook_scale"])
    torch.testing.assert_close(found["ln_final.hook_scale"][..., 0], model.final_scale(tokens_BT))


def test_a_model_without_a_family_is_read_through_the_bridge(
    tiny_model_folder, tokens_BT, model, no_families
):
    bridged = load_model(str(tiny_model_folder))
    assert bridged.path_of(HOOK) == bridged.info.path_of(HOOK) == "bridge" and model.path_of(HOOK) == "native"
    for hook in (HOOK, "blocks.1.hook_resid_mid", "blocks.1.hook_attn_in", "blocks.1.hook_mlp_in"):
        edit = {hook: lambda x: 2 * x}
        for call in (
            lambda m, hook=hook: m.run_to(tokens_BT, [hook])[hook],
            lambda m, edit=edit: m.logits(tokens_BT, edit=edit),
            lambda m, hook=hook: m.gradients(tokens_BT, torch.tensor([9, 5]), [hook])[1][hook],
        ):
            torch.testing.assert_close(call(bridged), call(model), rtol=1e-3, atol=1e-5, msg=hook)
    torch.testing.assert_close(bridged.unembedding(), model.unembedding())
    path = bridged.run_to(tokens_BT, ["transformer.h.1"])["transformer.h.1"]
    torch.testing.assert_close(path, bridged.run_to(tokens_BT, [HOOK])[HOOK], rtol=1e-4, atol=1e-5)


def test_a_site_may_be_named_by_module_path(model, tokens_BT):
    pairs = {
        "transformer.h.1.mlp": "blocks.1.hook_mlp_out",
        "transformer.h.1.mlp:in": "blocks.1.mlp.hook_in",
        "transformer.h.0:0": "blocks.0.hook_resid_post",
        "transformer.wte": "hook_embed",
    }
    found = model.run_to(tokens_BT, [*pairs, *pairs.values()])
    _, gradients = model.gradients(tokens_BT, torch.tensor([9, 9]), list(found))
    for path, hook in pairs.items():
        peek_model(str(model.info.folder)).check_hook(path)
        assert model.residual_hook(path) == model.residual_hook(hook)
        assert model.path_of(path) == "native"
        assert torch.equal(found[path], found[hook]) and torch.equal(gradients[path], gradients[hook])
        zeroed = model.logits(tokens_BT, edit={path: torch.zeros_like})
        assert torch.equal(zeroed, model.logits(tokens_BT, edit={hook: torch.zeros_like}))
    for check in (model.info.check_hook, model.check_hook):
        with pytest.raises(UserError, match="did you mean"):
            check("transformer.h.7.mlp")
    with pytest.raises(UserError, match="cannot be replaced in one forward pass"):
        model.logits(
            tokens_BT,
            edit={"transformer.wte": torch.zeros_like, "blocks.1.ln1.hook_normalized": torch.zeros_like},
        )


def test_edits_on_both_paths_take_effect_in_one_pass(model, tokens_BT):
    both = {HOOK: lambda x: x + 1, "ln_final.hook_normalized": torch.zeros_like}
    logits = model.logits(tokens_BT, edit=both)
    torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits))


def test_config_without_architectures_loads_by_its_model_type(
    tiny_model_folder, tmp_path, tokens_BT, request
):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).hook_dim("blocks.1.ln1.hook_normalized") == 32
    request.getfixturevalue("no_families")
    assert load_model(str(folder)).hook_dim(HOOK) == 32


def test_manifest_records_the_path_and_caches_of_version_0_1_open(settings, monkeypatch):
    cache = sb.harvest(**settings)
    assert cache.manifest["made_from"]["model"]["paths"] == {HOOK: "native"}
    with monkeypatch.context() as patched:
        patched.setattr(families, "FAMILIES", {})
        old = sb.harvest(**{**settings, "out": settings["out"].with_name("old")})
    assert "paths" not in old.manifest["made_from"]["model"]
    torch.testing.assert_close(old.activations(), cache.activations(), rtol=1e-4, atol=1e-5)
    assert sb.harvest(**{**settings, "out": old.path}).hash == old.hash

    identity = old.manifest["made_from"]
    shutil.rmtree(old.path)
    old.path.mkdir()
    Journal(old.path / "journal.json", [{"identity": identity}]).close()
    with pytest.raises(UserError, match=rf"begun by a version of saebench that read {HOOK} in another way"):
        sb.harvest(**{**settings, "out": old.path})
