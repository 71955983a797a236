"""ModelInfo: a model's files, hash, sizes and usual hooks, read from its config without loading weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saebench.core.errors import UserError
from saebench.core.heads import head_of
from saebench.core.reading import read_json, require_file
from saebench.sources.base import Axes
from saebench.sources.families import Family, family_of
from saebench.sources.family_sites import has_site
from saebench.sources.hook_names import is_rare, layer_of, unknown_hook
from saebench.sources.model_identity import HASHED_SUFFIXES, IDENTITY, hashes_of_folder
from saebench.sources.native import parse_site
from saebench.sources.pretrained import module_paths

_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHT_FILES = ["*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_MOST = 2**27
_MOST_LAYERS = 10_000
"""Limits of the sizes of models: a library that is asked for more runs until memory is full."""
_PER_HEAD = re.compile(r"\.attn\.hook_[qkvz]$")


@dataclass(frozen=True)
class ModelInfo:
    """A model as its config describes it.

    ``folder`` holds its files; the folder of a hub model may have no weights yet. ``hash`` is the SHA-256
    over the names and contents of the weight, config and tokenizer files of a local folder, or over the name
    and commit of a hub model. ``identity`` is that over the weights by tensor, the config and the tokenizer,
    which other files in the folder do not change; None for a hub model (see model_identity.py).
    ``revision`` is that commit, and None for a local folder. ``family`` says where the modules of its
    architecture are; None when only TransformerLens knows.
    """

    name: str
    folder: Path
    revision: str | None
    hash: str
    n_layers: int
    d_model: int
    d_mlp: int
    d_heads: int
    d_key_value: int
    d_head: int
    vocab_size: int
    n_ctx: int | None
    family: Family | None = field(repr=False, compare=False, default=None)
    identity: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What manifests record: enough to load the same model again and to check that it is the same."""
        known = {} if self.identity is None else {IDENTITY: self.identity}
        return {"name": self.name, "revision": self.revision, "hash": self.hash, **known}

    def usual_hooks(self) -> dict[str, int]:
        """Names and widths of the hooks that most models have, computed from the config."""
        widths = {
            "hook_resid_pre": self.d_model,
            "hook_resid_mid": self.d_model,
            "hook_resid_post": self.d_model,
            "hook_attn_out": self.d_model,
            "hook_mlp_out": self.d_model,
            "mlp.hook_pre": self.d_mlp,
            "mlp.hook_post": self.d_mlp,
            "attn.hook_q": self.d_heads,
            "attn.hook_k": self.d_key_value,
            "attn.hook_v": self.d_key_value,
            "attn.hook_z": self.d_heads,
        }
        return {f"blocks.{i}.{name}": width for i in range(self.n_layers) for name, width in widths.items()}

    def axes_of(self, hook: str, width: int) -> Axes:
        """The axes of one row of ``hook``: heads x d_head for queries, keys, values and z, else one axis."""
        if head_of(hook)[1] is not None:
            return (("d_head", width),)
        if _PER_HEAD.search(hook) and width % self.d_head == 0:
            return ("head", width // self.d_head), ("d_head", self.d_head)
        return (("d", width),)

    def check_hook(self, hook: str) -> None:
        """Raise a UserError for a hook or module path that a model with this config cannot have.

        Raises:
            UserError: a layer beyond the last, or an unknown name; the sentence gives the nearest names.
        """
        usual = self.usual_hooks()
        layer = layer_of(hook)
        whole, head = head_of(hook)
        n_heads = usual.get(whole, 0) // self.d_head
        if head is not None and 0 < n_heads <= head:
            raise UserError(
                f"--site {hook}: {self.name} has {n_heads} heads at {whole}; give one from 0 to {n_heads - 1}"
            )
        hook = whole
        if layer is not None and layer >= self.n_layers:
            raise UserError(
                f"--site {hook} is beyond the {self.n_layers} layers of {self.name}; "
                f"give a hook in blocks.0 to blocks.{self.n_layers - 1}"
            )
        if self.family is not None and isinstance(reason := has_site(self.family, hook), str):
            raise UserError(f"--site {hook} is not a hook of {self.name}: {reason}")
        if hook not in usual and not is_rare(hook) and not self._has_module(hook):
            modules = [] if "hook" in hook else sorted(module_paths(str(self.folder)))
            what = "module" if modules else "hook"
            raise UserError(unknown_hook(hook, modules or list(usual), self.name, what))

    def path_of(self, hook: str) -> Literal["native", "bridge"]:
        """What `Model.path_of` says of a hook that the model has, known before it is loaded."""
        hook, _ = head_of(hook)
        in_table = self.family is not None and has_site(self.family, hook) is True
        return "native" if in_table or self._has_module(hook) else "bridge"

    def _has_module(self, hook: str) -> bool:
        return parse_site(hook).path in module_paths(str(self.folder))


def peek_model(
    name: str, *, revision: str | None = None, local_only: bool = False, need_weights: bool = True
) -> ModelInfo:
    """The `ModelInfo` of model ``name``: reads config.json and hashes files, but loads no weights.

    ``name`` is 'demo', 'smollm2', a local Hugging Face folder, or a hub name. Of a hub model only the config
    and tokenizer files are downloaded; with ``local_only`` nothing is. Without ``need_weights`` a local
    folder may lack them; it then has another hash.

    Raises:
        UserError: no such model, a folder without config or weights, or a hub that cannot be
            reached.
    """
    from transformers import AutoConfig

    from saebench.assets import resolve_model

    source = resolve_model(name)
    if isinstance(source, Path):
        if revision is not None:
            raise UserError(f"--revision {revision} is for models from a hub, but {name} is a local folder")
        folder, commit = source, None
        if need_weights:
            _require_weights(folder, name)
    elif local_only:
        raise UserError(f"model {name} is not a local folder; give the path of a Hugging Face model folder")
    else:
        folder = fetch(source, revision, _DESCRIPTION_FILES)
        commit = folder.name
    _require_files(folder)
    if commit is None:
        hashed, identity = hashes_of_folder(folder)
    else:
        hashed, identity = hashlib.sha256(f"{source}@{commit}".encode()).hexdigest(), None
    try:
        # Without an explicit False the library asks on the terminal whether to run the folder's own code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = config.get_text_config()
        d_model, heads = int(config.hidden_size), int(config.num_attention_heads)
        d_head = int(getattr(config, "head_dim", None) or d_model // heads)
        sizes = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim"))
        d_mlp = next((size for size in sizes if size), 4 * d_model)
        if not 0 < config.num_hidden_layers < _MOST_LAYERS:
            raise ValueError(f"it has {config.num_hidden_layers} layers")
        if not all(0 < size < _MOST for size in (d_model, heads, d_head, d_mlp, config.vocab_size)):
            raise ValueError(f"a size is not between 1 and {_MOST - 1}")
        n_ctx = getattr(config, "max_position_embeddings", None)
        return ModelInfo(
            name=name,
            folder=folder,
            revision=commit,
            hash=hashed,
            identity=identity,
            n_layers=int(config.num_hidden_layers),
            d_model=d_model,
            d_mlp=int(d_mlp),
            d_heads=heads * d_head,
            d_key_value=_key_value_heads(config) * d_head,
            d_head=d_head,
            vocab_size=int(config.vocab_size),
            n_ctx=int(n_ctx) if n_ctx else None,
            family=family_of(config),
        )
    except Exception as error:  # each config class raises errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name}: config.json does not describe a language model ({reason}); harvest other "
            "models in Python with sb.ModuleSource"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """True for a model folder with the files of a tokenizer."""
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def fetch_weights(info: ModelInfo) -> Path:
    """The folder with all files of the model; downloads a hub model's weights (safetensors only)."""
    if info.revision is None:
        return info.folder
    folder = fetch(info.name, info.revision, _DESCRIPTION_FILES + _WEIGHT_FILES)
    _require_weights(folder, info.name)
    return folder


def fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a hub model into the cache of huggingface_hub; the name of the folder is the commit.

    Raises:
        UserError: the model or revision does not exist, access is restricted, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UserError(
            f"access to model {name} is restricted; request it on the hub and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"model {name} has no revision {revision!r} on the hub; give a branch, tag or commit of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model {name!r} is neither a local folder nor a model on the hub; check the name"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if HF_HUB_OFFLINE:
            raise UserError(
                f"model {name!r} is neither a local folder nor downloaded yet, and this process downloads "
                f"nothing (HF_HUB_OFFLINE is set); run `hf download {name}` first"
            ) from None
        raise UserError(
            f"model {name!r} is not a local folder, and the hub cannot be reached ({type(error).__name__}); "
            "check the name and the network, or use --model demo"
        ) from None
    except errors.HFValidationError:
        raise UserError(
            f"model {name!r} is neither a local folder nor a valid hub name; give a folder or owner/name"
        ) from None


def _key_value_heads(config: Any) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _require_weights(folder: Path, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name} has no *.safetensors in {folder}; convert its weights to safetensors first"
        )


def _require_files(folder: Path) -> None:
    """Refuse pipes and devices in a model's folder, which libraries would wait for, and JSON that is none."""
    for path in sorted(folder.iterdir()):
        if path.suffix in HASHED_SUFFIXES and not path.is_dir():
            require_file(path, what="the model's file", way_out="download it again")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name, what="the model's", nonfinite=True, way_out="download it again")
