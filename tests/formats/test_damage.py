"""Importing damaged or unsupported SAELens folders fails with one sentence and writes no SAE."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.core.errors import UserError
from saebench.formats import import_sae
from tests.formats.saelens_folders import D_IN, K, write_folder


def damaged(folder, change):
    write_folder(folder, "topk", k=K)
    config, file = json.loads((folder / "cfg.json").read_text()), folder / "sae_weights.safetensors"
    change(folder, config, file)
    if (folder / "cfg.json").exists() and isinstance(config, dict):
        (folder / "cfg.json").write_text(json.dumps(config))


def without(name):
    def change(folder, config, file):
        save_file({n: t for n, t in load_file(file).items() if n != name}, file)

    return change


def with_tensor(name, tensor):
    def change(folder, config, file):
        save_file(load_file(file) | {name: tensor}, file)

    return change


def setting(**settings):
    def change(folder, config, file):
        config.update(settings)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder, config, file: (folder / "cfg.json").unlink(), "cfg.json does not exist"),
        (lambda folder, config, file: file.unlink(), "does not exist; copy the whole folder"),
        (lambda folder, config, file: file.write_bytes(file.read_bytes()[:-9]), "damaged"),
        (lambda folder, config, file: file.write_bytes(b"\x80\x04}."), "damaged"),
        (without("b_enc"), "no tensor 'b_enc'"),
        (with_tensor("running_freq", torch.ones(3)), "holds 'running_freq'"),
        (with_tensor("W_dec", torch.ones(3)), "W_dec has shape"),
        (with_tensor("b_dec", torch.full((D_IN,), torch.nan)), "not finite"),
        (with_tensor("b_dec", torch.ones(D_IN, dtype=torch.int32)), "floating-point"),
        (with_tensor("scaling_factor", torch.full((D_IN,), 2.0)), "fine-tuned factor"),
        (setting(architecture="temporal"), "'temporal'; saebench reads topk, "),
        (setting(architecture=None), "architecture None"),
        (setting(normalize_activations="covariance_whitening"), "'covariance_whitening'; saebench reads"),
        (setting(normalize_activations="constant_scalar_rescale"), "'constant_scalar_rescale'; saebench re"),
        (
            setting(normalize_activations="expected_average_only_in"),
            "activation_scaler.json with the factor is missing",
        ),
        (setting(d_in=D_IN + 1), "W_dec has shape"),
        (setting(d_sae=-1), "d_sae is -1"),
        (setting(d_sae="many"), "'d_sae' in .* is 'many'"),
        (setting(k=None), "cfg.json has no k"),
        (setting(k=0), "k is 0"),
        (setting(k=3.7), r"k in cfg.json is 3\.7; a topk SAE needs a whole number"),
        (setting(k=float("nan")), "k in cfg.json is nan"),
        (setting(k=float("inf")), "k in cfg.json is inf"),
        (setting(architecture=["topk"]), r"architecture \['topk'\]"),
        (setting(d_in=10**12), "W_dec has shape"),
        (setting(metadata=[]), "is not the description of an SAE"),
        (setting(metadata={}, activation_fn_str="tanh-relu"), "activation function 'tanh-relu'"),
    ],
)
def test_unreadable_folder_is_refused_with_one_sentence(change, sentence, tmp_path):
    damaged(tmp_path / "theirs", change)
    with pytest.raises(UserError, match=sentence) as refused:
        import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ours" / "sae.json").exists()


@pytest.mark.parametrize("scale", ["[]", '{"scaling_factor": null}', '{"scaling_factor": 0}', "{"])
def test_invalid_input_scale_is_refused(scale, tmp_path):
    write_folder(tmp_path / "theirs", "topk", k=K, normalize_activations="expected_average_only_in")
    (tmp_path / "theirs" / "activation_scaler.json").write_text(scale)
    with pytest.raises(UserError, match=r"scaling_factor|damaged"):
        import_sae(tmp_path / "theirs", out=tmp_path / "ours")


def test_metadata_that_is_not_plain_is_not_imported(tmp_path):
    write_folder(tmp_path / "theirs", "topk", k=K, metadata={"l0": float("nan"), "model_name": {"a": 1}})
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    facts = json.loads((tmp_path / "ours" / "sae.json").read_text())["imported"]
    assert "l0" not in facts and "model_name" not in facts
