"""``evaluate``: measure one run on held-out rows of a cache or on held-out documents of a text."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.activations.loader import side_by_side
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import require_writable, write_json_atomic
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings
from saebench.evaluation.faithfulness import Contexts, FaithfulnessMetrics, Spliced, faithfulness_metrics
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
from saebench.evaluation.splice import Splice
from saebench.evaluation.warnings import warnings_of
from saebench.runs.provenance import ContextSettings, require_same_model
from saebench.runs.run import Run
from saebench.saes.spec import SiteWidth
from saebench.sources.hook_names import is_residual
from saebench.sources.model_identity import same_model

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.sources.models import Model, ModelInfo

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

    For a transcoder the rows are those of its targets, and its reconstruction, made from what it reads in the
    same pass, replaces them. A crosscoder is given the activations of the unchanged model, and replaces all
    of its sites. With ``config.together``, further SAEs (the transcoders of other layers) are in the model in
    the same passes, and ce_zero and ce_mean replace all their targets, too.

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
    parts = [mode.inference] if not mode.is_default else []
    name = "-".join(filter(None, [*parts, "together" if config.together else None])) or None
    write_json_atomic(run.eval_file(name), report.to_dict())
    return report


def _on_cache(config: EvalConfig, mode: InferenceMode, run: Run, device: torch.device) -> EvalReport:
    sae, cache = mode.sae, _open_cache(config, run)
    hook = _named_site(config, sae) or run.provenance.hook_name
    if hook is None and len(cache.hooks) > 1:
        raise UserError(
            f"{config.run} does not record its hook; pass --site, one of {', '.join(cache.hooks)}"
        )
    splice = Splice.of(sae, cache.resolve_hook(hook))
    if config.model is not None and len(cache.models) > 1:
        names = " and ".join(str(model["name"]) for model in cache.models)
        raise UserError(
            f"{cache.path} has activations of several models, {names}, so no single one can be spliced; "
            "leave --model out"
        )
    for site in (*splice.sites, *splice.targets):
        require_width(cache.d_in(site.name), site, cache.path)
    gradients = (
        [cache.verified_gradients(site.name) for site in splice.targets] if mode.needs_gradients else None
    )
    row_N = choose_rows(cache, rows=config.rows, tokens=config.tokens)
    contexts = cache_contexts(cache, row_N) if config.model is not None else None
    model, beside = None, []
    if config.model is not None:
        info = _model_info(config, cache.model, splice)
        beside = _beside(config, info, cache, device)
        model = _load_model(info, splice, beside, device)

    size = max(1, min(MOST_ROWS, WORKING_BYTES // (4 * sae.d_sae)))
    meter = ReconstructionMeter(sae)
    with progress("eval", total=len(row_N), unit="tok", quiet=config.quiet) as bar:
        for part_N in torch.split(row_N, size):
            gradient_NE = None if gradients is None else side_by_side(gradients, part_N)
            x_ND, target_NE = splice.rows(cache, part_N)
            mode.measure(meter, x_ND, gradient_NE, target_NE=target_NE)
            bar.update(len(part_N))
    reconstruction = meter.result()
    if model is None or contexts is None:
        return _report(config, mode, splice, reconstruction, cache_hash=cache.hash)

    mean_E = _mean_at(splice, cache)
    faithfulness = faithfulness_metrics(
        sae,
        model,
        splice,
        _shown(contexts, config, model, sae),
        mean_activation=meter.mean() if mean_E is None else mean_E,
        reconstruct=mode.reconstruct,
        gradients=mode.needs_gradients,
        beside=beside,
    )
    return _report(
        config, mode, splice, reconstruction, faithfulness, model=model.name, cache_hash=cache.hash
    )


def _on_text(config: EvalConfig, mode: InferenceMode, run: Run, device: torch.device) -> EvalReport:
    """Reconstruction and faithfulness from the same forward passes (a transcoder's rows from one more)."""
    sae = mode.sae
    origin = run.provenance
    hook = _named_site(config, sae) or origin.hook_name
    if hook is None:
        raise UserError(f"{config.run} does not record the hook that its SAE was trained on; pass --site")
    splice = Splice.of(sae, hook)
    # With a text, the run's cache may have been deleted: it is used only for the mean activation.
    cache = _open_cache(config, run) if config.cache is not None or run.find_cache() is not None else None
    recorded = origin.model if cache is None else cache.model
    info = _model_info(config, recorded, splice)
    fits = cache is not None and recorded is not None and same_model(recorded, info.to_json())
    beside = _beside(config, info, cache if fits else None, device)
    model = _load_model(info, splice, beside, device)
    made = run.contexts() if config.cache is None or cache is None else ContextSettings.of_cache(cache)
    contexts = text_contexts(config, model, made, keep_last=not mode.needs_gradients)

    mean_E = None
    if cache is not None and fits and splice.target_names <= set(cache.hooks):
        mean_E = _mean_at(splice, cache)
    if mean_E is None:
        size = _contexts_at_once(contexts, config, model, sae)
        means = [mean_over_contexts(model, site.name, contexts.batches(size)) for site in splice.targets]
        mean_E = torch.cat(means)
    meter = ReconstructionMeter(sae)
    batches = _shown(contexts, config, model, sae)
    if not splice.is_plain:
        batches = _measured(batches, mode, meter, splice, model)
    faithfulness = faithfulness_metrics(
        sae,
        model,
        splice,
        batches,
        mean_activation=mean_E,
        reconstruct=functools.partial(mode.measure, meter) if splice.is_plain else mode.reconstruct,
        gradients=mode.needs_gradients,
        beside=beside,
    )
    return _report(config, mode, splice, meter.result(), faithfulness, model=model.name)


def _measured(
    batches: Iterable[Contexts],
    mode: InferenceMode,
    meter: ReconstructionMeter,
    splice: Splice,
    model: Model,
) -> Iterator[Contexts]:
    """The same contexts, whose rows at the sites and targets are measured as they pass."""
    for batch in batches:
        x_BTD, y_BTE = splice.read(model, batch.tokens_BT)
        keep_BT = batch.keep_BT.to(x_BTD.device)
        gradient_NE = None
        if mode.needs_gradients:
            names = [site.name for site in splice.targets]
            gradient_BTE = splice.target_of(model.gradients(batch.tokens_BT, batch.length_B, names)[1])
            gradient_NE = gradient_BTE[keep_BT]
        mode.measure(meter, x_BTD[keep_BT], gradient_NE, target_NE=y_BTE[keep_BT])
        yield batch


def _named_site(config: EvalConfig, sae: SAE) -> str | None:
    """The site that ``config`` names; a transcoder or crosscoder has its own."""
    if config.hook is not None and sae.spec.sites:
        raise UserError(
            f"--site {config.hook}: {config.run} reads {', '.join(site.name for site in sae.spec.sites)} and "
            f"reconstructs {', '.join(site.name for site in sae.spec.targets)}; leave --site out"
        )
    return config.hook


def _mean_at(splice: Splice, cache: ActivationCache) -> Tensor | None:
    """[d_out] float32, the mean of the targets over training rows; None without any."""
    means = [mean_training_activation(cache, site.name) for site in splice.targets]
    known = [mean for mean in means if mean is not None]
    return torch.cat(known) if len(known) == len(means) else None


def _beside(
    config: EvalConfig, info: ModelInfo, cache: ActivationCache | None, device: torch.device
) -> list[Spliced]:
    """The SAEs of ``config.together``, checked as far as that is possible before the model is loaded."""
    made = []
    for path in config.together:
        run = Run(path)
        sae, hook = run.load(device=device), run.provenance.hook_name
        if hook is None:
            raise UserError(f"{path} does not record the hook that its SAE was trained on; leave it out")
        splice = Splice.of(sae, hook)
        require_same_model(
            info, run.provenance.model, made=f"{path} was trained on", says="the run says",
            way_out="leave it out of --together",
        )  # fmt: skip
        require_fit_of_info(splice, info)
        places = [run.open_cache()] if run.find_cache() is not None else []
        fitting = [c for c in (cache, *places) if c is not None and splice.target_names <= set(c.hooks)]
        mean_E = _mean_at(splice, fitting[0]) if fitting else None
        if mean_E is None:
            raise UserError(
                f"no cache with {', '.join(splice.target_names)} is there for the mean activation that "
                f"{path} is compared with; restore the cache that it was trained on"
            )
        made.append(Spliced(splice, InferenceMode(sae, None).reconstruct, mean_E))
    return made


def _open_cache(config: EvalConfig, run: Run) -> ActivationCache:
    """The cache in ``config``, or else the cache that the SAE was trained on."""
    from saebench.activations.cache import open_cache

    if config.cache is None:
        return run.open_cache()
    cache = open_cache(config.cache)
    run.warn_of_other_model(cache)
    return cache


def _model_info(config: EvalConfig, recorded: dict[str, Any] | None, splice: Splice) -> ModelInfo:
    """The model to splice the SAE into; without a text, it must be the model that made the cache."""
    from saebench.sources.encoder import require_causal
    from saebench.sources.models import peek_model

    name, revision = config.model, config.revision
    if name == "cache":
        if recorded is None:
            raise UserError(
                "--model cache: neither the cache nor the run records a model; name the model itself"
            )
        name, revision = recorded["name"], recorded.get("revision")
    assert name is not None
    info = peek_model(name, revision=revision)
    must_match = config.text is None or config.model == "cache"
    if must_match:
        require_same_model(
            info, recorded, made="made the cache", says="the cache says",
            way_out="name that model, or name a text with --text",
        )  # fmt: skip
    require_causal(info)
    require_fit_of_info(splice, info)
    return info


def _load_model(info: ModelInfo, splice: Splice, beside: list[Spliced], device: torch.device) -> Model:
    from saebench.sources.models import load_model

    model = load_model(info.name, revision=info.revision, device=device)
    for one in (splice, *(other.splice for other in beside)):
        require_fit(one, model)
    return model


def require_fit_of_info(splice: Splice, info: ModelInfo) -> None:
    """What `require_fit` finds without loading the model; other widths are measured."""
    splice.require_one_model()
    for site in dict.fromkeys((*splice.sites, *splice.targets)):
        info.check_hook(site.name)
        if is_residual(site.name):
            require_width(info.d_model, site, info.name)


def require_fit(splice: Splice, model: Model) -> None:
    """Raise a UserError unless every site and target of ``model`` is as wide as in the SAE."""
    for site in dict.fromkeys((*splice.sites, *splice.targets)):
        require_width(model.hook_dim(site.name), site, model.name)


def require_width(width: int, site: SiteWidth, place: object) -> None:
    """Raise a UserError unless ``site`` of ``place`` (a model or a cache) is as wide as in the SAE."""
    if width != site.width:
        raise UserError(
            f"the SAE reads {site.width} dimensions but {site.name} of {place} has {width}; "
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
    splice: Splice,
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
    ordinary = reconstruction.fvu_ordinary
    found = [*Run(config.run).warnings(), *warnings_of(reconstruction, mode.sae, faithfulness)]
    for sentence in found:
        print(f"warning: {config.run}: {sentence}", file=sys.stderr)
    return EvalReport(
        sae=mode.sae.spec.name,
        inference=mode.inference,
        d_sae=mode.sae.d_sae,
        k=mode.sae.k,
        hook_name=splice.sites[0].name,
        sites=None if splice.is_plain else [site.name for site in splice.sites],
        targets=None if splice.is_plain else [site.name for site in splice.targets],
        fvu_by_site=reconstruction.fvu_by_site,
        together=[str(path) for path in config.together] or None,
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
        massive_rows=reconstruction.massive_rows or None,
        fvu_ordinary=ordinary,
        explained_variance_ordinary=None if ordinary is None else 1 - ordinary,
        warnings=found or None,
        picks_changed=mode.picks_changed,
        model=model,
        **behavior,
    )
