"""AttachedSAE: an SAE together with the model and hook that it reads, and tokenized prompts.

Shapes: T tokens of a prompt.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.settings import takes_shown_names
from saebench.evaluation.measure import require_fit, require_fit_of_info
from saebench.evaluation.splice import Splice
from saebench.runs.provenance import Provenance, require_same_model
from saebench.runs.run import Run
from saebench.saes.base import SAE
from saebench.sources.encoder import require_causal
from saebench.store.sites import comparable_rows, site_std
from saebench.store.text import token_text

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.sources.models import Model

Positions = int | slice | Iterable[int] | None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as token ids, as the model reads it."""

    ids: tuple[int, ...]
    """Token ids, with BOS first if the contexts of the SAE's cache begin with it."""
    tokens: tuple[str, ...]
    r"""The text of each token; bytes that are not a whole character appear as ``\xf0``."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids_1T(self) -> Tensor:
        return torch.tensor([self.ids])


@dataclass(frozen=True)
class AttachedSAE:
    """An SAE with the model and hook that it reads; ``bos`` is the token id that begins prompts, or None.

    A transcoder or crosscoder has further sites and targets; ``hook`` is the first that it reads.
    """

    sae: SAE
    model: Model
    hook: str
    bos: int | None
    vocab: list[bytes]
    """The bytes of each token id."""

    @property
    def splice(self) -> Splice:
        """The sites that the SAE reads and writes."""
        return Splice.of(self.sae, self.hook)

    def activations(self, ids_1T: Tensor) -> Tensor:
        """[T, d_in] what the SAE reads of one context."""
        return self.splice.input_of(self.model.run_to(ids_1T, [site.name for site in self.splice.sites]))[0]

    def gradients(self, ids_1T: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d_in] and y [T, d_out] of one context, and d of(logits) / dy [T, d_out]."""
        splice, length = self.splice, torch.tensor([ids_1T.shape[1]])
        found, gradients = self.model.gradients(ids_1T, length, splice.names, of=of)
        return splice.input_of(found)[0], splice.target_of(found)[0], splice.target_of(gradients)[0]

    def read(self, text: str, *, new_tokens: int = 0) -> TokenizedPrompt:
        """Tokenize ``text`` as a harvest does; ``new_tokens`` more must fit into the model's context.

        Raises:
            UserError: ``text`` is not a string, is not valid Unicode, is empty, or is too long.
        """
        if not isinstance(text, str):
            raise UserError(f"text is {text!r:.60}, which is not a string; give the text of one prompt")
        try:
            ids = self.model.tokens.encode(text.encode().decode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"text has the character {text[error.start]!r} at position {error.start}, which is not valid "
                "Unicode; give a str of valid Unicode characters"
            ) from None
        if not ids:
            raise UserError(f"text is {text!r}, which has no token; give at least one word")
        if self.bos is not None:
            ids = [self.bos, *ids]
        limit = self.model.info.n_ctx
        if limit is not None and len(ids) + new_tokens > limit:
            more, way_out = (
                (f" and {new_tokens} new ones", " or lower new_tokens") if new_tokens else ("", "")
            )
            raise UserError(
                f"text has {len(ids)} tokens{more}, but {self.model.name} reads at most {limit}; "
                f"shorten it{way_out}"
            )
        return TokenizedPrompt(tuple(ids), tuple(token_text(self.vocab[id]) for id in ids))

    def text(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not a whole character become a replacement character."""
        return b"".join(self.vocab[id] for id in ids).decode("utf-8", "replace")


@takes_shown_names
def attach(
    sae: SAE | str | PathLike[str],
    model: Model | str = "cache",
    hook: str | None = None,
    bos: bool | None = None,
) -> AttachedSAE:
    """Load ``sae`` (a run directory, or an SAE in memory) and ``model``, and check that they and ``site``
    fit.

    ``model`` 'cache' is the model that the SAE was trained on, as recorded in the run; ``site`` None is the
    hook recorded there. With ``bos`` None prompts begin with BOS if the contexts of the training did; when
    the run does not record that, if the tokenizer adds BOS by default.

    Raises:
        UserError: no such SAE, model or hook, a model other than the one that the SAE was trained on, a hook
            of another width, or an SAE in memory without ``model`` and ``site``.
    """
    from saebench.sources.models import Model, load_model, peek_model

    if not isinstance(model, str | Model):
        raise UserError(f"model is {model!r:.60}; give a name, or a model from saebench.load_model")
    run = None if isinstance(sae, SAE) else Run(run_folder(sae))
    origin = Provenance() if run is None else run.provenance
    recorded = origin.model
    if hook is None and (hook := origin.hook_name) is None:
        raise UserError("the hook that this SAE was trained at is not recorded; give it with site=...")
    if isinstance(model, str):
        name, revision = model, None
        if model == "cache":
            if recorded is None:
                raise UserError(
                    "the model that this SAE was trained on is not recorded; give it with model=..."
                )
            name, revision = recorded["name"], recorded.get("revision")
        info = peek_model(name, revision=revision)
    else:
        info = model.info
    require_same_model(
        info, recorded, made=f"{sae} was trained on", says="the SAE says",
        way_out="give that model, or saebench.load(...) with model and hook to skip this check",
    )  # fmt: skip
    if bos is None and run is not None and (contexts := run.contexts()) is not None:
        bos = contexts.bos
    device = pick_device("auto") if isinstance(model, str) else model.device
    loaded = sae if isinstance(sae, SAE) else Run(sae).load(device=device)
    splice = Splice.of(loaded, hook)
    require_causal(info)
    require_fit_of_info(splice, info)
    if isinstance(model, str):
        model = load_model(info.name, revision=info.revision, device=device)
    require_fit(splice, model)
    return AttachedSAE(loaded, model, hook, _bos(model, bos), model.token_bytes())


def read_sae(sae: SAE | str | PathLike[str], name: str) -> tuple[SAE, Provenance]:
    """Load the SAE given as the argument ``name``; returns it with its provenance.

    Raises:
        UserError: neither an SAE nor a directory that holds one.
    """
    if isinstance(sae, SAE):
        return sae, Provenance()
    run = Run(run_folder(sae, name))
    return run.load(device=pick_device("auto")), run.provenance


def decoder_rows(sae: SAE | str | PathLike[str], loaded: SAE) -> Tensor:
    """[M, d_out]: the decoder rows of ``loaded``, as they are compared by cosine.

    Those of a crosscoder are in units in which every site varies alike, as in its training: else the site
    with the largest activations would decide alone. They need the cache of its run; of an SAE in memory, or
    without its cache, the rows are as they are, with a warning.
    """
    if not loaded.spec.is_crosscoder:
        return loaded.W_dec
    run = None if isinstance(sae, SAE) else Run(run_folder(sae))
    if run is None or run.find_cache() is None:
        print(
            "warning: without the cache that this crosscoder was trained on, decoder rows are compared in "
            "the units of its sites, and the site with the largest activations decides; name its run",
            file=sys.stderr,
        )
        return loaded.W_dec
    return comparable_rows(loaded, site_std(run.open_cache(), loaded.spec.sites))[1]


def open_for(
    *saes: SAE | str | PathLike[str], cache: ActivationCache | str | PathLike[str] | None
) -> ActivationCache:
    """Open ``cache``; None is the cache that the first of ``saes`` that records one was trained on."""
    from saebench.activations.cache import ActivationCache, open_cache

    runs = [Run(run_folder(sae)) for sae in saes if not isinstance(sae, SAE)]
    if cache is None:
        own = next((run for run in runs if run.provenance.cache is not None), None)
        if own is None:
            raise UserError("the cache that the SAE was trained on is not recorded; give it with cache=...")
        return own.open_cache()
    opened = cache if isinstance(cache, ActivationCache) else open_cache(Path(cache))
    for run in runs:
        run.warn_of_other_model(opened)
    return opened


def run_folder(sae: object, name: str = "sae") -> Path:
    """``sae`` as a path; raises a UserError when the argument ``name`` is neither a str nor a path."""
    if not isinstance(sae, str | os.PathLike):
        raise UserError(f"{name} is {sae!r:.60}; give a run directory, or an SAE from saebench.load")
    return Path(sae)


def check_features(features: int | Iterable[int], sae: SAE) -> list[int]:
    """One or several latents as a list without repeats, in the given order.

    Raises:
        UserError: no latent, or one that the SAE does not have.
    """
    found: list[int] = []
    for feature in _listed(features, "features"):
        if not 0 <= feature < sae.d_sae:
            raise UserError(
                f"feature is {feature}, but the SAE has {sae.d_sae:,} latents; give 0 to {sae.d_sae - 1}"
            )
        found.append(feature)
    if not found:
        raise UserError("features is empty; give at least one latent")
    return list(dict.fromkeys(found))


def check_positions(positions: Positions, length: int) -> list[int]:
    """Sorted positions in a prompt of ``length`` tokens; None means all except position 0.

    Raises:
        UserError: a position outside the prompt (negative ones count from its end).
    """
    if positions is None:
        return list(range(1, length))
    if isinstance(positions, slice):
        return sorted(range(length)[positions])
    found = set()
    for position in _listed(positions, "positions"):
        if not -length <= position < length:
            raise UserError(
                f"position {position} is outside the text, which has {length} tokens; give 0 to {length - 1}"
            )
        found.add(position % length)
    return sorted(found)


def _listed(numbers: Any, name: str) -> list[int]:
    try:
        return [
            operator.index(number) for number in (numbers if isinstance(numbers, Iterable) else [numbers])
        ]
    except TypeError:
        raise UserError(f"{name} is {numbers!r:.60}; give whole numbers") from None


def _bos(model: Model, bos: bool | None) -> int | None:
    """The BOS token id that begins prompts, or None."""
    if bos is None:
        bos = model.tokens.adds_bos()
    if bos and model.tokens.bos is None:
        raise UserError(f"bos is True, but the tokenizer of {model.name} has no BOS token; give bos=False")
    return model.tokens.bos if bos else None
