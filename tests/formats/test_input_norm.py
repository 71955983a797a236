"""SAEs of SAELens that normalize each row, and those of one attention head, are used as SAELens uses them."""

from __future__ import annotations

import json

import pytest
import torch

import saebench as sb
from saebench.analysis.edits import LatentEdit
from saebench.core.errors import UserError
from saebench.formats import export_sae, import_sae
from saebench.runs.run import load
from saebench.saes.files import weights_hash
from tests.conftest import TINY_HOOKS
from tests.formats.saelens_folders import D_IN, K, dense_codes, dense_pursuit, rows, write_folder

HOW = ("layer_norm", "constant_norm_rescale")


def normalized(x_ND, how):
    """SAELens's rows in float64, and the way back of a reconstruction."""
    x_ND = x_ND.double()
    if how == "layer_norm":
        mean_N1 = x_ND.mean(1, keepdim=True)
        std_N1 = (x_ND - mean_N1).std(1, keepdim=True)
        return (x_ND - mean_N1) / (std_N1 + 1e-5), lambda y_ND: y_ND * std_N1 + mean_N1, std_N1
    factor_N1 = x_ND.shape[1] ** 0.5 / x_ND.norm(dim=1, keepdim=True)
    return x_ND * factor_N1, lambda y_ND: y_ND / factor_N1, 1 / factor_N1


def uneven_rows():
    """Rows with a mean and norms from small to massive."""
    return rows() * torch.logspace(-2, 3, len(rows()))[:, None] + 0.3


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated"])
def test_rows_are_normalized_as_saelens_does(name, subtract, how, tmp_path):
    settings = {"normalize_activations": how, "apply_b_dec_to_input": subtract}
    settings |= {"k": K, "rescale_acts_by_decoder_norm": False} if name == "topk" else {}
    weights = write_folder(tmp_path / "theirs", name, **settings)
    x_ND, back, scale_N1 = normalized(uneven_rows(), how)
    codes_NM, x_hat_ND = dense_codes(weights, x_ND, architecture=name, subtract=subtract)
    made = import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=K)
    assert any("normalized" in note for note in made.notes)
    sae = load(made.path)
    codes, x_hat = sae.encode(uneven_rows()), sae(uneven_rows())
    unit_M = sae.W_dec.norm(dim=1) / weights["W_dec"].norm(dim=1).float()  # codes have unit atoms
    expected_NM = codes_NM * scale_N1 / unit_M
    for found, expected in ((x_hat, back(x_hat_ND)), (codes.to_dense(), expected_NM)):
        error_N = (found.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-9)
        assert error_N.max() < 1e-5
    torch.testing.assert_close(sae.decode(codes), x_hat)
    torch.testing.assert_close(sae.decode(codes.to_dense(), uneven_rows()), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(codes.to("cpu")), x_hat)
    with pytest.raises(UserError, match="needs the encoded x"):
        sae.decode(codes.to_dense())
    back_again = import_sae(
        export_sae(made.path, out=tmp_path / "exported").path, out=tmp_path / "again", k=K
    )
    config = json.loads((tmp_path / "exported" / "cfg.json").read_text())
    assert config["normalize_activations"] == how
    torch.testing.assert_close(load(back_again.path)(uneven_rows()), x_hat, rtol=1e-5, atol=1e-5)
    assert json.loads((made.path / "sae.json").read_text())["format_version"] == 2
    plain = write_folder(tmp_path / "plain", name, **settings | {"normalize_activations": "none"})
    assert plain.keys() == weights.keys()
    other = load(import_sae(tmp_path / "plain", out=tmp_path / "plain-ours", k=K).path)
    assert weights_hash(other) != weights_hash(sae)


@pytest.mark.parametrize("how", HOW)
def test_matching_pursuit_normalizes_rows_too(how, tmp_path):
    settings = {"normalize_activations": how, "max_iterations": K, "residual_threshold": 0.0}
    weights = write_folder(
        tmp_path / "theirs", "matching_pursuit", stop_on_duplicate_support=False, **settings
    )
    x_ND, back, _ = normalized(rows(), how)
    sae = load(import_sae(tmp_path / "theirs", out=tmp_path / "ours").path)
    expected = back(dense_pursuit(weights, x_ND, k=K))
    torch.testing.assert_close(sae(rows()).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_a_row_without_variance_has_finite_codes_and_reconstruction(how, tmp_path):
    write_folder(tmp_path / "theirs", "standard", normalize_activations=how)
    sae = load(import_sae(tmp_path / "theirs", out=tmp_path / "ours").path)
    for row in (torch.zeros(D_IN), torch.full((D_IN,), 3.0)):
        assert sae.encode(row).values.isfinite().all() and sae(row).isfinite().all()


def test_an_edit_of_a_normalizing_sae_moves_the_row_as_its_reconstruction_does(tmp_path):
    write_folder(tmp_path / "theirs", "standard", normalize_activations="layer_norm")
    sae = load(import_sae(tmp_path / "theirs", out=tmp_path / "ours").path)
    x_ND = uneven_rows()[:20]
    dense_NM = sae.encode(x_ND).to_dense()
    without_NM = dense_NM.clone()
    without_NM[:, [3, 5]] = 0
    expected = x_ND + sae.decode(without_NM, x_ND) - sae.decode(dense_NM, x_ND)
    found = LatentEdit([3, 5], "clamp", 0.0, []).apply(sae, x_ND, x_ND)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_normalizing_sae_is_evaluated_indexed_and_compared(tiny_cache, tmp_path):
    d_in = tiny_cache.d_in(TINY_HOOKS[0])
    generator = torch.Generator().manual_seed(0)
    from safetensors.torch import save_file

    (tmp_path / "theirs").mkdir()
    W_dec = torch.nn.functional.normalize(torch.randn(64, d_in, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous() * 0.3, "W_dec": W_dec}
    tensors |= {"b_enc": torch.full((64,), -0.1), "b_dec": torch.zeros(d_in)}
    save_file(tensors, tmp_path / "theirs" / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": d_in, "d_sae": 64, "normalize_activations": "layer_norm"}
    config["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": TINY_HOOKS[0]}
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config))
    run = import_sae(tmp_path / "theirs", out=tmp_path / "ours").path
    report = sb.evaluate(run, cache=tiny_cache, tokens=200, quiet=True)
    x_ND = tiny_cache.activations(TINY_HOOKS[0])[tiny_cache.held_out][:200].float()
    error = (x_ND - load(run)(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(error.detach()), rel=1e-4)
    with sb.index(run=run, cache=tiny_cache, out=tmp_path / "store", model="none", quiet=True) as store:
        assert len(store.features()) > 0


def test_an_sae_of_one_head_reads_and_writes_that_head_alone(tmp_path):
    model = sb.load_model("demo")
    hook, d_head = "blocks.1.attn.hook_z", model.info.d_head
    tokens_1T = torch.tensor([model.tokens.encode("The Congress of the United States")])
    whole_TD = model.run_to(tokens_1T, [hook])[hook]
    for head in (0, 2):
        one = f"{hook}[{head}]"
        found = model.run_to(tokens_1T, [one, hook])
        columns = slice(head * d_head, (head + 1) * d_head)
        assert torch.equal(found[one], whole_TD[..., columns]) and torch.equal(found[hook], whole_TD)
        assert model.hook_dim(one) == d_head and model.path_of(one) == model.path_of(hook)
        zeroed = whole_TD.clone()
        zeroed[..., columns] = 0
        expected = model.logits(tokens_1T, edit={hook: lambda _, to=zeroed: to})
        torch.testing.assert_close(model.logits(tokens_1T, edit={one: torch.zeros_like}), expected)
        length = torch.tensor([tokens_1T.shape[1]])
        gradients = model.gradients(tokens_1T, length, [one, hook])[1]
        assert torch.equal(gradients[one], gradients[hook][..., columns])
    both = {f"{hook}[{head}]": torch.zeros_like for head in range(model.info.d_heads // d_head)}
    torch.testing.assert_close(
        model.logits(tokens_1T, edit=both), model.logits(tokens_1T, edit={hook: torch.zeros_like})
    )
    with pytest.raises(UserError, match="heads at blocks"):
        model.run_to(tokens_1T, [f"{hook}[99]"])
    for other in ("blocks.1.hook_resid_post[0]", "blocks.1.attn.hook_z[x]"):
        with pytest.raises(UserError, match="did you mean"):
            model.check_hook(other)


def test_an_imported_sae_of_one_head_is_used_at_that_head(tmp_path):
    model = sb.load_model("demo")
    folder = tmp_path / "theirs"
    metadata = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 1, "model_name": "demo"}
    from safetensors.torch import save_file

    d = model.info.d_head
    g = torch.Generator().manual_seed(0)
    W_dec = torch.randn(16, d, generator=g)
    folder.mkdir()
    tensors = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec}
    tensors |= {"b_enc": torch.zeros(16), "b_dec": torch.zeros(d)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": d, "d_sae": 16, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(
        json.dumps(config | {"metadata": {"sae_lens_version": "6.54.12", **metadata}})
    )
    run = import_sae(folder, out=tmp_path / "ours").path
    text = "The Congress of the United States"
    found = sb.features_of(text, run, model, bos=False)
    tokens_1T = torch.tensor([model.tokens.encode(text)])
    z_TD = model.run_to(tokens_1T, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"][0][:, d : 2 * d]
    assert len(found) == int((load(run).encode(z_TD).to_dense() > 0).sum())
    assert len(sb.ablate(text, found.feature.iloc[0], run, model)) == tokens_1T.shape[1]
    exported = export_sae(run, out=tmp_path / "exported")
    written = json.loads((exported.path / "cfg.json").read_text())["metadata"]
    assert (written["hook_name"], written["hook_head_index"]) == ("blocks.1.attn.hook_z", 1)
    for bad in ("1", True, -1, 1.5):
        (folder / "cfg.json").write_text(
            json.dumps(
                config | {"metadata": {"sae_lens_version": "6.54.12", **metadata, "hook_head_index": bad}}
            )
        )
        with pytest.raises(UserError, match="hook_head_index"):
            import_sae(folder, out=tmp_path / "refused")


def test_one_head_is_harvested_and_trained_on(tmp_path):
    hook = "blocks.0.attn.hook_v[1]"
    cache = sb.harvest(hook=hook, out=tmp_path / "cache", tokens=600, ctx=32, dtype="fp32", quiet=True)
    whole = sb.harvest(
        hook="blocks.0.attn.hook_v", out=tmp_path / "whole", tokens=600, ctx=32, dtype="fp32", quiet=True
    )
    d = cache.d_in()
    assert torch.equal(cache.activations(hook), whole.activations()[:, d : 2 * d])
    run = sb.train(
        cache, out=tmp_path / "run", d_sae=32, k=4, tokens=1000, batch_size=100, quiet=True, device="cpu"
    )
    assert run.provenance.hook_name == hook
