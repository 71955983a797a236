"""``evaluate``: measure one run on held-out rows of a cache or on held-out documents of a text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import require_writable, write_json_atomic
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings
from saebench.evaluation.faithfulness import Contexts, FaithfulnessMetrics, faithfulness_metrics
from saebench.evaluation.inference_mode import InferenceMode
from saebench.evaluation.reconstruction import ReconstructionMeter, ReconstructionMetrics
from saebench.evaluation.report import EvalReport
from saebench.evaluation.samples import (
    cache_contexts,
    choose_rows,
    mean_over_contexts,
    mean_training_activation,
    text_contexts,
)
from saebench.evaluation.settings import EvalConfig
from saebench.runs.provenance import ContextSettings, require_same_model
from saebench.runs.run import Run

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.sources.models import Model

MOST_ROWS = 8192
WORKING_BYTES = 2**28
"""Memory for one fp32 matrix of [rows, latents] or [rows, vocabulary]."""


@accepts_settings(EvalConfig)
def evaluate(config: EvalConfig) -> EvalReport:
    """Measure the SAE of ``config.run`` and write ``eval.json`` into the run directory.

    An SAE with several inference modes is measured in the mode ``config.inference``. Modes other than the
    default have their own reports, ``eval-proxy.json`` and ``eval-oracle.json``. The mode ``oracle`` reads
    the gradient of the model's loss, which depends on the next tokens. For the reconstruction of cached rows
    it reads the gradients in the cache; for the model's predictions it computes them.

    The rows are the first ``config.tokens`` held-out rows of the cache. A model reads the contexts of exactly
    these rows, and exactly their positions are replaced. With a text, the rows are the model's activations on
    the held-out documents of the text, packed into contexts in the same way as in the cache.

    ce_mean uses the mean of the cache's training rows, or the mean of the measured rows if there is no cache
    of this model with training rows.

    >>> report = sb.evaluate(run, model="cache", quiet=True)
    >>> bool(report.explained_variance < 1), bool(report.kl > 0)
    (True, True)

    Raises:
        UserError: the run has no finished SAE, the cache or model does not fit the SAE, no row is held out,
            activations are not finite, the SAE does not have the mode ``inference``, or the cache lacks the
            gradients that this mode needs.
    """
    run = Run(config.run)
    device = pick_device(config.device)
    sae = run.load(device=device)
    mode = InferenceMode(sae, config.inference)
    require_writable(run.path, what="the run directory")
    measure = _on_cache if config.text is None else _on_text
    report = measure(config, mode, run, device)
    write_json_atomic(run.eval_file(None if mode.is_default else mode.inference), report.to_dict())
    return report


def _on_cache(config: EvalConfig, mode: InferenceMode, run: Run, device: torch.device) -> EvalReport:
    sae, cache = mode.sae, _open_cache(config, run)
    hook = config.hook or run.provenance.hook_name
    if hook is None and len(cache.hooks) > 1:
        raise UserError(
            f"{config.run} does not record its hook; pass --site, one of {', '.join(cache.hooks)}"
        )
    hook = cache.resolve_hook(hook)
    require_width(cache.d_in(hook), sae, hook, cache.path)
    gradients_ND = cache.gradients(hook) if mode.needs_gradients else None
    row_N = choose_rows(cache, rows=config.rows, tokens=config.tokens)
    contexts = cache_contexts(cache, row_N) if config.model is not None else None
    model = _load_model(config, cache.model, hook, sae, device) if config.model is not None else None

    size = max(1, min(MOST_ROWS, WORKING_BYTES // (4 * sae.d_sae)))
    meter = ReconstructionMeter(sae)
    with progress("eval", total=len(row_N), unit="tok", quiet=config.quiet) as bar:
        for part_N in torch.split(row_N, size):
            gradient_ND = None if gradients_ND is None else gradients_ND[part_N]
            mode.measure(meter, cache.activations(hook)[part_N], gradient_ND)
            bar.update(len(part_N))
    reconstruction = meter.result()
    if model is None or contexts is None:
        return _report(config, mode, hook, reconstruction, cache_hash=cache.hash)

    mean_D = mean_training_activation(cache, hook)
    faithfulness = faithfulness_metrics(
        sae,
        model,
        hook,
        _shown(contexts, config, model, sae),
        mean_activation=meter.mean() if mean_D is None else mean_D,
        reconstruct=mode.reconstruct,
        gradients=mode.needs_gradients,
    )
    return _report(config, mode, hook, reconstruction, faithfulness, model=model.name, cache_hash=cache.hash)


def _on_text(config: EvalConfig, mode: InferenceMode, run: Run, device: torch.device) -> EvalReport:
    """Reconstruction and faithfulness from the same forward passes."""
    sae = mode.sae
    origin = run.provenance
    hook = config.hook or origin.hook_name
    if hook is None:
        raise UserError(f"{config.run} does not record the hook that its SAE was trained on; pass --site")
    # With a text, the run's cache may have been deleted: it is used only for the mean activation.
    cache = _open_cache(config, run) if config.cache is not None or run.find_cache() is not None else None
    recorded = origin.model if cache is None else cache.model
    model = _load_model(config, recorded, hook, sae, device)
    made = run.contexts() if config.cache is None or cache is None else ContextSettings.of_cache(cache)
    contexts = text_contexts(config, model, made, keep_last=not mode.needs_gradients)

    mean_D = None
    if cache is not None and recorded is not None and recorded["hash"] == model.hash and hook in cache.hooks:
        mean_D = mean_training_activation(cache, hook)
    if mean_D is None:
        size = _contexts_at_once(contexts, config, model, sae)
        mean_D = mean_over_contexts(model, hook, contexts.batches(size))
    meter = ReconstructionMeter(sae)
    faithfulness = faithfulness_metrics(
        sae,
        model,
        hook,
        _shown(contexts, config, model, sae),
        mean_activation=mean_D,
        reconstruct=functools.partial(mode.measure, meter),
        gradients=mode.needs_gradients,
    )
    return _report(config, mode, hook, meter.result(), faithfulness, model=model.name)


def _open_cache(config: EvalConfig, run: Run) -> ActivationCache:
    """The cache in ``config``, or else the cache that the SAE was trained on."""
    from saebench.activations.cache import open_cache

    if config.cache is None:
        return run.open_cache()
    cache = open_cache(config.cache)
    run.warn_of_other_model(cache)
    return cache


def _load_model(
    config: EvalConfig, recorded: dict[str, Any] | None, hook: str, sae: SAE, device: torch.device
) -> Model:
    """The model to splice the SAE into; without a text, it must be the model that made the cache."""
    from saebench.sources.models import load_model, peek_model

    name, revision = config.model, config.revision
    if name == "cache":
        if recorded is None:
            raise UserError(
                "--model cache: neither the cache nor the run records a model; name the model itself"
            )
        name, revision = recorded["name"], recorded["revision"]
    assert name is not None
    info = peek_model(name, revision=revision)
    must_match = config.text is None or config.model == "cache"
    if must_match:
        require_same_model(
            info, recorded, made="made the cache", says="the cache says",
            way_out="name that model, or name a text with --text",
        )  # fmt: skip
    info.check_hook(hook)
    require_width(info.usual_hooks().get(hook, sae.d_in), sae, hook, name)
    model = load_model(name, revision=revision, device=device)
    require_width(model.hook_dim(hook), sae, hook, name)
    return model


def require_width(width: int, sae: SAE, hook: str, place: object) -> None:
    """Raise a UserError unless ``hook`` of ``place`` (a model or a cache) is as wide as the SAE."""
    if width != sae.d_in:
        raise UserError(
            f"the SAE reads {sae.d_in} dimensions but {hook} of {place} has {width}; "
            "name the hook, cache and model that it was trained on"
        )


def _contexts_at_once(contexts: Contexts, config: EvalConfig, model: Model, sae: SAE) -> int:
    """``config.batch_size``, or fewer, so that the logits and codes of a batch fit ``WORKING_BYTES``."""
    widest = max(model.vocab_size, sae.d_sae)
    return max(1, min(config.batch_size, WORKING_BYTES // (4 * contexts.tokens_BT.shape[1] * widest)))


def _shown(contexts: Contexts, config: EvalConfig, model: Model, sae: SAE) -> Iterator[Contexts]:
    """Batches of contexts, with a progress display."""
    total = int(contexts.keep_BT.sum())
    with progress("eval with the model", total=total, unit="tok", quiet=config.quiet) as bar:
        for batch in contexts.batches(_contexts_at_once(contexts, config, model, sae)):
            yield batch
            bar.update(int(batch.keep_BT.sum()))


def _report(
    config: EvalConfig,
    mode: InferenceMode,
    hook: str,
    reconstruction: ReconstructionMetrics,
    faithfulness: FaithfulnessMetrics | None = None,
    *,
    model: str | None = None,
    cache_hash: str | None = None,
) -> EvalReport:
    behavior = {}
    if faithfulness is not None:
        names = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_delta", "ce_loss_score", "kl")
        behavior = {name: getattr(faithfulness, name) for name in names}
        behavior["n_tokens_model"] = faithfulness.n_tokens
    return EvalReport(
        sae=mode.sae.spec.name,
        inference=mode.inference,
        d_sae=mode.sae.d_sae,
        k=mode.sae.k,
        hook_name=hook,
        n_tokens=reconstruction.n_tokens,
        rows=config.rows,
        cache_hash=cache_hash,
        text=config.text,
        fvu=reconstruction.fvu,
        explained_variance=reconstruction.explained_variance,
        l0=reconstruction.l0,
        dead_fraction=reconstruction.dead_fraction,
        cosine_similarity=reconstruction.cosine_similarity,
        density_histogram=reconstruction.density_histogram(),
        picks_changed=mode.picks_changed,
        model=model,
        **behavior,
    )
