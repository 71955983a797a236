"""Every family of the table: hooks on modules of transformers equal TransformerLens's, or are refused.

Models are random, with two layers; all weights are perturbed, so that biases and gains of norms matter.
"""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.core.errors import UserError
from saebench.sources import families
from saebench.sources.families import FAMILIES
from saebench.sources.models import Model, load_model, peek_model
from saebench.sources.pretrained import load_pretrained
from tests.conftest import TINY_VOCABULARY

SIZES = {
    **{"vocab_size": TINY_VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
}
COMMON = SIZES | {"intermediate_size": 24, "max_position_embeddings": 32}
GROUPED = COMMON | {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
GEMMA = GROUPED | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}
OPT = SIZES | {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", SIZES | {"n_inner": 24, "n_positions": 32}),
    "gpt_neox": ("gpt_neox", COMMON | {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", COMMON | {"use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False}),
    "opt-350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "bloom": ("bloom", SIZES),
    "falcon": ("falcon", SIZES),
    "falcon-40b": ("falcon", SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-one-norm": (
        "falcon",
        SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("falcon", SIZES | {"multi_query": False, "parallel_attn": False, "alibi": True}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | WINDOW),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        GROUPED
        | {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [1],
        },
    ),
    "gemma": ("gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "phi": ("phi", GROUPED),
    "olmo": ("olmo", GROUPED | {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", GROUPED | WINDOW),
    "granite": (
        "granite",
        GROUPED | {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", GROUPED | {"logit_scale": 0.25} | WINDOW),
}
"""Name of a test -> model type, and settings of its config."""
BRIDGE_DIFFERS = {
    "opt-post-norm": "TransformerLens needs a final norm",
    "falcon-40b": "TransformerLens does not load this attention",
    "falcon-one-norm": "TransformerLens does not load this attention",
    "falcon-rw": "TransformerLens scales ALiBi otherwise than transformers",
}
"""Models that have other references: sums along the residual stream, derivatives, logits of transformers."""
BRIDGE_LACKS = {"opt", "opt-post-norm", "opt-350m", "bloom", "falcon-rw"}
"""Models whose bridge does not give hook_attn_in or hook_mlp_in as the residual stream."""
PARALLEL = {"gpt_neox", "falcon", "falcon-40b", "falcon-one-norm", "phi", "cohere", "cohere2"}
POST_NORM = {"opt-post-norm", "opt-350m"}
LENGTHS = torch.tensor([9, 6])


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory):
    @cache
    def make(name: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, settings = CONFIGS[name]
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("families") / name
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model_folder / file, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def models(folders):
    return cache(lambda name: load_model(str(folders(name))))


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, models) -> Model:
    return models(name)


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, TINY_VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def served(model, name):
    """All native hooks of the second block and beside the blocks."""
    return [hook for hook in model._native.names() if not hook.startswith("blocks.0.")]


def compared(model, name):
    """Those of them whose value the bridge gives as well."""
    hooks = served(model, name)
    if name in BRIDGE_LACKS:
        return [hook for hook in hooks if not hook.endswith(("hook_attn_in", "hook_mlp_in"))]
    return hooks


def test_every_family_of_the_table_has_a_model_here(folders):
    assert {kind for kind, _ in CONFIGS.values()} == set(FAMILIES)


def test_values_equal_those_of_the_bridge(model, name, tokens_BT):
    if name in BRIDGE_DIFFERS:
        pytest.skip(BRIDGE_DIFFERS[name])
    hooks = compared(model, name)
    found = model.run_to(tokens_BT, hooks)
    with torch.no_grad():
        expected = model._bridge_path.read(tokens_BT, hooks)
        torch.testing.assert_close(
            model.logits(tokens_BT), model._bridge_path.logits(tokens_BT, {}), rtol=1e-4, atol=2e-5
        )
    assert set(hooks) <= set(expected)
    for hook in ("blocks.1.attn.hook_pattern", "ln_final.hook_scale"):
        if hook in model.hook_names():
            assert model.path_of(hook) == model.info.path_of(hook) == "bridge"
    for hook in hooks:
        assert model.path_of(hook) == "native"
        value = expected[hook].reshape(2, 9, -1)
        torch.testing.assert_close(found[hook], value, rtol=1e-4, atol=2e-5, msg=hook)


def test_the_residual_stream_is_the_sum_of_what_is_added_to_it(model, name, tokens_BT):
    hooks = served(model, name)
    found = model.run_to(tokens_BT, hooks)
    pre, mid, post, attn, mlp = (
        found.get(f"blocks.1.hook_{part}")
        for part in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    )
    assert (mid is None) == (name in PARALLEL | POST_NORM)
    if mid is not None:
        torch.testing.assert_close(mid, pre + attn)
        torch.testing.assert_close(post, mid + mlp)
    elif name in PARALLEL:
        torch.testing.assert_close(post, pre + attn + mlp)
    for inside, outside in (("hook_attn_in", pre), ("hook_mlp_in", pre if name in PARALLEL else mid)):
        if (value := found.get(f"blocks.1.{inside}")) is not None and outside is not None:
            assert torch.equal(value, outside)
    for hook in hooks:
        assert found[hook].shape == (2, 9, model.hook_dim(hook))
        assert model.path_of(hook) == model.info.path_of(hook) == "native"
    usual = peek_model(str(model.info.folder)).usual_hooks()
    assert {h: usual[h] for h in hooks if h in usual} == {h: model.hook_dim(h) for h in hooks if h in usual}


def loss_of(logits_BTV, tokens_BT):
    log_p_BTV = logits_BTV.double().log_softmax(-1)
    return -sum(
        log_p_BTV[b, t, tokens_BT[b, t + 1]] for b, n in enumerate(LENGTHS.tolist()) for t in range(n - 1)
    )


def test_gradients_equal_the_derivative_of_edits(model, name, tokens_BT):
    """d loss(x + s * direction) / ds at s = 0, by autograd through the edit, and by finite differences."""
    hooks = served(model, name)
    _, gradients = model.gradients(tokens_BT, LENGTHS, hooks)
    clean_BTV = model.logits(tokens_BT)
    for i, hook in enumerate(hooks):
        shape = gradients[hook].shape
        direction_BTD = torch.randn(shape, generator=torch.Generator().manual_seed(i))

        def added(s, x, direction_BTD=direction_BTD):
            return x + s * direction_BTD.reshape(x.shape)

        s = torch.zeros((), requires_grad=True)
        logits_BTV = model._native.logits(tokens_BT, {hook: lambda x, s=s: added(s, x)})
        torch.testing.assert_close(logits_BTV.detach(), clean_BTV, rtol=1e-4, atol=2e-5, msg=hook)
        [slope] = torch.autograd.grad(loss_of(logits_BTV, tokens_BT), [s])
        found = (gradients[hook] * direction_BTD).sum()
        torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-3, msg=hook)
        if hook in ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"):
            edited = [model.logits(tokens_BT, edit={hook: lambda x, s=s: added(s, x)}) for s in (2e-3, -2e-3)]
            difference = (loss_of(edited[0], tokens_BT) - loss_of(edited[1], tokens_BT)) / 4e-3
            error = 0.01 * float(gradients[hook].norm() + 1)
            torch.testing.assert_close(found.double(), difference, rtol=0.01, atol=error, msg=hook)


def test_edits_and_gradients_equal_those_of_the_bridge(model, name, tokens_BT):
    if name in BRIDGE_DIFFERS:
        pytest.skip(BRIDGE_DIFFERS[name])
    for part in ("hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "attn.hook_v"):
        hook = f"blocks.0.{part}"
        edits = {hook: lambda x: 0.5 * x}
        with torch.no_grad():
            expected = model._bridge_path.logits(tokens_BT, edits)
        torch.testing.assert_close(
            model.logits(tokens_BT, edit=edits), expected, rtol=1e-4, atol=2e-5, msg=hook
        )
        _, gradients = model.gradients(tokens_BT, LENGTHS, [hook])
        with torch.enable_grad():
            logits_BTV, found = model._bridge_path.tracked_logits(tokens_BT, [hook])
            [gradient] = torch.autograd.grad(loss_of(logits_BTV, tokens_BT), [found[hook]])
        torch.testing.assert_close(
            gradients[hook], gradient.reshape(2, 9, -1), rtol=1e-3, atol=1e-4, msg=hook
        )


def test_variants_equal_one_run_each(model, name, tokens_BT):
    hook = "blocks.0.hook_resid_post"
    x_FTD = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(3))
    expected = [model.logits(tokens_BT[:1], edit={hook: lambda _, x=x: x})[0] for x in x_FTD]
    found = model.variants(tokens_BT[:1], hook, x_FTD)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_capped_attention_is_never_left_to_kernels_without_a_cap(folders, tokens_BT, monkeypatch):
    """transformers 5.17 chooses scaled_dot_product_attention for Gemma 2, and leaves the cap out."""
    from transformers import AutoModelForCausalLM
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    folder = str(folders("gemma2"))
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(tokens_BT).logits
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    assert AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "sdpa"
    torch.testing.assert_close(load_model(folder).logits(tokens_BT), expected, rtol=1e-4, atol=2e-5)
    for name, chosen in (("gemma2", "eager"), ("llama", "sdpa")):
        loaded = load_pretrained(AutoModelForCausalLM, str(folders(name)), name)
        assert loaded.config._attn_implementation == chosen


def test_logits_read_from_the_residual_stream_are_the_models(model, name, tokens_BT):
    if name == "gemma2":
        with pytest.raises(UserError, match="caps its logits at 30"):
            model.unembedding()
        U_DV = model.unembedding(before_cap=True)
        cap = 30.0
    else:
        U_DV, cap = model.unembedding(), None
    last = "blocks.1.hook_resid_post"
    assert model.residual_hook(last)
    read = model.run_to(tokens_BT, [last])[last] / model.final_scale(tokens_BT)[..., None] @ U_DV
    logits = model.logits(tokens_BT)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    logits = logits - logits.mean(-1, keepdim=True)
    read, logits = (values - values.mean((0, 1)) for values in (read, logits))
    torch.testing.assert_close(read, logits, rtol=1e-3, atol=1e-3)


def test_names_that_the_architecture_has_not_are_refused_with_the_reason(models, tokens_BT):
    for name, hook, reason in (
        ("gpt_neox", "blocks.1.hook_resid_mid", "added to the residual stream at once"),
        ("cohere", "blocks.1.hook_mlp_in", "read the same norm"),
        ("opt-350m", "blocks.1.hook_resid_mid", "normalized after attention"),
        ("mixtral", "blocks.1.mlp.hook_post", "mixture of experts"),
        ("mixtral", "blocks.1.mlp.hook_pre", "mixture of experts"),
        ("qwen3_moe", "blocks.0.mlp.hook_pre", "mixture of experts"),
    ):
        for call in (
            lambda m, h: m.run_to(tokens_BT, [h]),
            lambda m, h: m.logits(tokens_BT, edit={h: torch.zeros_like}),
            lambda m, h: m.gradients(tokens_BT, LENGTHS, [h]),
        ):
            with pytest.raises(UserError, match=reason):
                call(models(name), hook)
    assert models("qwen3_moe").hook_dim("blocks.1.mlp.hook_post") == 24


@pytest.mark.parametrize("name", ["opt", "mixtral", "olmo2", "granite", "cohere", "gemma2"], indirect=True)
def test_models_that_only_the_bridge_serves_are_right_or_refused(
    folders, model, name, tokens_BT, monkeypatch
):
    monkeypatch.setattr(families, "FAMILIES", {})
    bridged = load_model(str(folders(name)))
    mid = "blocks.1.hook_resid_mid"
    if name in PARALLEL:
        with pytest.raises(UserError, match="is not a hook"):
            bridged.gradients(tokens_BT, LENGTHS, [mid])
    else:
        for found, expected in zip(
            bridged.gradients(tokens_BT, LENGTHS, [mid]),
            model.gradients(tokens_BT, LENGTHS, [mid]),
            strict=True,
        ):
            torch.testing.assert_close(found[mid], expected[mid], rtol=1e-3, atol=1e-4)
        edit = {mid: lambda x: 2 * x}
        found, expected = bridged.logits(tokens_BT, edit=edit), model.logits(tokens_BT, edit=edit)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if name == "mixtral":
        for part in ("pre", "post"):
            with pytest.raises(UserError, match="mixture of experts"):
                bridged.run_to(tokens_BT, [f"blocks.1.mlp.hook_{part}"])
    capped = name == "gemma2"
    found, expected = (one.unembedding(before_cap=capped) for one in (bridged, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bridged.final_scale(tokens_BT), model.final_scale(tokens_BT))
    if capped:
        with pytest.raises(UserError, match="caps its logits at 30"):
            bridged.unembedding()


def test_reading_stops_after_the_block_that_is_needed(model, name, tokens_BT):
    blocks = model._native.text.get_submodule(model.info.family.blocks)
    calls = []
    handles = [block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    handles.append(
        model.module.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))
    )
    for hook, expected in (
        ("hook_embed", []),
        ("blocks.0.hook_attn_out", []),
        ("blocks.0.hook_resid_post", [0]),
        ("blocks.1.attn.hook_z", [0]),
        ("blocks.1.hook_resid_post", [0, 1]),
    ):
        calls.clear()
        model.run_to(tokens_BT, [hook])
        assert calls == expected, hook
    for handle in handles:
        handle.remove()


def test_the_documentation_lists_every_model_type_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text("utf-8")
    table = page.partition("| family | model types |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(FAMILIES)
