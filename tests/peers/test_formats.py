"""Export to and import from SAELens: SAELens itself computes the same codes and reconstructions.

Codes agree if their supports are equal in 99.9% of the rows (near ties may differ). In these rows, codes and
reconstructions must differ by at most 1e-5 of their norms.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.formats import export_sae, import_sae
from saebench.runs.run import load
from saebench.saes.registry import ARCHITECTURES
from tests.formats.saelens_folders import dense_codes, dense_pursuit, random_sae, rows, write_folder

pytestmark = pytest.mark.peers

D_IN, D_SAE, K, N = 64, 512, 16, 4000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, rows(N, 11, D_IN).numpy())
    return path


def by_saelens(saelens, folder, data, **how):
    """SAELens's codes [N, M] and reconstruction [N, D] of the rows."""
    out = folder.with_name(folder.name + "-out")
    saelens.ask("encode", folder=str(folder), data=str(data), out=str(out), **how)
    return torch.from_numpy(np.load(out / "codes.npy")), torch.from_numpy(np.load(out / "x_hat.npy"))


def assert_agree(sae, theirs, x_ND, *, at_least=0.999):
    codes_NM, x_hat_ND = theirs
    codes, ours_ND = sae.encode(x_ND), sae(x_ND).detach()
    ours_NM = codes.to_dense()
    if codes.row_norm is not None:  # SAELens's codes are those of normalized rows
        ours_NM = ours_NM / codes.row_norm[1]
    agree_N = ((codes_NM != 0) == (ours_NM != 0)).all(1)
    assert agree_N.float().mean() >= at_least
    assert (codes_NM != 0).sum(1).float().mean() > 2
    for a_NX, b_NX in ((ours_NM, codes_NM), (ours_ND, x_hat_ND)):
        apart_N = (a_NX - b_NX)[agree_N].norm(dim=1) / b_NX[agree_N].norm(dim=1)
        assert apart_N.nan_to_num(0).max() <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_computes_exported_sae(name, saelens, data, tmp_path):
    sae = random_sae(name, d_in=D_IN, d_sae=D_SAE, k=K)
    sae.save(tmp_path / "ours", hook_name="blocks.1.hook_resid_post", model={"name": "tiny"})
    made = export_sae(tmp_path / "ours", out=tmp_path / "theirs")
    loaded = saelens.ask("encode", folder=str(tmp_path / "theirs"), data=str(data), out=str(tmp_path / "o"))
    assert loaded == {"architecture": made.architecture, "hook_name": "blocks.1.hook_resid_post"}
    assert_agree(sae, by_saelens(saelens, tmp_path / "theirs", data), rows(N, 11, D_IN))


THEIRS = {
    "topk": {"k": K},
    "topk by norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk raw": {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    "jumprelu": {},
    "jumprelu raw": {"apply_b_dec_to_input": False},
    "standard": {},
    "standard raw": {"apply_b_dec_to_input": False},
    "gated": {},
    "gated raw": {"apply_b_dec_to_input": False},
    **{
        f"{name} {how}": {"normalize_activations": how, **({"k": K} if name == "topk" else {})}
        for name in ("standard", "topk", "jumprelu", "gated")
        for how in ("layer_norm", "constant_norm_rescale")
    },
    "matching_pursuit": {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
    "matching_pursuit until": {"residual_threshold": 5.0, "stop_on_duplicate_support": False},
    "matching_pursuit by default": {},
    "matching_pursuit raw": {
        "max_iterations": K,
        "stop_on_duplicate_support": False,
        "apply_b_dec_to_input": False,
    },
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "checkpoint"])
@pytest.mark.parametrize("case", THEIRS)
def test_imported_random_sae_computes_what_saelens_computes(case, training, saelens, data, tmp_path):
    name = case.split()[0]
    settings = {"architecture": name, "d_in": D_IN, "d_sae": D_SAE, **THEIRS[case]}
    saelens.ask("make", folder=str(tmp_path / "theirs"), sae=settings, seed=3, training=training)
    # Matching pursuit records its number of picks. For a threshold, k is only recorded.
    k = None if name == "matching_pursuit" else K
    import_sae(tmp_path / "theirs", out=tmp_path / "ours", k=k)
    fold = name in ("jumprelu", "standard", "gated") or settings.get("rescale_acts_by_decoder_norm", training)
    theirs = by_saelens(saelens, tmp_path / "theirs", data, fold_norms=fold and name != "matching_pursuit")
    assert_agree(load(tmp_path / "ours"), theirs, rows(N, 11, D_IN))


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"])
def test_imported_trained_sae_computes_what_saelens_computes(name, saelens, data, tmp_path):
    settings = {
        **{
            f"{name} {how}": {"normalize_activations": how, **({"k": K} if name == "topk" else {})}
            for name in ("standard", "topk", "jumprelu", "gated")
            for how in ("layer_norm", "constant_norm_rescale")
        },
        "matching_pursuit": {"max_iterations": K, "stop_on_duplicate_support": False},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [D_SAE // 4, D_SAE]},
    }.get(name, {"k": K})
    sae = {"architecture": name, "d_in": D_IN, "d_sae": D_SAE, **settings}
    saelens.ask(
        "train", data=str(data), folder=str(tmp_path / "theirs"), sae=sae,
        batch_size=256, n_steps=60, seed=0, lr=3e-3,
    )  # fmt: skip
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    assert_agree(load(tmp_path / "ours"), by_saelens(saelens, tmp_path / "theirs", data), rows(N, 11, D_IN))


def test_batchtopk_checkpoint_equals_saelens_inference_model(saelens, data, tmp_path):
    """SAELens loads BatchTopK checkpoints only for training; ours must equal its inference conversion."""
    folder = tmp_path / "checkpoint"
    settings = {"architecture": "batchtopk", "d_in": D_IN, "d_sae": D_SAE, "k": K}
    inference = tmp_path / "inference"
    saelens.ask("make", folder=str(folder), sae=settings, seed=3, training=True, inference=str(inference))
    import_sae(folder, out=tmp_path / "ours")
    assert_agree(load(tmp_path / "ours"), by_saelens(saelens, inference, data), rows(N, 11, D_IN))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("gated", {}),
        ("matching_pursuit", {"max_iterations": 30, "residual_threshold": 1.0}),
    ],
)
def test_dense_reference_equals_saelens(name, settings, saelens, tmp_path):
    weights = write_folder(tmp_path / "theirs", name, **settings)
    np.save(tmp_path / "rows.npy", rows().numpy())
    _, x_hat_ND = by_saelens(saelens, tmp_path / "theirs", tmp_path / "rows.npy")
    if name == "matching_pursuit":
        expected_ND = dense_pursuit(weights, rows(), k=30, tolerance=1.0, stop_on_repeat=True)
    else:
        by_norm = settings.get("rescale_acts_by_decoder_norm", False)
        subtract = settings.get("apply_b_dec_to_input", True)
        _, expected_ND = dense_codes(weights, rows(), architecture=name, by_norm=by_norm, subtract=subtract)
    torch.testing.assert_close(x_hat_ND.double(), expected_ND, rtol=1e-5, atol=1e-5)


def test_folder_from_before_version_6_is_read_as_in_saelens(saelens, tmp_path):
    write_folder(tmp_path / "theirs", "standard")
    file = tmp_path / "theirs" / "cfg.json"
    config = json.loads(file.read_text())
    old = {name: config[name] for name in ("d_in", "d_sae", "dtype", "device")}
    old |= {
        "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
    }
    file.write_text(json.dumps(old))
    weights = tmp_path / "theirs" / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": torch.ones(12)}, weights)
    np.save(tmp_path / "rows.npy", rows().numpy())
    import_sae(tmp_path / "theirs", out=tmp_path / "ours")
    assert_agree(
        load(tmp_path / "ours"), by_saelens(saelens, tmp_path / "theirs", tmp_path / "rows.npy"), rows()
    )
