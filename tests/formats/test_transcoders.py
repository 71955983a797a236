"""Transcoders in the formats of SAELens and circuit-tracer: the files compute what the transcoder does."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saebench as sb
from saebench.cli import main
from saebench.core.errors import UserError
from saebench.formats import export_sae, import_sae
from saebench.runs.run import load
from saebench.saes.registry import architecture
from saebench.saes.spec import SiteWidth
from tests.formats.random_transcoders import BY_THRESHOLD, assert_same, by_file, random_transcoder, rows

shapes = st.fixed_dictionaries(
    {
        "d_in": st.integers(2, 20),
        "d_sae": st.integers(8, 60),
        "seed": st.integers(0, 2**16),
        "skip": st.booleans(),
    }
)
THRESHOLD = "activation_function.threshold"


@pytest.mark.parametrize("name", BY_THRESHOLD)
@settings(max_examples=8, deadline=None)
@given(shape=shapes, d_out=st.integers(2, 20))
def test_saelens_folder_computes_what_the_transcoder_computes(name, shape, d_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saelens")
    sae, x_ND = random_transcoder(name, d_out=d_out, **shape), rows(300, shape["d_in"])
    sae.save(folder / "run", hook_name="blocks.0.mlp.hook_in")
    made = export_sae(folder / "run", out=folder / "theirs")
    kind = {
        (False, False): "",
        (True, False): "jumprelu_",
        (False, True): "skip_",
        (True, True): "jumprelu_skip_",
    }
    assert made.architecture == f"{kind[name != 'relu', shape['skip']]}transcoder"
    config = json.loads((folder / "theirs" / "cfg.json").read_text())
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (sae.d_in, d_out, False)
    assert config["metadata"]["hook_name"] == "blocks.0.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.0.hook_mlp_out"
    file = folder / "theirs" / "sae_weights.safetensors"
    assert_same(sae, *by_file(file, x_ND, threshold="threshold", transposed=False), x_ND)

    import_sae(folder / "theirs", out=folder / "ours")
    back = load(folder / "ours")
    assert back.spec.name == ("relu" if name == "relu" else "jumprelu") and back.spec.skip == shape["skip"]
    assert (back.spec.sites, back.spec.targets, back.k) == (sae.spec.sites, sae.spec.targets, sae.k)
    assert not back.b_in.any()
    with torch.no_grad():
        assert_same(back, sae.encode(x_ND).to_dense(), sae(x_ND), x_ND)


@settings(max_examples=15, deadline=None)
@given(
    shape=shapes, names=st.lists(st.sampled_from(BY_THRESHOLD), min_size=1, max_size=3), mixed=st.randoms()
)
def test_transcoder_set_computes_what_the_transcoders_compute(shape, names, mixed, tmp_path_factory):
    folder, d_in = tmp_path_factory.mktemp("set"), shape["d_in"]
    saes = [random_transcoder(name, d_out=d_in, layer=layer, **shape) for layer, name in enumerate(names)]
    runs = [folder / f"run-{layer}" for layer in range(len(saes))]
    for sae, run in zip(saes, runs, strict=True):
        sae.save(run, hook_name=sae.spec.sites[0].name, model={"name": "demo"})
    mixed.shuffle(runs)
    assert export_sae(runs[0], also=runs[1:], out=folder / "set", format="circuit-tracer").folders == ()
    assert yaml.safe_load((folder / "set" / "config.yaml").read_text()) == {
        "model_name": "demo",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "set",
    }
    made = import_sae(folder / "set", out=folder / "ours", format="circuit-tracer", k=3)
    assert [path.name for path in made.folders] == [f"layer_{layer}" for layer in range(len(saes))]
    x_ND = rows(300, d_in)
    for layer, sae in enumerate(saes):
        file = folder / "set" / f"layer_{layer}.safetensors"
        assert load_file(file)["W_enc"].shape == (sae.d_sae, d_in)
        assert_same(sae, *by_file(file, x_ND, threshold=THRESHOLD, transposed=True), x_ND)
        back = load(made.folders[layer])
        assert (back.spec.sites, back.spec.targets, back.k) == (sae.spec.sites, sae.spec.targets, 3)
        with torch.no_grad():
            assert_same(back, sae.encode(x_ND).to_dense(), sae(x_ND), x_ND)


def test_decoder_rows_of_an_imported_set_get_unit_norm_without_changing_the_output(tmp_path):
    write_set(tmp_path / "set", 1)
    import_sae(tmp_path / "set", out=tmp_path / "ours", format="circuit-tracer")
    sae, x_ND = load(tmp_path / "ours" / "layer_0"), rows(200, 6)
    file = tmp_path / "set" / "layer_0.safetensors"
    codes_NM, y_NE = by_file(file, x_ND, threshold=THRESHOLD, transposed=True)
    assert_same(sae, codes_NM * load_file(file)["W_dec"].double().norm(dim=1), y_NE, x_ND)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(9))


# Refusals ---------------------------------------------------------------------------------------------


def save_run(folder, name="relu", **settings):
    settings = {"d_in": 6, "d_out": 6, "d_sae": 20, "skip": False, **settings}
    random_transcoder(name, **settings).save(folder, hook_name="h")
    return folder


def save_with_sites(folder, sites, targets, name="relu"):
    width = sum(site.width for site in sites)
    spec = architecture(name).Spec(d_sae=20, k=3, sites=sites, targets=targets)
    architecture(name)(spec, width).save(folder, hook_name=sites[0].name)
    return folder


A, B, C = (SiteWidth(f"blocks.0.{hook}", 6) for hook in ("hook_mlp_in", "hook_mlp_out", "hook_resid_mid"))


@pytest.mark.parametrize("format", ["saelens", "circuit-tracer"])
@pytest.mark.parametrize(
    ("sites", "targets", "name", "sentence"),
    [
        (
            (A, B),
            (A, B),
            "relu",
            "no format for crosscoders, and this one joins blocks.0.hook_mlp_in, blocks",
        ),
        ((A, C), (B,), "relu", "one site and one target"),
        ((SiteWidth("0:h", 6),), (SiteWidth("1:h", 6),), "relu", "one target of one model"),
        ((A,), (B,), "topk", "a threshold per latent, which topk does not have; it can hold mutual-choice"),
        ((A,), (B,), "gradient", "a threshold per latent, which gradient does not have"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(format, sites, targets, name, sentence, tmp_path):
    save_with_sites(tmp_path / "run", sites, targets, name)
    with pytest.raises(UserError, match=sentence) as refused:
        export_sae(tmp_path / "run", out=tmp_path / "out", format=format)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "changed", "sentence"),
    [
        (
            (0, 2),
            {},
            "no run is of layer 1; train these too, with --site blocks.1.mlp.hook_in --target blocks.1",
        ),
        ((1,), {}, "no run is of layer 0"),
        ((0, 0), {}, "run-0 and .*run-1 are both of layer 0"),
        ((0, 1), {"d_sae": 21}, "run-1 has d_sae 21, but .*run-0 has 20"),
        ((0, 1), {"d_in": 7, "d_out": 7}, "run-1 has d_in 7"),
        ((0, 1), {"skip": True}, "run-1 has skip True"),
        (
            (0, 1),
            {"hooks": ("hook_resid_mid", "hook_mlp_out")},
            "run-1 has feature_input_hook hook_resid_mid",
        ),
        ((0, 1), {"d_out": 7}, "reads 6 and writes 7; use --format saelens"),
    ],
)
def test_runs_that_make_no_set_are_refused(layers, changed, sentence, tmp_path):
    runs = [
        save_run(tmp_path / f"run-{i}", layer=layer, **(changed if i else {}))
        for i, layer in enumerate(layers)
    ]
    with pytest.raises(UserError, match=sentence) as refused:
        export_sae(runs[0], also=runs[1:], out=tmp_path / "out", format="circuit-tracer")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_sets_of_saes_or_of_other_hooks_are_refused(tmp_path):
    sae_class = architecture("relu")
    sae_class(sae_class.Spec(d_sae=8, k=2), 6).save(tmp_path / "sae", hook_name="h")
    with pytest.raises(UserError, match="is an SAE; train with --target"):
        export_sae(tmp_path / "sae", out=tmp_path / "out", format="circuit-tracer")
    for site, target in (
        ("encoder.mlp:in", "encoder.mlp"),
        ("blocks.0.hook_mlp_in", "blocks.1.hook_mlp_out"),
    ):
        save_with_sites(tmp_path / "run", (SiteWidth(site, 6),), (SiteWidth(target, 6),))
        with pytest.raises(UserError, match=r"hooks blocks\.LAYER\.NAME of one layer"):
            export_sae(tmp_path / "run", out=tmp_path / "out", format="circuit-tracer")


def write_set(folder, n_layers, *, d_sae=9, d_model=6):
    """A set as circuit-tracer writes it, with decoder norms other than 1."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    for layer in range(n_layers):
        tensors = {
            "W_enc": torch.randn(d_sae, d_model, generator=generator),
            "W_dec": torch.randn(d_sae, d_model, generator=generator),
            "b_enc": torch.randn(d_sae, generator=generator),
            "b_dec": torch.randn(d_model, generator=generator),
            THRESHOLD: torch.rand(d_sae, generator=generator),
        }
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "a",
        "feature_output_hook": "b",
        "scan": "s",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def with_config(**changed):
    def change(folder):
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changed))

    return change


def with_tensor(name, tensor):
    def change(folder):
        file = folder / "layer_1.safetensors"
        save_file(load_file(file) | {name: tensor}, file)

    return change


def remotely(folder):
    with_config(transcoders=["hf://org/repo/layer_0.safetensors"])(folder)
    for file in folder.glob("layer_*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml does not exist; name the folder"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "is damaged or not YAML"),
        (lambda folder: (folder / "config.yaml").write_text("!!python/object:os.system x"), "not YAML"),
        (lambda folder: (folder / "config.yaml").write_text("- 1"), "has no feature_input_hook"),
        (with_config(feature_output_hook=None), "or feature_output_hook"),
        (
            with_config(model_kind="cross_layer_transcoder"),
            "model_kind 'cross_layer_transcoder'; saebench reads",
        ),
        (lambda folder: (folder / "layer_0.safetensors").unlink(), "layer_0.safetensors does not exist"),
        (remotely, r"names files elsewhere .*hf://org/repo"),
        (lambda folder: (folder / "layer_1.safetensors").write_bytes(b"x"), "damaged"),
        (with_tensor("W_enc", torch.ones(9, 5)), r"W_enc has shape \(9, 5\) where \(9, 6\) is expected"),
        (with_tensor("b_enc", torch.ones(())), "b_enc has shape"),
        (with_tensor("log_thresholds", torch.ones(9)), "holds 'log_thresholds'"),
        (with_tensor("b_dec", torch.full((6,), torch.nan)), "not finite"),
        (with_tensor(THRESHOLD, -torch.ones(9)), "thresholds below 0"),
    ],
)
def test_damaged_sets_are_refused_with_one_sentence(change, sentence, tmp_path):
    write_set(tmp_path / "set", 2)
    change(tmp_path / "set")
    with pytest.raises(UserError, match=sentence) as refused:
        import_sae(tmp_path / "set", out=tmp_path / "ours", format="circuit-tracer")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"apply_b_dec_to_input": True}, "which SAELens refuses for a transcoder"),
        ({"normalize_activations": "expected_average_only_in"}, "saebench reads 'none' and, of SAEs"),
        ({"normalize_activations": "layer_norm"}, "saebench reads 'none' and, of SAEs"),
        ({"d_out": 5}, "W_dec has shape"),
        (
            {"metadata": {"sae_lens_version": "6.54.12", "hook_name": "a"}},
            "no hook_name_out, .* writes; add it",
        ),
        (
            {"metadata": {"sae_lens_version": "6.54.12", "hook_name_out": "a"}},
            "no hook_name, .* reads; add it",
        ),
    ],
)
def test_unreadable_saelens_transcoders_are_refused(changed, sentence, tmp_path):
    export_sae(save_run(tmp_path / "run"), out=tmp_path / "theirs")
    file = tmp_path / "theirs" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=sentence):
        import_sae(tmp_path / "theirs", out=tmp_path / "ours")


# Command line -----------------------------------------------------------------------------------------


def test_cli_exports_and_imports_a_set(tmp_path, capsys):
    runs = [str(save_run(tmp_path / f"run-{layer}", layer=layer)) for layer in range(2)]
    theirs, ours = str(tmp_path / "set"), str(tmp_path / "ours")
    assert main(["export", *runs, "--format", "circuit-tracer", "--out", theirs]) == 0
    assert main(["export", *runs, str(tmp_path / "again"), "--format", "circuit-tracer"]) == 0
    assert (tmp_path / "again" / "layer_1.safetensors").exists()
    assert main(["import", theirs, "--format", "circuit-tracer", "--out", ours]) == 0
    printed = capsys.readouterr().out
    assert f"saebench eval {ours}/layer_0 --cache" in printed and "transcoder_set" in printed
    assert main(["export", *runs, str(tmp_path / "one")]) == 2
    assert "--format saelens holds one SAE, and 2 runs are named" in capsys.readouterr().err
    assert main(["export", runs[0]]) == 2
    assert "export needs a directory to write" in capsys.readouterr().err
    assert (
        main(["import", theirs, "--format", "circuit-tracer", "--out", str(tmp_path / "k"), "--k", "99"]) == 2
    )
    assert "--k 99 is more than the 20 latents" in capsys.readouterr().err


def test_an_imported_transcoder_encodes_as_before(tmp_path):
    export_sae(save_run(tmp_path / "run", "jumprelu", skip=True), out=tmp_path / "theirs")
    sb.import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    assert sb.load(tmp_path / "ours").spec.is_transcoder
