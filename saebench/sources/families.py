"""How architectures of transformers name their modules: one table entry per family.

A family is a `Family` in `FAMILIES`, under the model type of its config. family_sites.py derives from it
where each TransformerLens hook is. Paths are relative to the module that holds the blocks; those within a
block to the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

QKVLayout = Literal["q|k|v", "heads of qkv", "groups of q..kv"]


@dataclass(frozen=True)
class Family:
    """Where the tensors of one architecture are. None is a module that it does not have.

    Args:
        embed, blocks, ln_final: beside the blocks.
        projection: a linear map between the final norm and the unembedding.
        ln1, attn, ln1_post, ln2, mlp, ln2_post: the norms before and after each part of a block.
        attn_out, mlp_out: the module whose output is added to the residual stream, where it is not
            ``ln1_post`` or ``attn`` (``ln2_post`` or ``mlp``) itself.
        q, k, v, o: the projections of attention; ``qkv`` is the fused one and ``layout`` its columns.
        gate: the projection that the activation function is applied to; ``up`` is the linear one beside it.
        parallel: attention and MLP are added to the residual stream at once.
        post_norm: the residual stream itself is normalized after each part.
        rms: the final norm does not subtract the mean.
        gain_offset: added to the weight of the final norm.
        alibi: attention reads a bias that is made for the number of contexts at the embedding.
        residual_scale, embed_scale, logit_scale, logit_divisor, soft_cap: the config's names of these.
        refused: configs of this family that are not served.
        variants: values of the config -> fields that are different.
        config: the text config that `family_of` read.
    """

    embed: str = "embed_tokens"
    blocks: str = "layers"
    ln_final: str | None = "norm"
    projection: str | None = None
    ln1: str | None = "input_layernorm"
    attn: str = "self_attn"
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    ln2_post: str | None = None
    attn_out: str | None = None
    mlp_out: str | None = None
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    qkv: str | None = None
    layout: QKVLayout = "q|k|v"
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"
    parallel: bool = False
    post_norm: bool = False
    rms: bool = True
    gain_offset: float = 0.0
    alibi: bool = False
    residual_scale: str | None = None
    embed_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    soft_cap: str | None = "final_logit_softcapping"
    refused: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    config: Any = field(default=None, repr=False)

    def number(self, name: str | None) -> float:
        """The value of the config's entry ``name``; 1 for None."""
        return 1.0 if name is None else float(getattr(self.config, name))


_LLAMA = Family()
_GEMMA = replace(_LLAMA, gain_offset=1.0)
_GEMMA_POST = replace(
    _GEMMA,
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
)
_COHERE = replace(_LLAMA, parallel=True, ln2=None, rms=False, logit_scale="logit_scale")
_BLOOM = Family(
    embed="word_embeddings_layernorm",
    blocks="h",
    ln_final="ln_f",
    attn="self_attention",
    attn_out="self_attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    qkv="self_attention.query_key_value",
    layout="heads of qkv",
    o="self_attention.dense",
    gate="mlp.dense_h_to_4h",
    up=None,
    down="mlp.dense_4h_to_h",
    rms=False,
    alibi=True,
    refused={"apply_residual_connection_post_layernorm": True, "slow_but_exact": True},
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        embed="wte",
        blocks="h",
        ln_final="ln_f",
        ln1="ln_1",
        attn="attn",
        ln2="ln_2",
        qkv="attn.c_attn",
        o="attn.c_proj",
        gate="mlp.c_fc",
        up=None,
        down="mlp.c_proj",
        rms=False,
        refused={"add_cross_attention": True},
    ),
    "gpt_neox": replace(
        _BLOOM,
        embed="embed_in",
        blocks="layers",
        ln_final="final_layer_norm",
        attn="attention",
        attn_out=None,
        mlp_out=None,
        qkv="attention.query_key_value",
        o="attention.dense",
        alibi=False,
        refused={},
        variants=(({"use_parallel_residual": True}, {"parallel": True}),),
    ),
    "opt": Family(
        ln_final="final_layer_norm",
        projection="project_out",
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        mlp="fc1",
        mlp_out="fc2",
        o="self_attn.out_proj",
        gate="fc1",
        up=None,
        down="fc2",
        rms=False,
        variants=(
            ({"do_layer_norm_before": False}, {"ln1": None, "ln2": None, "post_norm": True}),
            ({"do_layer_norm_before": False}, {"ln_final": None}),
            ({"_remove_final_layer_norm": True}, {"ln_final": None}),
        ),
    ),
    "bloom": _BLOOM,
    "falcon": replace(
        _BLOOM,
        embed="word_embeddings",
        attn_out=None,
        mlp_out=None,
        refused={},
        layout="groups of q..kv",
        variants=(
            ({"parallel_attn": True}, {"parallel": True, "ln2": None}),
            (
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
                {"ln1": "ln_attn", "ln2": "ln_mlp"},
            ),
            ({"new_decoder_architecture": False, "multi_query": False}, {"layout": "heads of qkv"}),
            ({"alibi": False}, {"alibi": False}),
        ),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA_POST,
    "gemma3_text": _GEMMA_POST,
    "phi": replace(
        _LLAMA,
        ln_final="final_layernorm",
        parallel=True,
        ln2=None,
        o="self_attn.dense",
        gate="mlp.fc1",
        up=None,
        down="mlp.fc2",
        rms=False,
    ),
    "olmo": replace(_LLAMA, rms=False),
    "olmo2": replace(
        _LLAMA,
        ln1=None,
        ln1_post="post_attention_layernorm",
        ln2=None,
        ln2_post="post_feedforward_layernorm",
    ),
    "granite": replace(
        _LLAMA,
        residual_scale="residual_multiplier",
        embed_scale="embedding_multiplier",
        logit_divisor="logits_scaling",
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE,
}
FAMILIES["olmo3"] = FAMILIES["olmo2"]
"""Model type of the text config -> its family."""


def family_of(config: Any) -> Family | None:
    """The family of a model with the text config ``config``; None when no entry of the table serves it."""
    family = FAMILIES.get(config.model_type)
    if family is None or any(config_is(config, name, value) for name, value in family.refused.items()):
        return None
    for condition, different in family.variants:
        if all(config_is(config, name, value) for name, value in condition.items()):
            family = replace(family, **different)
    return replace(family, config=config)


def config_is(config: Any, name: str, value: object) -> bool:
    """True when the config's entry ``name`` is ``value``."""
    return bool(getattr(config, name, None) == value)
