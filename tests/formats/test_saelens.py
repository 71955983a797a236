"""Imported SAELens folders compute what SAELens computes; exported SAEs survive a round trip."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.cli import main
from saebench.core.errors import UserError
from saebench.evaluation import evaluate
from saebench.formats import export_sae, import_sae
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.store import index
from saebench.training import train
from tests.conftest import TINY_HOOKS
from tests.formats.saelens_folders import (
    D_IN,
    D_SAE,
    K,
    dense_codes,
    dense_pursuit,
    random_sae,
    rows,
    write_folder,
)

OURS = {"topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "standard": "relu", "gated": "gated"}
BY_NORM = {"rescale_acts_by_decoder_norm": True}
RAW = {"apply_b_dec_to_input": False}


def settings_of(name):
    return {"k": K} if name in ("topk", "batchtopk") else {}


@pytest.mark.parametrize("raw", [{}, RAW])
@pytest.mark.parametrize(
    ("name", "by_norm"),
    [("topk", True), ("topk", False), ("batchtopk", True), ("batchtopk", False)]
    + [(name, False) for name in ("jumprelu", "standard", "gated")],
)
def test_imported_sae_computes_what_saelens_computes(name, by_norm, raw, tmp_path):
    settings = {**settings_of(name), **raw}
    if name in ("topk", "batchtopk"):
        settings["rescale_acts_by_decoder_norm"] = by_norm
    weights = write_folder(tmp_path / "theirs", name, **settings)
    codes_NM, x_hat_ND = dense_codes(weights, rows(), architecture=name, subtract=not raw, by_norm=by_norm)
    made = import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K)
    sae = load(tmp_path / "ours")
    assert made.sae == sae.spec.name == OURS[name] and sae.k == K
    torch.testing.assert_close(sae(rows()).double(), x_hat_ND, rtol=1e-5, atol=1e-5)
    unit = not (name == "topk" and not by_norm)
    norm_M = weights["W_dec"].norm(dim=1)
    expected_NM = codes_NM * norm_M if unit and not by_norm else codes_NM
    torch.testing.assert_close(sae.encode(rows()).to_dense().double(), expected_NM, rtol=1e-5, atol=1e-5)
    if unit:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    else:
        torch.testing.assert_close(sae.W_dec.norm(dim=1).double(), norm_M)
    assert bool(made.notes) is not unit


def test_batchtopk_selects_by_decoder_norm_by_default(tmp_path):
    weights = write_folder(tmp_path / "theirs", "batchtopk", k=K)
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    _, x_hat_ND = dense_codes(weights, rows(), architecture="batchtopk", by_norm=True)
    torch.testing.assert_close(load(tmp_path / "ours")(rows()).double(), x_hat_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "jumprelu", "standard", "gated"])
def test_input_scale_of_checkpoint_is_folded_into_weights(name, tmp_path):
    scale = 3.5
    settings = {"normalize_activations": "expected_average_only_in", **settings_of(name)}
    weights = write_folder(tmp_path / "theirs", name, **settings)
    (tmp_path / "theirs" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K)
    _, x_hat_ND = dense_codes(weights, scale * rows(), architecture=name)
    torch.testing.assert_close(
        load(tmp_path / "ours")(rows()).double(), x_hat_ND / scale, rtol=1e-5, atol=1e-5
    )


def test_folder_from_before_version_6_is_read_with_its_old_settings(tmp_path):
    weights = write_folder(tmp_path / "theirs", "standard")
    ones = {"scaling_factor": torch.ones(D_IN)}
    file = tmp_path / "theirs" / "sae_weights.safetensors"
    save_file(load_file(file) | ones, file)
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "hook_point": "blocks.3.hook_resid_pre",
        "model_name": "gpt2-small",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "finetuning_scaling_factor": False,
    }
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(old))
    assert import_sae(tmp_path / "theirs", out=tmp_path / "ours").sae == "topk"
    _, x_hat_ND = dense_codes(weights, rows(), architecture="topk")
    torch.testing.assert_close(load(tmp_path / "ours")(rows()).double(), x_hat_ND, rtol=1e-5, atol=1e-5)
    facts = json.loads((tmp_path / "ours" / "sae.json").read_text())
    assert facts["hook_name"] == "blocks.3.hook_resid_pre"
    assert facts["imported"]["model_name"] == "gpt2-small"


@pytest.mark.parametrize(
    ("settings", "metadata", "k", "expected", "noted"),
    [
        ({}, {"l0": 6.6}, None, 7, False),
        ({}, {"l0": 6.6}, 3, 3, False),
        ({}, {"training_architecture_details": {"k": 9.0}}, None, 9, False),
        ({}, {}, None, 32, True),
    ],
)
def test_k_is_flag_then_l0_then_training_k_then_noted_default(
    settings, metadata, k, expected, noted, tmp_path
):
    write_folder(tmp_path / "theirs", "jumprelu", metadata=metadata, **settings)
    made = import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=k)
    assert (made.k, bool(made.notes)) == (expected, noted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_sae_is_imported_unchanged(name, tmp_path):
    sae = random_sae(name)
    sae.save(tmp_path / "ours", hook_name="blocks.1.hook_resid_post", model={"name": "tiny", "hash": "0"})
    made = export_sae(tmp_path / "ours", out=tmp_path / "theirs")
    again = import_sae(tmp_path / "theirs", out=tmp_path / "again")
    assert again.architecture == made.architecture
    other = load(tmp_path / "again")
    codes, expected = other.encode(rows()), sae.encode(rows())
    assert expected.l0().float().mean() > 1
    torch.testing.assert_close(codes.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other(rows()), sae(rows()), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert config["metadata"]["model_name"] == "tiny"
    assert config["metadata"]["training_architecture_details"]["k"] == K
    assert config["metadata"]["sae_lens_version"]


def test_matching_pursuit_keeps_decoder_norms_and_tolerance(tmp_path):
    """Pursuit selects by r . d_i, so rows of W_dec keep their norms; the tolerance is in the units of x."""
    scale = 2.0
    settings = {"max_iterations": K, "residual_threshold": 1.5, "stop_on_duplicate_support": False}
    settings["normalize_activations"] = "expected_average_only_in"
    weights = write_folder(tmp_path / "theirs", "matching_pursuit", **settings)
    (tmp_path / "theirs" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    sae = load(tmp_path / "ours")
    x_hat_ND = dense_pursuit(weights, scale * rows(), k=K, tolerance=1.5)
    torch.testing.assert_close(sae(rows()).double(), x_hat_ND / scale, rtol=1e-5, atol=1e-5)
    assert 1 < sae.encode(rows()).l0().float().mean() < K
    export_sae(tmp_path / "ours", out=tmp_path / "back")
    config = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert (config["residual_threshold"], config["max_iterations"]) == (0.75, K)


def test_matching_pursuit_stops_at_repeated_atom(tmp_path):
    """SAELens stops by default; 30 picks out of 40 atoms in 12 dimensions include a repeated one."""
    weights = write_folder(tmp_path / "theirs", "matching_pursuit", max_iterations=30, residual_threshold=0.0)
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    sae = load(tmp_path / "ours")
    x_hat_ND = dense_pursuit(weights, rows(), k=30, stop_on_repeat=True)
    torch.testing.assert_close(sae(rows()).double(), x_hat_ND, rtol=1e-5, atol=1e-5)
    picks_N = (sae.encode(rows()).values.view(-1, 30) != 0).sum(1)
    assert picks_N.max() < 30 and torch.equal(picks_N - 1, sae.encode(rows()).l0())


def test_matching_pursuit_with_more_picks_than_latents_is_imported(tmp_path):
    settings = {"residual_threshold": 1e-3, "stop_on_duplicate_support": False}
    weights = write_folder(tmp_path / "theirs", "matching_pursuit", max_iterations=D_SAE + 20, **settings)
    made = import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    sae = load(tmp_path / "ours")
    assert made.k == sae.k == D_SAE + 20
    x_hat_ND = dense_pursuit(weights, rows(), k=D_SAE + 20, tolerance=1e-3)
    torch.testing.assert_close(sae(rows()).double(), x_hat_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "budget"), [("topk", "k"), ("matching_pursuit", "max_iterations")])
def test_k_flag_that_contradicts_folder_is_refused(name, budget, tmp_path):
    write_folder(tmp_path / "theirs", name, **{budget: K})
    with pytest.raises(UserError, match=f"--k {K + 1} is not the k = {K} of the SAE in"):
        import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K + 1)
    assert import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K).k == K


def test_import_and_export_accept_quiet(tmp_path):
    write_folder(tmp_path / "theirs", "topk", k=K)
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["import", str(tmp_path / "theirs"), "--out", ours, "--quiet"]) == 0
    assert main(["export", ours, back, "--quiet"]) == 0


def test_k_above_number_of_latents_is_refused(tmp_path):
    write_folder(tmp_path / "theirs", "standard")
    with pytest.raises(UserError, match=f"--k {D_SAE + 1} is more than the SAE's {D_SAE} latents"):
        import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=D_SAE + 1)


def test_matching_pursuit_without_centering_adds_no_bias(tmp_path):
    settings = {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    weights = write_folder(tmp_path / "theirs", "matching_pursuit", **settings, **RAW)
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    weights["b_dec"].zero_()
    x_hat_ND = dense_pursuit(weights, rows(), k=K)
    torch.testing.assert_close(load(tmp_path / "ours")(rows()).double(), x_hat_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "kind"), [({"orthogonal": True}, "orthogonal"), ({"selection": "absolute"}, "absolute")]
)
def test_export_of_pursuit_unknown_to_saelens_is_refused(option, kind, tmp_path):
    sae_class = architecture("matching-pursuit")
    sae_class(sae_class.Spec(d_sae=D_SAE, k=K, **option), D_IN).save(tmp_path / "ours")
    with pytest.raises(UserError, match=f"SAELens has no {kind} matching pursuit"):
        export_sae(tmp_path / "ours", out=tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_imported_sae_is_evaluated_and_indexed(tiny_cache, tmp_path):
    sae_class = architecture("topk")
    sae = sae_class(sae_class.Spec(d_sae=64, k=4), 32)
    sae.initialize(Batch(tiny_cache.activations()[:2000].float()), seed=0)
    sae.save(tmp_path / "run", hook_name=TINY_HOOKS[0])
    export_sae(tmp_path / "run", out=tmp_path / "theirs")
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    ours = evaluate(tmp_path / "ours", cache=tiny_cache.path, device="cpu", quiet=True)
    run = evaluate(tmp_path / "run", cache=tiny_cache.path, device="cpu", quiet=True)
    assert ours.explained_variance == run.explained_variance and ours.hook_name == TINY_HOOKS[0]
    with index(
        tmp_path / "ours", cache=tiny_cache.path, out=tmp_path / "store", model="none", quiet=True
    ) as store:
        assert store.info()["d_sae"] == 64


def test_context_settings_and_l0_are_exported_and_imported(tiny_cache, tmp_path):
    train(cache=tiny_cache.path, out=tmp_path / "run", d_sae=32, k=3, tokens=512, batch_size=256, quiet=True)
    evaluate(tmp_path / "run", device="cpu", quiet=True)
    export_sae(tmp_path / "run", out=tmp_path / "theirs")
    metadata = json.loads((tmp_path / "theirs" / "cfg.json").read_text())["metadata"]
    assert metadata["context_size"] == 32 and metadata["prepend_bos"] is False
    assert metadata["seqpos_slice"] == [1, None]
    assert metadata["hook_name"] == TINY_HOOKS[0] and metadata["model_name"] == tiny_cache.model["name"]
    assert 0 < metadata["l0"] <= 3
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    facts = json.loads((tmp_path / "ours" / "sae.json").read_text())["imported"]
    assert facts["context_size"] == 32 and facts["format"] == "saelens"


def test_cli_exports_and_imports_sae(tmp_path, capsys):
    random_sae("topk").save(tmp_path / "run", hook_name="h")
    theirs, back = str(tmp_path / "theirs"), str(tmp_path / "back")
    assert main(["export", str(tmp_path / "run"), "--format", "saelens", theirs]) == 0
    assert main(["import", theirs, "--format", "saelens", "--out", back, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["sae"] == "topk"
    assert main(["export", str(tmp_path / "run"), theirs]) == 2
    assert "is not empty (it holds cfg.json)" in capsys.readouterr().err
