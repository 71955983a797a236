"""Gradients of the model's loss equal those of transformers, and are stored with their rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations.shards import TORCH_DTYPES
from saebench.core.errors import UserError
from saebench.sources import gradients as backward
from saebench.sources.models import load_model
from tests.conftest import TINY_HOOKS, TINY_VOCABULARY

LENGTHS = torch.tensor([17, 9, 1, 2])
HOOKS = (
    "blocks.0.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_post",
)


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(str(tiny_model_folder))


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, TINY_VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))


def summed_loss(logits_BTV, tokens_BT, lengths_B):
    """The definition in float64: the sum of -log p over all tokens after the first of each context."""
    log_p_BTV = logits_BTV.double().log_softmax(-1)
    return -sum(
        log_p_BTV[b, t, tokens_BT[b, t + 1]] for b, n in enumerate(lengths_B.tolist()) for t in range(n - 1)
    )


@pytest.fixture(scope="module")
def reference(tiny_model_folder, tokens_BT):
    """Gradients of the transformers model in float64, with the tensors of its modules retained."""
    from transformers import GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel.from_pretrained(tiny_model_folder).double().eval()
    kept = {}

    def keep(name, tensor):
        tensor.retain_grad()
        kept[name] = tensor

    first, last = gpt2.transformer.h
    modules = {HOOKS[0]: first, HOOKS[1]: last.attn, HOOKS[2]: last.mlp, HOOKS[4]: last}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _module, _in, out, name=name: keep(name, out[0] if isinstance(out, tuple) else out)
        )
    last.attn.c_proj.register_forward_pre_hook(lambda _module, args: keep(HOOKS[3], args[0]))
    summed_loss(gpt2(tokens_BT).logits, tokens_BT, LENGTHS).backward()
    return {name: tensor.grad for name, tensor in kept.items()}


def test_gradients_equal_those_of_transformers(model, tokens_BT, reference):
    activations, gradients = model.gradients(tokens_BT, LENGTHS, HOOKS)
    assert set(reference) == set(HOOKS) and list(gradients) == list(activations) == list(HOOKS)
    for hook in HOOKS:
        torch.testing.assert_close(gradients[hook].double(), reference[hook], rtol=1e-4, atol=1e-5)
        assert gradients[hook].abs().max() > 0.01
    seen = model.run_to(tokens_BT, HOOKS)
    for hook in HOOKS:
        assert not activations[hook].requires_grad and not gradients[hook].requires_grad
        torch.testing.assert_close(activations[hook], seen[hook])


def test_gradients_of_all_usual_hooks_equal_finite_differences_of_edits(tiny_model_folder, tokens_BT):
    """Central differences of the float64 loss along random directions, one per hook."""
    model = load_model(str(tiny_model_folder))
    model.module.double()
    hooks = [*model.info.usual_hooks(), "hook_embed"]
    _, gradients = model.gradients(tokens_BT, LENGTHS, hooks)
    generator = torch.Generator().manual_seed(1)
    for hook in hooks:
        direction_BTD = torch.randn(gradients[hook].shape, generator=generator, dtype=torch.float64)
        loss = {
            sign: summed_loss(
                model.logits(tokens_BT, edit={hook: lambda x, s=sign, d=direction_BTD: x + 1e-4 * s * d}),
                tokens_BT,
                LENGTHS,
            )
            for sign in (-1, 1)
        }
        slope = (loss[1] - loss[-1]) / 2e-4
        torch.testing.assert_close(
            (gradients[hook].double() * direction_BTD).sum(), slope, rtol=1e-4, atol=1e-4, msg=hook
        )


def test_gradient_does_not_depend_on_other_hooks(model, tokens_BT):
    hooks = list(model.info.usual_hooks())
    _, together = model.gradients(tokens_BT, LENGTHS, hooks)
    for hook in hooks:
        alone = model.gradients(tokens_BT, LENGTHS, [hook])[1][hook]
        assert torch.equal(alone, together[hook]), hook
    for last, added in (("resid_mid", "attn_out"), ("resid_post", "mlp_out")):
        assert torch.equal(together[f"blocks.1.hook_{last}"], together[f"blocks.1.hook_{added}"])


def test_gradient_of_resid_mid_includes_the_skip_connection(model, tokens_BT):
    """hook_resid_mid is read by the norm of the MLP and by the skip connection."""
    hooks = [f"blocks.1.{name}" for name in ("hook_resid_mid", "hook_resid_post", "ln2.hook_in")]
    _, together = model.gradients(tokens_BT, LENGTHS, ["blocks.0.hook_resid_pre", *hooks])
    mid, post, norm = (together[hook] for hook in hooks)
    torch.testing.assert_close(mid, post + norm)
    assert norm.abs().max() > 0.01
    torch.testing.assert_close(model.gradients(tokens_BT, LENGTHS, hooks[2:])[1][hooks[2]], norm)


def test_last_position_has_zero_gradient_and_padding_changes_nothing(model, tokens_BT):
    _, gradients = model.gradients(tokens_BT, LENGTHS, HOOKS)
    is_last_or_padding = torch.arange(17) >= LENGTHS[:, None] - 1
    other_BT = torch.where(torch.arange(17) >= LENGTHS[:, None], 7, tokens_BT)
    again = model.gradients(other_BT, LENGTHS, HOOKS)[1]
    for hook in HOOKS:
        assert (gradients[hook][is_last_or_padding] == 0).all()
        assert (gradients[hook][~is_last_or_padding] != 0).any(-1).all()
        assert torch.equal(again[hook], gradients[hook])


def test_gradient_does_not_depend_on_batch_or_logit_bound(model, tokens_BT, monkeypatch):
    _, gradients = model.gradients(tokens_BT, LENGTHS, HOOKS)
    monkeypatch.setattr(backward, "LOGIT_BYTES", 3 * 17 * 4 * TINY_VOCABULARY)
    assert backward.contexts_at_once(17, TINY_VOCABULARY) == 3
    activations, in_slices = model.gradients(tokens_BT, LENGTHS, HOOKS)
    for hook in HOOKS:
        assert activations[hook].shape == gradients[hook].shape
        torch.testing.assert_close(in_slices[hook], gradients[hook], rtol=1e-4, atol=1e-6)
        for b in range(4):
            part = slice(b, b + 1)
            _, alone = model.gradients(tokens_BT[part, : LENGTHS[b]], LENGTHS[part], [hook])
            torch.testing.assert_close(alone[hook], gradients[hook][part, : LENGTHS[b]], rtol=1e-4, atol=1e-6)


def test_gradient_of_a_given_scalar_equals_that_of_the_loss(model, tokens_BT):
    def loss(logits_BTV):
        return summed_loss(logits_BTV, tokens_BT, LENGTHS)

    _, expected = model.gradients(tokens_BT, LENGTHS, HOOKS)
    _, gradients = model.gradients(tokens_BT, LENGTHS, HOOKS, of=loss)
    for hook in HOOKS:
        torch.testing.assert_close(gradients[hook], expected[hook], rtol=1e-4, atol=1e-6)


def test_hooks_without_a_gradient_per_token_raise_user_error(model, tokens_BT, monkeypatch):
    for hook, message in (
        ("blocks.0.attn.hook_pattern", r"shape .* for \[4, 17\] tokens"),
        ("embed.hook_in", r"shape .* for \[4, 17\] tokens"),
        ("blocks.0.hook_resid_pos", "not a hook"),
        ("blocks.1.attn.hook_result", "only when TransformerLens sets use_attn_result"),
    ):
        with pytest.raises(UserError, match=message):
            model.gradients(tokens_BT, LENGTHS, [hook])
    with pytest.raises(UserError, match="only when TransformerLens sets"):
        model.run_to(tokens_BT, ["blocks.1.attn.hook_result"])
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert list(backward.gradients_of(x.sum(), {"y": y, "x": x})) == ["x"]
    assert backward.gradients_of(torch.ones(()), {"x": x}) == {}
    monkeypatch.setattr("saebench.sources.models.gradients_of", lambda *_: {})
    with pytest.raises(UserError, match=rf"do not depend on --site {HOOKS[0]}"):
        model.gradients(tokens_BT, LENGTHS, HOOKS)


@pytest.fixture(scope="module")
def settings(tiny_model_folder, tiny_text):
    return {
        "model": str(tiny_model_folder),
        "text": str(tiny_text),
        "hook": TINY_HOOKS,
        "ctx": 32,
        "dtype": "fp32",
        "shard_rows": 32_768,
        "quiet": True,
    }


@pytest.fixture(scope="module")
def cache(settings, tmp_path_factory):
    return sb.harvest(**settings, gradients=True, tokens=10**6, out=tmp_path_factory.mktemp("g") / "cache")


def test_harvest_stores_the_gradient_of_every_row(cache, tiny_cache, model):
    lengths_B, ctx_N, pos_N = cache.context_len, cache.ctx.long(), cache.pos.long()
    assert torch.equal(cache.context_tokens, tiny_cache.context_tokens)
    assert cache.n_rows == (lengths_B - 2).sum() and cache.n_rows + cache.n_contexts == tiny_cache.n_rows
    assert (pos_N >= 1).all() and (pos_N < lengths_B[ctx_N] - 1).all()
    _, gradients = model.gradients(cache.context_tokens, lengths_B, cache.hooks)
    for hook in cache.hooks:
        assert cache.has_gradients(hook)
        torch.testing.assert_close(cache.gradients(hook), gradients[hook][ctx_N, pos_N], rtol=1e-4, atol=1e-6)
        assert cache.gradients(hook).any(dim=1).all()
        both = tiny_cache.pos < lengths_B[tiny_cache.ctx.long()] - 1
        torch.testing.assert_close(cache.activations(hook), tiny_cache.activations(hook)[both])
    assert torch.equal(cache.gradients(), cache.gradients(TINY_HOOKS[0]))
    assert cache.manifest["made_from"]["settings"]["gradients"] is True
    cache.verify()


def test_harvest_without_gradients_is_unchanged(tiny_cache):
    assert not tiny_cache.has_gradients()
    assert "gradients" not in tiny_cache.manifest["made_from"]["settings"]
    with pytest.raises(UserError, match=rf"{tiny_cache.path} has no gradients .* harvest --gradients"):
        tiny_cache.gradients()


@pytest.mark.parametrize(("dtype", "own"), [("fp16", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_gradients_of_an_fp16_cache_are_bf16(settings, tmp_path, cache, dtype, own):
    small = {**settings, "dtype": dtype, "tokens": 301, "keep_first": True}
    made = sb.harvest(**small, gradients=True, out=tmp_path / "cache")
    assert made.n_rows == 301 and (made.pos == 0).any()
    assert (made.dtype, made.gradients().dtype) == (TORCH_DTYPES[dtype], TORCH_DTYPES[own])
    # The last context is cut at the number of rows, so it ends earlier than in the whole cache.
    whole = (made.pos > 0) & (made.ctx < made.n_contexts - 1)
    expected = cache.gradients()[: whole.sum()].to(TORCH_DTYPES[own])
    torch.testing.assert_close(made.gradients()[whole], expected, rtol=2e-2, atol=1e-5)


def test_nonfinite_gradients_raise_user_error(settings, tmp_path, monkeypatch):
    from saebench.sources.models import Model

    real = Model.gradients

    def broken(self, tokens_BT, length_B, hooks):
        activations, gradients = real(self, tokens_BT, length_B, hooks)
        gradients[hooks[1]][0, 3, 5] = torch.inf
        return activations, gradients

    monkeypatch.setattr(Model, "gradients", broken)
    message = rf"gradients at {TINY_HOOKS[1]} hold NaN or infinity \(context 0, position 3\)"
    with pytest.raises(UserError, match=message):
        sb.harvest(**settings, tokens=300, gradients=True, out=tmp_path / "cache")


def test_forecast_includes_gradients(settings, tmp_path, capsys):
    forecasts = []
    for gradients in (False, True):
        out = tmp_path / str(gradients)
        sb.harvest(**{**settings, "quiet": False, "tokens": 300}, gradients=gradients, out=out)
        forecasts.append(
            next(line for line in capsys.readouterr().err.splitlines() if "harvest: up to" in line)
        )
    assert "gradients" not in forecasts[0] and "32 + 32 values and as many gradients" in forecasts[1]
    kib = [float(line.partition("disk ")[2].split()[0]) for line in forecasts]
    assert kib[1] - kib[0] == pytest.approx(300 * 2 * 32 * 4 / 1024, rel=0.1)


def test_two_token_contexts_raise_user_error(settings, tmp_path):
    with pytest.raises(UserError, match="--ctx 2 leaves no row with a gradient"):
        sb.harvest(**{**settings, "ctx": 2}, gradients=True, out=tmp_path / "cache")
    cache = sb.harvest(
        **{**settings, "ctx": 2}, gradients=True, keep_first=True, tokens=9, out=tmp_path / "cache"
    )
    assert cache.n_rows == cache.n_contexts == 9


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    x_ND, g_ND = (generator.normal(size=(40_000, 3)).astype(np.float32) for _ in range(2))
    np.save(tmp_path / "x.npy", x_ND)
    np.save(tmp_path / "g.npy", g_ND.astype(np.float64))
    return tmp_path, x_ND, g_ND


def test_import_stores_gradients(arrays):
    folder, x_ND, g_ND = arrays
    settings = {"source": folder / "x.npy", "out": folder / "cache", "shard_rows": 32_768, "quiet": True}
    cache = sb.import_activations(**settings, gradients=folder / "g.npy")
    assert torch.equal(cache.activations(), torch.from_numpy(x_ND))
    assert torch.equal(cache.gradients(), torch.from_numpy(g_ND))
    assert sb.import_activations(**settings, gradients=folder / "g.npy").hash == cache.hash
    with pytest.raises(UserError, match="holds a different cache"):
        sb.import_activations(**settings)
    cache.verify()


def test_gradients_of_other_shape_raise_user_error(arrays):
    folder, _, g_ND = arrays
    settings = {"source": folder / "x.npy", "out": folder / "cache", "quiet": True}
    np.save(folder / "short.npy", g_ND[1:])
    with pytest.raises(UserError, match=r"short\.npy has shape \[39999, 3\] but .*x\.npy has \[40000, 3\]"):
        sb.import_activations(**settings, gradients=folder / "short.npy")
    g_ND[7, 1] = np.nan
    np.save(folder / "bad.npy", g_ND)
    with pytest.raises(UserError, match=r"bad\.npy: row 7, column 1 is nan"):
        sb.import_activations(**settings, gradients=folder / "bad.npy")
    with pytest.raises(UserError, match=r"none\.npy does not exist"):
        sb.import_activations(**settings, gradients=folder / "none.npy")
    assert not (folder / "cache").exists()
    cache = sb.import_activations(**settings)
    with pytest.raises(UserError, match="cache import --gradients"):
        cache.gradients()


def test_manifest_with_gradients_of_unknown_hook_raises_user_error(arrays):
    folder, *_ = arrays
    settings = {"source": folder / "x.npy", "out": folder / "cache", "quiet": True}
    path = sb.import_activations(**settings, gradients=folder / "g.npy").path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["columns"]["gradient/other"] = manifest["columns"].pop("gradient/imported")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="column gradient/other does not match an activation column"):
        sb.open_cache(path.parent)
