"""The origin of an SAE: its hook, model and activation cache, and how the contexts were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.sources.model_identity import same_model

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.sources.model_info import ModelInfo


@dataclass(frozen=True)
class ContextSettings:
    """How the contexts of harvested activations were made. None means not known."""

    ctx: int | None = None
    """Tokens per context."""
    bos: bool | None = None
    """Whether each context begins with the BOS token."""
    keep_first: bool | None = None
    """Whether position 0 of each context is stored as a row."""
    keep_last: bool = True
    """Whether the last position of each context, which has no next token, is stored as a row."""
    text: str | None = None
    """Name of the text."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose positions are not stored as rows."""
    max_norms: Mapping[str, float] = field(default_factory=dict)
    """Hook -> the norm above which a position is not stored as a row, at any hook."""

    @classmethod
    def of_cache(cls, cache: ActivationCache) -> ContextSettings | None:
        """The settings of a harvested cache; None for a cache that was imported from an array."""
        return cls._of_manifest(cache.manifest)

    @classmethod
    def _of_manifest(cls, manifest: Mapping[str, Any]) -> ContextSettings | None:
        made_from = manifest["made_from"]
        if not (made_from.get("model") or made_from.get("models")):
            return None
        settings = made_from["settings"]
        text = made_from.get("text")
        return cls.from_json({
            "ctx": settings.get("ctx"), "bos": settings.get("bos"), "keep_first": settings.get("keep_first"),
            "keep_last": not settings.get("gradients", False),
            "text": text.get("name") if isinstance(text, dict) else None,
            "exclude_tokens": settings.get("exclude_tokens"),
            "max_norms": (manifest.get("max_norm") or {}).get("limit"),
        })  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ContextSettings:
        """The inverse of ``to_json``; values of an unexpected type count as not known."""
        ctx, text = values.get("ctx"), values.get("text")
        tokens, norms = values.get("exclude_tokens"), values.get("max_norms")
        tokens = tokens if isinstance(tokens, list | tuple) else ()
        norms = norms if isinstance(norms, Mapping) else {}
        flags = {name: values.get(name) for name in ("bos", "keep_first")}
        return cls(
            ctx=ctx if isinstance(ctx, int) and not isinstance(ctx, bool) and ctx >= 2 else None,
            keep_last=values.get("keep_last") is not False,
            text=text if isinstance(text, str) else None,
            exclude_tokens=tuple(token for token in tokens if type(token) is int),
            max_norms={hook: norm for hook, norm in norms.items() if type(norm) in (int, float)},
            **{name: flag if isinstance(flag, bool) else None for name, flag in flags.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as stored in ``run.json`` and ``sae.json`` under ``contexts``."""
        values = asdict(self)
        values["exclude_tokens"] = list(self.exclude_tokens)
        return {name: value for name, value in values.items() if value != [] and value != {}}


@dataclass(frozen=True)
class Provenance:
    """The origin of an SAE as its run or folder records it. None means not recorded."""

    hook_name: str | None = None
    model: dict[str, Any] | None = None
    """Name, revision and hash."""
    cache: Path | None = None
    """The path of the cache that the training was given."""
    cache_hash: str | None = None
    contexts: ContextSettings | None = None
    contexts_recorded: bool = True
    """False if a version that did not record ``contexts`` wrote the run."""


def contexts_of_import(imported: Mapping[str, Any]) -> ContextSettings | None:
    """Context settings from SAELens's context_size, prepend_bos and seqpos_slice; None without any."""
    if not {"context_size", "prepend_bos", "seqpos_slice"} & set(imported):
        return None
    positions = imported.get("seqpos_slice")
    start = positions[0] if isinstance(positions, list) and len(positions) > 1 else None
    return ContextSettings.from_json({
        "ctx": imported.get("context_size"), "bos": imported.get("prepend_bos"),
        "keep_first": None if positions is None else start in (None, 0),
        "text": imported.get("dataset_path"),
    })  # fmt: skip


def require_same_model(
    info: ModelInfo, recorded: Mapping[str, Any] | None, *, made: str, says: str, way_out: str
) -> None:
    """Check that ``info`` describes the ``recorded`` model, if one is recorded.

    Args:
        made: completes "the model X is not the one that ..." in the error.
        says: who recorded the hash, such as "the cache says".
        way_out: what the user can do.

    Raises:
        UserError: they differ.
    """
    known = None if recorded is None else recorded.get("hash")
    if recorded is not None and known is not None and not same_model(info.to_json(), recorded):
        raise UserError(
            f"the model {info.name} is not the one that {made} (its hash is {info.hash[:12]}..., {says} "
            f"{known[:12]}...); {way_out}"
        )
