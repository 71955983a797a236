"""``Run``: the directory of one training, or any folder that holds an SAE; and ``load``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.refusals import system_refusals
from saebench.runs.checkpoints import checkpoints_of, load_checkpoint_sae, run_of
from saebench.runs.layout import METRICS_FILE, RUN_FILE, eval_file, read_evaluation, read_run
from saebench.runs.metrics_log import read_metrics, read_sessions
from saebench.runs.provenance import ContextSettings, Provenance, contexts_of_import
from saebench.runs.warnings import read_warnings
from saebench.saes.files import SPEC_FILE, WEIGHTS_FILE, load_sae, read_description, weights_hash
from saebench.sources.model_identity import same_model

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd
    import torch

    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.saes.spec import SaeSpec


class Run:
    """A run directory, finished or not; a folder that holds only an SAE; or one checkpoint of a run.

    A ``Run`` can be passed wherever the path of a run is expected. Files are read on access.

    Attributes:
        path: the directory.
        checkpoint: the checkpoint file, if the path names one.
        config: the TrainConfig, if `train` returned this run; None if it was opened from a path.
    """

    def __init__(self, path: str | PathLike[str], *, config: Any = None, spec: SaeSpec | None = None) -> None:
        named = Path(path)
        self.checkpoint = named if named.is_file() else None
        self.path = run_of(named) if self.checkpoint is not None else named
        self.config = config
        self._spec = spec

    def __fspath__(self) -> str:
        return str(self.checkpoint or self.path)

    def __repr__(self) -> str:
        if self._spec is None:
            return f"Run({self.__fspath__()!r})"
        return f"Run({str(self.path)!r}: {self.spec.name}, d_sae={self.spec.d_sae}, k={self.spec.k})"

    # Files ----------------------------------------------------------------------------------------

    @property
    def is_training_directory(self) -> bool:
        """Whether the directory has a ``run.json``, that is, whether a training was started in it."""
        return (self.path / RUN_FILE).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the directory has a ``sae.json``, the last file that a training writes."""
        return (self.path / SPEC_FILE).is_file()

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    def eval_file(self, inference: str | None = None) -> Path:
        """The path of the evaluation in one inference mode (None: the default mode); it need not exist."""
        return self.path / eval_file(inference)

    def evaluation(self, inference: str | None = None) -> dict[str, Any] | None:
        """The results of ``saebench eval`` in one inference mode; None if it was not run."""
        file = self.eval_file(inference)
        return read_evaluation(file) if file.exists() else None

    def metrics(self) -> pd.DataFrame:
        """One row per logged step, one column per metric; see `read_metrics`."""
        return read_metrics(self.path)

    def sessions(self) -> list[dict[str, Any]]:
        """The processes that ran the training; see `read_sessions`."""
        return read_sessions(self.path)

    def warnings(self) -> list[str]:
        """What is wrong with the result of the training, one sentence each; [] where all is well."""
        return read_warnings(self.path)

    def checkpoints(self) -> list[Path]:
        """The existing checkpoints, in the order of steps."""
        return checkpoints_of(self.path)

    def description(self) -> dict[str, Any]:
        """The contents of ``sae.json``: sae, d_in, spec, and the metadata it was saved with."""
        return read_description(self.path)

    def facts(self, *, needs: tuple[str, ...] = ("train", "sae", "cache_hash")) -> dict[str, Any]:
        """The contents of ``run.json``; see `read_run`."""
        return read_run(self.path, needs=needs)

    # The SAE --------------------------------------------------------------------------------------

    @property
    def spec(self) -> SaeSpec:
        """The settings of the architecture."""
        return self._spec if self._spec is not None else self.sae.spec

    @property
    def sae(self) -> SAE:
        """The trained SAE, read from the run directory."""
        return self.load()

    def load(self, *, device: str | torch.device = "cpu") -> SAE:
        """The trained SAE, or the SAE of the checkpoint.

        Raises:
            UserError: the folder holds no finished SAE, its format is newer, or a file is damaged.
        """
        if self.checkpoint is not None:
            return load_checkpoint_sae(self.checkpoint, device=device)
        if not self.is_finished:
            if self.is_training_directory:
                raise UserError(
                    f"the run {self.path} has not finished; finish it with saebench train ... --resume"
                )
            raise UserError(f"{self.path} holds no SAE (no {SPEC_FILE}); name a run directory")
        return load_sae(self.path, device=device)

    def weights_stamp(self) -> tuple[int, int]:
        """Modification time (ns) and size of the weights file, to detect that it was written again."""
        try:
            state = (self.path / WEIGHTS_FILE).stat()
        except OSError:
            return 0, 0
        return state.st_mtime_ns, state.st_size

    def may_be(self, info: Mapping[str, Any]) -> bool:
        """Whether sae, d_in and d_sae match a store's ``info``: a cheap check before hashing weights."""
        if not self.is_finished:
            return False
        try:
            found = self.description()
        except UserError:
            return False
        own = {"sae": found["sae"], "d_in": found["d_in"], "d_sae": found["spec"].get("d_sae")}
        return all(info.get(name, value) == value for name, value in own.items())

    def is_indexed_as(self, info: Mapping[str, Any]) -> bool:
        """Whether this is the SAE that a store describes with ``info`` (sae_hash; also sae, d_in, d_sae)."""
        if not self.may_be(info):
            return False
        try:
            return bool(weights_hash(self.load()) == info["sae_hash"])
        except UserError:  # an unreadable run is skipped: it may belong to another SAE
            return False

    # Origin ---------------------------------------------------------------------------------------

    @functools.cached_property
    def provenance(self) -> Provenance:
        """Hook, model, cache and contexts, as ``sae.json`` and ``run.json`` record them."""
        training = self.facts(needs=("train",)) if self.is_training_directory else {}
        facts = self.facts() if self.checkpoint is not None else self.description()
        cache = training.get("train", {}).get("cache")
        imported = facts.get("imported")
        source = facts if "contexts" in facts else training
        contexts = source.get("contexts")
        if imported:
            known = contexts_of_import(imported)
        else:
            known = ContextSettings.from_json(contexts) if isinstance(contexts, dict) else None
        return Provenance(
            hook_name=facts.get("hook_name"),
            model=facts.get("model"),
            cache=Path(cache) if cache is not None else None,
            cache_hash=facts.get("cache_hash") or training.get("cache_hash"),
            contexts=known,
            contexts_recorded=bool(imported) or "contexts" in source or not facts.get("model"),
        )

    def contexts(self) -> ContextSettings | None:
        """How the contexts of the activations were made; None for activations imported from an array.

        Runs of saebench 0.1 do not record this; it is read from their cache. A folder that names a model but
        neither contexts nor a cache gives None and prints a warning.

        Raises:
            UserError: the run is one of saebench 0.1 and its cache is not at the recorded path.
        """
        origin = self.provenance
        if origin.contexts_recorded:
            return origin.contexts
        if origin.cache is None:
            print(
                f"warning: {self} does not record how contexts were made; prompts begin with BOS if the "
                "tokenizer adds it (bos=True or bos=False overrides this)",
                file=sys.stderr,
            )
            return None
        place = self.find_cache()
        if place is None:
            raise UserError(
                f"{self} was trained by saebench 0.1, which did not record whether contexts begin with BOS, "
                f"and its cache {origin.cache} does not exist (seen from {Path.cwd()}); give bos=True or "
                "bos=False for a prompt, or name the cache"
            )
        from saebench.activations.cache import open_cache

        return ContextSettings.of_cache(open_cache(place))

    def __str__(self) -> str:
        return self.__fspath__()

    def find_cache(self) -> Path | None:
        """Path of the training's cache; None if it is not found.

        The recorded path is tried as it is and, if relative, from each folder above the run. If a hash is
        recorded, a cache counts as found only if its hash is equal.
        """
        origin = self.provenance
        if origin.cache is None:
            return None
        if origin.cache_hash is None:
            return origin.cache if origin.cache.exists() else None
        above = () if origin.cache.is_absolute() else self.path.resolve().parents
        places = [origin.cache, *(folder / origin.cache for folder in above)]
        return next((place for place in places if _cache_hash(place) == origin.cache_hash), None)

    def open_cache(self) -> ActivationCache:
        """The cache that the SAE was trained on.

        Raises:
            UserError: the run does not record its cache, or the cache was deleted or changed.
        """
        from saebench.activations.cache import open_cache

        recorded = self.provenance.cache
        if recorded is None:
            raise UserError(
                f"{self} does not say which cache its SAE was trained on; name it with --cache or cache=..."
            )
        place = self.find_cache()
        if place is None and recorded.exists():
            found = _cache_hash(recorded)
            # A cache that cannot be read raises its own error in open_cache.
            if found is None:
                return open_cache(recorded)
            raise UserError(
                f"{self} was trained on the cache {recorded}, which has changed since (its hash is "
                f"{found[:12]}..., the run says {str(self.provenance.cache_hash)[:12]}...); "
                "name the cache to use with --cache or cache=..."
            )
        if place is None:
            raise UserError(
                f"{self} was trained on the cache {recorded}, which is not there (seen from {Path.cwd()}); "
                "name it with --cache or cache=..."
            )
        return open_cache(place)

    def warn_of_other_model(self, cache: ActivationCache) -> None:
        """Print a warning if ``cache`` was made with another model than the SAE's training cache."""
        own, theirs = self.provenance.model, cache.model
        if own is None or theirs is None or own.get("hash") is None:
            return
        if not same_model(own, theirs):
            print(
                f"warning: {cache.path} holds activations of {theirs['name']} ({theirs['hash'][:12]}...), "
                f"but {self} was trained on those of {own['name']} ({own['hash'][:12]}...)",
                file=sys.stderr,
            )


def find_run(runs: Iterable[Run], info: Mapping[str, Any]) -> Run | None:
    """The first of ``runs`` whose SAE a store describes with ``info``; see `Run.is_indexed_as`."""
    return next((run for run in runs if run.is_indexed_as(info)), None)


@system_refusals()
def load(path: Path | str, *, device: str | torch.device = "cpu") -> SAE:
    """Load a trained SAE from a run directory or any folder with ``sae.json`` and ``sae.safetensors``.

    ``path`` can also be a checkpoint, ``RUN/checkpoints/step-NNNNNNNNN.safetensors``. Thresholds that are set
    only at the end of a training are not calibrated in a checkpoint.

    >>> sae = sb.load(run)
    >>> codes = sae.encode(cache.activations()[:8])
    >>> sae.decode(codes).shape[-1] == sae.d_in
    True

    Raises:
        UserError: the folder holds no finished SAE, its format is newer, or a file is damaged.
    """
    return Run(path).load(device=device)


def _cache_hash(place: Path) -> str | None:
    """Hash of the cache at ``place``; None if it does not exist or cannot be read."""
    from saebench.activations.manifest import read_cache_manifest

    try:
        return read_cache_manifest(place).hash
    except (UserError, OSError):
        return None
