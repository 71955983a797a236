"""How architectures of transformers name their modules: one table entry per family.

`site_of` turns a TransformerLens hook name into the `Site` of a loaded model that holds the same tensor, or
into the reason why the model has no such tensor. A family is a `Family` in `FAMILIES`, under the model type
of its config. Paths are relative to the module that holds the blocks; those within a block to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from saebench.sources.hook_names import layer_of
from saebench.sources.native import Site

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

    def has(self, hook: str) -> bool | str:
        """Whether the table has a site for ``hook``; a sentence when no such model has that tensor."""
        if layer_of(hook) is None:
            return hook == "hook_embed" or (hook == "ln_final.hook_in" and self.ln_final is not None)
        site = _block_sites(self).get(hook.split(".", 2)[2])
        return site if isinstance(site, str) else site is not None


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

_ONE_RESIDUAL = "attention and MLP are added to the residual stream at once; choose hook_resid_pre or _post"
_ONE_NORM = "attention and MLP read the same norm; choose hook_resid_pre, attn.hook_in or mlp.hook_in"
_NORMALIZED = "the residual stream is normalized after attention and after the MLP; choose hook_resid_post"
EXPERTS = "this MLP is a mixture of experts, which has no one vector of neurons; choose hook_mlp_out"


def family_of(config: Any) -> Family | None:
    """The family of a model with the text config ``config``; None when no entry of the table serves it."""
    family = FAMILIES.get(config.model_type)
    if family is None or any(_is(config, name, value) for name, value in family.refused.items()):
        return None
    for condition, different in family.variants:
        if all(_is(config, name, value) for name, value in condition.items()):
            family = replace(family, **different)
    return replace(family, config=config)


def _is(config: Any, name: str, value: object) -> bool:
    return bool(getattr(config, name, None) == value)


class FamilySites:
    """The sites of a loaded model by TransformerLens hook name.

    Args:
        module: the model of transformers.
        family: what `family_of` gives for its config.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.root = _text_model(module, family)
        self._sites: dict[str, Site | str] = {}
        text = module.get_submodule(self.root)
        self._add("", {"hook_embed": Site(family.embed, scale=family.number(family.embed_scale))})
        blocks = text.get_submodule(family.blocks)
        for i, block in enumerate(blocks.children()):
            for name, site in _block_sites(family, block).items():
                placed = site if isinstance(site, str) else _within(site, f"{family.blocks}.{i}")
                self._add(f"blocks.{i}.", {name: placed})
        if family.ln_final is not None:
            self._add("ln_final.", {"hook_in": Site(family.ln_final, "in")})

    def _add(self, prefix: str, sites: Mapping[str, Site | str]) -> None:
        for name, site in sites.items():
            self._sites[prefix + name] = site if isinstance(site, str) else _within(site, self.root)

    def names(self) -> list[str]:
        """Names that have a site."""
        return [name for name, site in self._sites.items() if isinstance(site, Site)]

    def get(self, hook: str) -> Site | str | None:
        """The site; a sentence when the architecture has no such tensor; None for a name that is not here."""
        return self._sites.get(hook)


def _within(site: Site, path: str) -> Site:
    return replace(site, path=".".join(part for part in (path, site.path) if part))


def _text_model(module: nn.Module, family: Family) -> str:
    """The path of the submodule that holds the blocks."""
    path: str
    for path, part in module.named_modules():
        if _has(part, family.embed) and _has(part, family.blocks):
            return path
    raise AssertionError(f"{type(module).__name__} has no module with {family.blocks}")


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _block_sites(family: Family, block: nn.Module | None = None) -> dict[str, Site | str]:
    """Hook name within the block -> its site, or the reason why there is none.

    Without ``block`` it is taken to have neurons, which a mixture of experts has not.
    """
    attn_out, mlp_out = family.attn_out or family.attn, family.mlp_out or family.mlp
    scale = family.number(family.residual_scale)
    read_by_attn, read_by_mlp = Site(family.ln1 or family.attn, "in"), Site(family.ln2 or family.mlp, "in")
    pre, post = Site("", "in"), Site("", entry=0)
    sites: dict[str, Site | str] = {
        "hook_resid_pre": pre,
        "hook_resid_mid": replace(read_by_mlp, shared=True),
        "hook_resid_post": post,
        "hook_in": pre,
        "hook_out": post,
        "hook_attn_out": Site(family.ln1_post or attn_out, entry=0, scale=scale),
        "hook_mlp_out": Site(family.ln2_post or mlp_out, entry=0, scale=scale),
        "hook_attn_in": read_by_attn,
        "hook_mlp_in": read_by_mlp,
        "attn.hook_in": Site(family.attn, "in"),
        "attn.hook_z": Site(family.o, "in"),
        "mlp.hook_in": Site(family.mlp, "in"),
        **_qkv_sites(family),
    }
    if family.attn_out is None:  # else the modules add the residual stream themselves
        sites |= {"attn.hook_out": Site(family.attn, entry=0), "mlp.hook_out": Site(mlp_out, entry=0)}
    if family.ln1:
        sites["ln1.hook_in"] = read_by_attn
    if family.ln2:
        sites["ln2.hook_in"] = read_by_mlp
    if family.parallel:
        sites["hook_resid_mid"] = _ONE_RESIDUAL
        if family.ln2 is None:
            sites |= {"hook_attn_in": _ONE_NORM, "hook_mlp_in": _ONE_NORM}
            sites.pop("ln1.hook_in")
    if family.post_norm:
        sites["hook_resid_mid"] = _NORMALIZED
    if block is None or _has(block, family.gate):
        sites |= {"mlp.hook_pre": Site(family.gate), "mlp.hook_post": Site(family.down, "in")}
        if family.up:
            sites["mlp.hook_pre_linear"] = Site(family.up)
    else:
        sites |= dict.fromkeys(("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"), EXPERTS)
    return sites


def _qkv_sites(family: Family) -> dict[str, Site | str]:
    if family.qkv is None:
        return {f"attn.hook_{name}": Site(getattr(family, name)) for name in "qkv"}
    heads, groups = int(family.config.num_attention_heads), 1
    if _is(family.config, "new_decoder_architecture", True):
        groups = int(family.config.num_kv_heads)
    parts = {name: _part(family.layout, name, heads, groups) for name in "qkv"}
    return {f"attn.hook_{name}": Site(family.qkv, part=part) for name, part in parts.items()}


def _part(layout: QKVLayout, name: str, heads: int, groups: int) -> Callable[[Tensor], Tensor]:
    """The view of q, k or v in the output [..., columns] of a fused projection."""
    third = "qkv".index(name)
    if layout == "q|k|v":
        return lambda x: x.view(*x.shape[:-1], 3, -1)[..., third, :]
    if layout == "heads of qkv":
        return lambda x: x.view(*x.shape[:-1], heads, 3, -1)[..., third, :]
    which = {"q": slice(-2), "k": slice(-2, -1), "v": slice(-1, None)}[name]
    return lambda x: x.view(*x.shape[:-1], groups, heads // groups + 2, -1)[..., which, :]
