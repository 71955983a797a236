"""Matching pursuit: the exact properties of its code, its gradients, revival, adaptive sparsity, fused
loss."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.matching_pursuit import MatchingPursuitSAE, MatchingPursuitSpec
from saebench.training import train
from saebench.training.metrics import step_metrics
from saebench_kernels.adam_step import project_rows_
from tests.kernels.fused.problems import DEVICE

OPTIONS = [
    {},
    {"selection": "absolute"},
    {"orthogonal": True},
    {"tolerance": 2.0},
    {"stop_on_repeat": True},
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(n, d_in=12, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = MatchingPursuitSAE(MatchingPursuitSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(0.3 + rows(200, d_in, seed)), seed=seed)
    return sae


def with_atoms(atoms_MD, k, **options):
    sae = MatchingPursuitSAE(MatchingPursuitSpec(d_sae=len(atoms_MD), k=k, **options), atoms_MD.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(atoms_MD)
    return sae


shapes = st.tuples(st.integers(1, 20), st.integers(1, 16), st.integers(1, 60), st.integers(0, 99))
"""N, d_in, d_sae, seed."""


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["signed", "absolute"]), st.data())
def test_energy_is_split_between_the_coefficients_and_the_residual(shape, selection, data):
    n, d_in, d_sae, seed = shape
    sae = make_sae(d_in, d_sae, data.draw(st.integers(1, d_sae)), seed, selection=selection)
    x_ND = rows(n, d_in, seed)
    energy_N = (x_ND - sae.b_dec).square().sum(1)
    previous_N = energy_N
    for k in (1, 2, 7, 30):
        codes = sae.encode(x_ND, k=k)
        left_N = (x_ND - sae.decode(codes)).square().sum(1)
        spent_N = codes.rectangular()[1].square().sum(1)
        torch.testing.assert_close(spent_N + left_N, energy_N, rtol=1e-5, atol=1e-5)
        assert (left_N <= previous_N + 1e-5 * energy_N).all()
        previous_N = left_N
        torch.testing.assert_close(
            codes.to_dense() @ sae.W_dec + sae.b_dec, sae.decode(codes), rtol=1e-4, atol=1e-4
        )


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_the_residual_is_orthogonal_to_the_atom_picked_last(shape):
    n, d_in, d_sae, seed = shape
    sae, x_ND = make_sae(d_in, d_sae, 1, seed), rows(n, d_in, seed)
    for k in (1, 2, 5):
        codes = sae.encode(x_ND, k=k)
        indices_NK, values_NK = codes.rectangular()
        last_ND = sae.W_dec[indices_NK[:, -1]]
        along_N = ((x_ND - sae.decode(codes)) * last_ND).sum(1)
        assert (along_N.abs() <= 1e-5 * (x_ND - sae.b_dec).norm(dim=1))[values_NK[:, -1] > 0].all()


@settings(max_examples=30, deadline=None)
@given(shapes, st.booleans())
def test_codes_with_fewer_picks_are_the_beginning_of_those_with_more(shape, orthogonal):
    n, d_in, d_sae, seed = shape
    sae, x_ND = make_sae(d_in, d_sae, 1, seed, orthogonal=orthogonal), rows(n, d_in, seed)
    indices_NK, values_NK = sae.encode(x_ND, k=24).rectangular()
    assert ((values_NK != 0) | (values_NK.flip(1).cumsum(1).flip(1) == 0)).all(), "padding is at the end"
    for k in (1, 2, 3, 10, 23):
        few_indices_NK, few_values_NK = sae.encode(x_ND, k=k).rectangular()
        assert torch.equal(few_indices_NK, indices_NK[:, :k])
        assert orthogonal or torch.equal(few_values_NK, values_NK[:, :k])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(0, 99), st.data())
def test_on_an_orthonormal_dictionary_it_is_the_hard_top_k_of_positive_correlations(d, seed, data):
    atoms_MD = torch.linalg.qr(rows(d, d, seed)).Q
    k = data.draw(st.integers(1, d))
    x_ND = rows(15, d, seed + 100)
    correlations_NM = x_ND @ atoms_MD.T
    top = correlations_NM.topk(k, dim=1)
    dense_NM = torch.zeros_like(correlations_NM).scatter(1, top.indices, top.values.relu())
    for orthogonal in (False, True):
        codes = with_atoms(atoms_MD, k, orthogonal=orthogonal).encode(x_ND)
        torch.testing.assert_close(codes.to_dense(), dense_NM, rtol=1e-4, atol=1e-5)
    long = with_atoms(atoms_MD, d).encode(x_ND, k=3 * d)
    dense_NM = long.to_dense()
    torch.testing.assert_close(dense_NM, correlations_NM.relu(), rtol=1e-4, atol=1e-5)


def test_atoms_picked_again_are_one_latent():
    sae = with_atoms(F.normalize(rows(48, 16, 3), dim=1), 40)
    codes = sae.encode(rows(300, 16, 4))
    indices_NK, values_NK = codes.rectangular()
    counts_N = torch.tensor(
        [len(set(i[v != 0].tolist())) for i, v in zip(indices_NK, values_NK, strict=True)]
    )
    assert torch.equal(codes.l0(), counts_N)
    assert torch.equal((codes.to_dense() != 0).sum(1), counts_N)
    picks = (values_NK != 0).sum()
    assert (picks - counts_N.sum()) / picks > 0.4, "a random dictionary of 48 in 16 dimensions repeats often"


def test_stopping_at_a_repeat_keeps_the_picks_up_to_and_with_it():
    atoms_MD, x_ND = F.normalize(rows(48, 16, 3), dim=1), rows(300, 16, 4)
    indices_NK, values_NK = with_atoms(atoms_MD, 40).encode(x_ND).rectangular()
    stopped_NK = with_atoms(atoms_MD, 40, stop_on_repeat=True).encode(x_ND).rectangular()[1]
    lengths = []
    for index_K, value_K, stopped_K in zip(indices_NK, values_NK, stopped_NK, strict=True):
        picks = index_K[value_K != 0].tolist()
        repeats = [t for t, i in enumerate(picks) if i in picks[:t]]
        lengths.append(repeats[0] + 1 if repeats else len(picks))
        assert torch.equal(stopped_K, value_K * (torch.arange(40) < lengths[-1]))
    assert min(lengths) < 5 < max(lengths)


def test_the_metrics_of_a_step_count_an_atom_picked_again_once():
    sae, x_ND = with_atoms(F.normalize(rows(48, 16, 3), dim=1), 40), rows(300, 16, 4)
    terms = sae.loss(Batch(x_ND))
    metrics = step_metrics(sae, terms, x_ND, step=1, tokens=300, lr=0.0, grad_norm=torch.zeros(()))
    assert metrics["l0"] == pytest.approx(terms.codes.l0().double().mean().item())
    assert metrics["l0"] < 0.6 * (terms.codes.values != 0).sum() / 300


def test_the_code_of_a_scaled_row_is_the_scaled_code():
    sae, x_ND = with_atoms(F.normalize(rows(40, 12, 5), dim=1), 8), rows(30)
    codes, scaled = sae.encode(x_ND), sae.encode(3.7 * x_ND)
    assert torch.equal(codes.indices, scaled.indices)
    torch.testing.assert_close(scaled.values, 3.7 * codes.values, rtol=1e-4, atol=1e-5)


def test_permuting_atoms_permutes_the_code():
    sae, other, x_ND = make_sae(), make_sae(), rows(50)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[order])
    torch.testing.assert_close(other.encode(x_ND).to_dense(), sae.encode(x_ND).to_dense()[:, order])


def test_absolute_selection_also_takes_negative_correlations():
    signed, absolute, x_ND = make_sae(), make_sae(selection="absolute"), rows(200)
    assert (signed.encode(x_ND).values >= 0).all()
    codes = absolute.encode(x_ND)
    assert (codes.values < 0).any() and (codes.values > 0).any()
    assert (x_ND - absolute(x_ND)).square().sum() < (x_ND - signed(x_ND)).square().sum()


def test_every_input_shape_gives_its_own_leading_shape():
    sae, x = make_sae(), rows(6).view(2, 3, 12)
    assert sae.encode(x).to_dense().shape == (2, 3, 40)
    assert sae(x).shape == (2, 3, 12) and sae(x[0, 0]).shape == (12,)
    torch.testing.assert_close(sae(x)[1, 2], sae(x[1, 2]))
    assert sae.W_enc.shape == (12, 40) and torch.equal(sae.W_enc.T, sae.W_dec) and (sae.b_enc == 0).all()
    assert {name for name, _ in sae.named_parameters()} == {"W_dec", "b_dec"}


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_tolerance_spends_picks_where_they_are_needed(orthogonal):
    sae, x_ND = make_sae(d_sae=150, orthogonal=orthogonal), rows(300)
    codes = sae.encode(x_ND, k=40, tolerance=1.9)
    norms_N = (x_ND - sae.decode(codes)).norm(dim=1)
    picks_N = (codes.rectangular()[1] != 0).sum(1)
    assert (norms_N < 1.9).all() and picks_N.min() < 2 < picks_N.max() < 40
    for n in range(0, 300, 30):
        fewer = sae.encode(x_ND[n], k=int(picks_N[n]) - 1) if picks_N[n] > 1 else None
        assert fewer is None or (x_ND[n] - sae.decode(fewer)).norm() >= 1.9 - 1e-5
    trained_so = make_sae(d_sae=150, k=40, orthogonal=orthogonal, tolerance=1.9)
    assert torch.equal(trained_so.encode(x_ND).values, codes.values)
    assert torch.equal(trained_so.loss(Batch(x_ND)).codes.values, codes.values)


@pytest.mark.parametrize("options", OPTIONS)
def test_folding_the_scale_gives_the_sae_of_the_unscaled_rows(options, tmp_path):
    sae, x_ND = make_sae(**options), rows(60)
    before = sae.encode(5.0 * x_ND)
    sae.fold_scale(5.0)
    for folded in (sae, saved_and_loaded(sae, tmp_path)):
        codes = folded.encode(x_ND)
        assert torch.equal(codes.indices, before.indices)
        torch.testing.assert_close(codes.values * 5.0, before.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-5)


def saved_and_loaded(sae, folder):
    sae.save(folder)
    other = load(folder)
    assert other.spec == sae.spec and torch.equal(other.tolerance, sae.tolerance)
    return other


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_finite_differences_with_the_picks_fixed(options):
    """The unrolled recursion, or least squares, in float64 passes central differences; so do ours."""
    x_ND, sae = rows(5, 8).double(), make_sae(8, 16, 6, **options)
    indices_NK, values_NK = sae.encode(x_ND.float()).rectangular()
    real_NK = values_NK != 0
    names = ("W_dec", "b_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]

    def dense_loss(W_dec_MD, b_dec_D):
        x_hat = [b_dec_D.expand_as(x_D) for x_D in x_ND]
        for n, x_D in enumerate(x_ND):
            picked_TD = W_dec_MD[indices_NK[n, real_NK[n]]]
            if sae.spec.orthogonal:
                gram_TT, target_T = picked_TD @ picked_TD.T, picked_TD @ (x_D - b_dec_D)
                x_hat[n] = b_dec_D + torch.linalg.solve(gram_TT, target_T) @ picked_TD
                continue
            for atom_D in picked_TD:
                x_hat[n] = x_hat[n] + ((x_D - x_hat[n]) @ atom_D) * atom_D
        return (x_ND - torch.stack(x_hat)).square().mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    terms = sae.loss(Batch(x_ND.float()))
    torch.testing.assert_close(terms.total.double(), dense_loss(*weights), rtol=1e-5, atol=1e-7)
    got = torch.autograd.grad(terms.total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_codes_alone_reaches_the_dictionary():
    """What a loss on the coefficients needs, beside the reconstruction."""
    sae, x_ND = make_sae(), rows(20)
    codes = sae.encode(x_ND)
    codes.values.square().sum().backward()
    indices_NK, _ = codes.rectangular()
    residual_ND, W_dec_MD = x_ND - sae.b_dec.detach(), sae.W_dec.detach().clone().requires_grad_()
    total = 0.0
    for index_N in indices_NK.T:
        value_N = (residual_ND * W_dec_MD[index_N]).sum(1)
        residual_ND = residual_ND - value_N[:, None] * W_dec_MD[index_N]
        total = total + value_N.square().sum()
    (expected_MD,) = torch.autograd.grad(total, W_dec_MD)
    torch.testing.assert_close(sae.W_dec.grad, expected_MD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_no_matrix_of_rows_by_atoms_is_kept_for_the_backward_pass(orthogonal):
    sae, x_ND = make_sae(8, 600, 3, orthogonal=orthogonal), rows(500, 8)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms = sae.loss(Batch(x_ND))
    rows_and_entries, weights = 4 * 500 * (8 + 3), 4 * 600 * 8
    assert 0 < sum(kept.values()) <= 4 * rows_and_entries + 2 * weights < 500 * 600
    terms.total.backward()


def test_aux_is_zero_without_dead_atoms_and_reaches_only_those_it_picks():
    sae, x_ND = make_sae(k_aux=2), rows(30)
    assert sae.loss(Batch(x_ND)).auxiliary == 0
    dead = torch.tensor([1, 7, 11, 30])
    sae.tokens_since_fired[dead] = sae.dead_after
    error_ND = (x_ND - sae(x_ND)).detach()
    aux = sae.auxiliary_loss(Batch(x_ND), error_ND)
    own = with_atoms(sae.W_dec.detach()[dead], 2)
    left = (error_ND - own(error_ND)).square().sum() / (error_ND - error_ND.mean(0)).square().sum()
    torch.testing.assert_close(aux, left)
    assert left < error_ND.square().sum() / (error_ND - error_ND.mean(0)).square().sum()
    aux.backward()
    touched = torch.zeros(40, dtype=torch.bool)
    touched[dead] = True
    assert (sae.W_dec.grad[touched].norm(dim=1) > 0).any() and (sae.W_dec.grad[~touched] == 0).all()
    assert sae.b_dec.grad is None or (sae.b_dec.grad == 0).all()


def test_a_step_on_aux_alone_brings_the_dead_atoms_closer_to_the_residual():
    sae, x_ND = make_sae(), rows(200)
    sae.tokens_since_fired[10:30] = sae.dead_after
    error_ND = (x_ND - sae(x_ND)).detach()
    before = sae.auxiliary_loss(Batch(x_ND), error_ND)
    before.backward()
    project_rows_(sae.W_dec.grad, sae.W_dec)
    with torch.no_grad():
        sae.W_dec -= 0.5 * sae.W_dec.grad
    sae.normalize_decoder()
    assert sae.auxiliary_loss(Batch(x_ND), error_ND) < before - 1e-4


def test_aux_of_a_residual_that_does_not_vary_is_zero_and_so_is_its_gradient():
    for n, error_ND in ((5, torch.zeros(5, 12)), (1, rows(1))):
        sae = make_sae()
        sae.tokens_since_fired.fill_(sae.dead_after)
        aux = sae.auxiliary_loss(Batch(rows(n)), error_ND)
        aux.backward()
        assert aux == 0 and (sae.W_dec.grad == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatchingPursuitSpec(k=0), "k is 0"),
        (lambda: MatchingPursuitSpec(tolerance=0.0), "tolerance is 0.0; give a positive"),
        (lambda: MatchingPursuitSpec(d_sae=8, k=4, k_aux=9), "k_aux is 9 but d_sae is only 8 latents"),
        (
            lambda: MatchingPursuitSpec(d_sae=8, k=9).check(batch_size=4, n_steps=9),
            "k is 9 but d_sae is only 8",
        ),
        (lambda: MatchingPursuitSpec(tolerance=-1), "tolerance is -1"),
        (lambda: MatchingPursuitSpec(tolerance=float("nan")), "tolerance is nan"),
        (lambda: MatchingPursuitSpec(tolerance=float("inf")), "tolerance is inf"),
        (lambda: make_sae().encode(rows(2), k=0), "k is 0"),
        (lambda: make_sae().encode(rows(2), tolerance=0), "tolerance is 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()


# The fused loss ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(make_cache, tmp_path_factory):
    """[6000, 16] sums of few of 32 directions within the first 12 dimensions, and their cache."""
    generator = torch.Generator().manual_seed(0)
    atoms_MD = F.normalize(torch.randn(32, 16, generator=generator) * (torch.arange(16) < 12), dim=1)
    fires_NM = torch.rand(6000, 32, generator=generator) < 0.1
    x_ND = (fires_NM * (1 + torch.rand(6000, 32, generator=generator))) @ atoms_MD + 0.5 * atoms_MD[0]
    return x_ND, make_cache(tmp_path_factory.mktemp("caches") / "pursuit", x_ND)


def run_settings(world, out, **options):
    return {
        "cache": world[1].path,
        "out": out,
        "sae": "matching-pursuit",
        "d_sae": 64,
        "k": 4,
        "lr": 1e-2,
        "tokens": 60 * 128,
        "batch_size": 128,
        "log_every": 5,
        "device": "cpu",
        "quiet": True,
        **options,
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_it_learns_keeps_its_atoms_at_unit_norm_and_repeats_bit_for_bit(world, options, tmp_path):
    runs = [train(**run_settings(world, tmp_path / name, **options)) for name in "ab"]
    weights = [(run.path / "sae.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (runs[0].path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    sae, x_ND = runs[0].sae, world[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-5)
    fvu = (x_ND - sae(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert abs(fvu - lines[-1]["fvu"]) < 0.3 * fvu, "the scale was folded in"


@pytest.mark.parametrize("coefficient", [1 / 32, 0.0])
def test_aux_revives_atoms_that_point_out_of_the_data(world, coefficient, tmp_path, monkeypatch):
    initialize = MatchingPursuitSAE.initialize

    def with_hidden_atoms(self, sample, *, seed):
        initialize(self, sample, seed=seed)
        with torch.no_grad():
            self.W_dec[32:, :12] *= 0.05
        self.normalize_decoder()

    monkeypatch.setattr(MatchingPursuitSAE, "initialize", with_hidden_atoms)
    settings = run_settings(world, tmp_path / "run", tokens=300 * 128, aux_coefficient=coefficient)
    train(**settings | {"dead_tokens": 1})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line["aux"] > 0 for line in lines) == (coefficient > 0)
    assert lines[-1]["dead"] <= 8 if coefficient else lines[-1]["dead"] >= 20


def test_store_and_evaluation_count_an_atom_picked_again_once(world, tmp_path):
    from saebench.evaluation.reconstruction import ReconstructionMeter
    from saebench.store import index

    x_ND, cache = world
    sae = with_atoms(F.normalize(rows(24, 16, 6), dim=1), 20)
    dense_NM = sae.encode(x_ND).to_dense()
    n_active_M = (dense_NM != 0).sum(0)
    assert (sae.encode(x_ND).values != 0).sum() > n_active_M.sum(), "some atoms are picked again"
    sae.save(tmp_path / "sae", hook_name=cache.hooks[0])
    store = index(run=tmp_path / "sae", cache=cache.path, out=tmp_path / "store", model="none", quiet=True)
    features = store.features().sort_values("feature")
    assert features["n_act"].tolist() == n_active_M.tolist()
    frame = store.activations(3)
    assert not frame.duplicated(["ctx", "pos"]).any()
    torch.testing.assert_close(torch.tensor(frame["value"].to_numpy()), dense_NM[dense_NM[:, 3] != 0, 3])
    meter = ReconstructionMeter(sae)
    meter.update(x_ND)
    assert meter.result().l0 == pytest.approx(n_active_M.sum().item() / len(x_ND))


@pytest.mark.parametrize("selection", ["signed", "absolute"])
@pytest.mark.parametrize("n_dead", [0, 1, 5])
def test_fused_loss_equals_the_eager_one(selection, n_dead, monkeypatch):
    """Where every pick is clear: atoms of a low dimension leave no near ties to rounding."""
    n, d, m, k = 40, 12, 150, 3
    spec = MatchingPursuitSpec(d_sae=m, k=k, selection=selection, k_aux=2)
    sae = MatchingPursuitSAE(spec, d).to(DEVICE)
    x_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sae.initialize(Batch(x_ND), seed=0)
    batch = Batch(x_ND)
    quiet_M = torch.ones(m, dtype=torch.bool, device=DEVICE)
    quiet_M[sae.pursue(x_ND).indices.long()] = False
    assert quiet_M.sum() >= n_dead
    sae.tokens_since_fired[quiet_M.nonzero()[:n_dead, 0]] = sae.dead_after
    sae.refresh_dead()
    expected = sae.loss(batch)
    for module in ("saebench.saes.matching_pursuit", "saebench_kernels.matching_pursuit_energy"):
        monkeypatch.setattr(sys.modules[module], "is_pursuit_fused", lambda *args, **sizes: True)
    assert sae.trains_fused(n)
    found = sae.loss(batch)
    assert torch.equal(found.codes.indices.long(), expected.codes.indices.long())
    assert (found.auxiliary > 0) == (n_dead > 0)
    for name in ("total", "reconstruction", "auxiliary", "error"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    gradients = []
    for terms in (expected, found):
        sae.zero_grad()
        terms.total.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in sae.named_parameters()})
    for name, gradient in gradients[0].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, rtol=2e-2, atol=1e-2 * size, msg=name)
