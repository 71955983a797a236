"""Where the hooks of a model are, given its family: TransformerLens name -> `Site`, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from saebench.sources.families import Family, QKVLayout, config_is
from saebench.sources.hook_names import layer_of
from saebench.sources.native import Site

_ONE_RESIDUAL = "attention and MLP are added to the residual stream at once; choose hook_resid_pre or _post"
_ONE_NORM = "attention and MLP read the same norm; choose hook_resid_pre, attn.hook_in or mlp.hook_in"
_NORMALIZED = "the residual stream is normalized after attention and after the MLP; choose hook_resid_post"
EXPERTS = "this MLP is a mixture of experts, which has no one vector of neurons; choose hook_mlp_out"


def has_site(family: Family, hook: str) -> bool | str:
    """Whether the table has a site for ``hook``; a sentence when no such model has that tensor."""
    if layer_of(hook) is None:
        return hook == "hook_embed" or (hook == "ln_final.hook_in" and family.ln_final is not None)
    site = _block_sites(family).get(hook.split(".", 2)[2])
    return site if isinstance(site, str) else site is not None


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

    def name_of(self, site: Site) -> str | None:
        """The hook whose value is that of ``site``, which a module path names; None when there is none."""
        for name, own in self._sites.items():
            if own == replace(site, entry=None) or own == replace(site, entry=0):
                return name
        return None

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
    if config_is(family.config, "new_decoder_architecture", True):
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
