"""Runs every command and every public function of saebench on small inputs with fixed seeds.

``produce(folder)`` leaves all files in ``folder``: caches, runs, stores and exports where the commands put
them, the ``--json`` output of every command in ``commands/``, the answers of the Python API in ``answers/``.
It uses the console script and the names in ``sb.__all__`` only, so it runs on any version of saebench,
whatever its modules are called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOOKS = ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
ARCHITECTURES: dict[str, str] = {
    "topk": "",
    "gradient": "--beta 0.5",
    "mutual-choice": "",
    "feature-choice": "",
    "matching-pursuit": "",
    "matryoshka": "--prefixes 0.25 --prefixes 1.0",
    "jumprelu": "",
    "gated": "",
    "relu": "",
}
"""Architecture -> further flags of its run."""
FIGURES = (
    "decoder_scatter",
    "density_histogram",
    "histogram",
    "matching_similarity",
    "prompt_heatmap",
    "score_distribution",
    "steering_curve",
    "training_curves",
)
COMMANDS = (
    "demo",
    "harvest",
    "cache info",
    "cache verify",
    "cache import",
    "train",
    "eval",
    "compare",
    "index",
    "explain",
    "store info",
    "store check",
    "store rebuild",
    "store export",
    "effects",
    "explore",
    "export",
    "import",
    "synth",
    "bench",
    "assets",
)
VARIANTS: dict[str, str] = {
    "multi-topk": "--sae topk --multi-topk --k-start 12",
    "topk-bf16": "--sae topk --dtype bf16 --no-normalize --grad-clip 0 --lr 1e-3",
    "feature-choice-uniform": "--sae feature-choice --budgets uniform",
    "orthogonal-pursuit": "--sae matching-pursuit --orthogonal --k 3",
    "absolute-pursuit": "--sae matching-pursuit --selection absolute --tolerance 0.3 --stop-on-repeat",
}
"""Run -> flags: the settings that take another path through the code than the defaults."""
TRAINING = "--d-sae 128 --k 4 --tokens 6144 --batch-size 256 --log-every 6 --checkpoint-every 10"
PROMPT, OTHER_PROMPT = "The Congress of the United States", "the people of this nation and their rights"
SHOWN = (0, 3, 17)
"""Features that stores are asked about one by one."""


def produce(folder: Path, *, say: Callable[[str], None] = lambda _: None) -> None:
    """Fill the empty directory ``folder``; about 2 minutes on one core.

    ``say`` is told each step that is done, with its seconds.
    """
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names still work, which is the point
        scenario = Scenario(say)
        scenario.interface()
        scenario.harvests()
        scenario.trainings()
        scenario.evaluations()
        scenario.stores()
        scenario.formats()
        scenario.whole_pipelines()
        scenario.api_of_caches_and_saes()
        scenario.api_of_stores()
        scenario.api_of_analysis()
        scenario.api_of_figures()


class Scenario:
    """The steps, in order: later ones read what earlier ones wrote. Paths are relative, so that no recorded
    setting depends on where the folder is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        import saebench as sb

        self.sb = sb
        self.say = say
        for name in ("commands", "answers", "inputs"):
            Path(name).mkdir()

    def run(self, name: str, words: str) -> dict[str, Any]:
        """Run ``saebench WORDS --json``; its exit code and output go to ``commands/NAME.json``."""
        started = time.monotonic()
        code, out, errors = command(f"{words} --json")
        result = {"exit_code": code, "output": json.loads(out or "null")}
        write_json(Path("commands") / f"{name}.json", result)
        failed = f": exit code {code}, {errors.strip()[-300:]}" if code else ""
        self.say(f"{time.monotonic() - started:5.1f} s  saebench {words}{failed}")
        return result

    @contextlib.contextmanager
    def answers(self, name: str, of: object) -> Iterator[Answers]:
        """Collect what the functions of the object ``of`` answer, and write it to ``answers/NAME.json``."""
        started, answers = time.monotonic(), Answers(of)
        yield answers
        write_json(Path("answers") / f"{name}.json", answers.kept)
        errors = [f"\n         {key}: {a['error']}" for key, a in answers.kept.items() if is_error(a)]
        self.say(f"{time.monotonic() - started:5.1f} s  {name}: {len(answers.kept)} answers{''.join(errors)}")

    # Names

    def interface(self) -> None:
        """The parameters of all public functions and methods, and the flags of all commands."""
        started = time.monotonic()
        public = {name: getattr(self.sb, name) for name in self.sb.__all__ if name != "__version__"}
        write_json(
            Path("answers/signatures.json"), {name: signature(thing) for name, thing in public.items()}
        )
        commands = [*COMMANDS, *(f"train --sae {sae}" for sae in ARCHITECTURES)]
        write_json(Path("commands/flags.json"), {words: flags(words) for words in commands})
        self.say(f"{time.monotonic() - started:5.1f} s  signatures and flags")

    # Commands

    def harvests(self) -> None:
        hooks = " ".join(f"--hook {hook}" for hook in HOOKS)
        self.run("harvest-two-hooks", f"harvest {hooks} --tokens 5000 --ctx 64 --dtype fp16 --out cache-two")
        write_documents(self.sb.open_cache("cache-two"), Path("inputs/documents.jsonl"))
        text = "--text inputs/documents.jsonl --ctx 32"
        self.run("harvest", f"harvest {text} --gradients --tokens 3000 --out cache")
        self.run(
            "harvest-keep-first",
            f"harvest {text} --keep-first --bos always --dtype fp32 --tokens 600 --batch-size 7 "
            "--out cache-first",
        )
        write_rows(4000, Path("inputs"))
        self.run(
            "cache-import",
            "cache import inputs/rows.npy --gradients inputs/gradients.npy --hook layer.7 --out cache-array",
        )
        for name in ("cache", "cache-two", "cache-array"):
            self.run(f"cache-info-{name}", f"cache info {name}")
        self.run("cache-verify", "cache verify cache")

    def trainings(self) -> None:
        for sae, flags in ARCHITECTURES.items():
            self.run(f"train-{sae}", f"train --cache cache --sae {sae} {TRAINING} {flags} --out runs/{sae}")
        for name, flags in VARIANTS.items():
            common = TRAINING.replace("--k 4 ", "") if "--k " in flags else TRAINING
            self.run(f"train-{name}", f"train --cache cache {common} {flags} --out variants/{name}")
        self.run("train-again", f"train --cache cache --sae topk {TRAINING} --out runs/topk --resume")
        self.run("train-seed-1", f"train --cache cache --sae topk {TRAINING} --seed 1 --out seeds/topk-1")
        Path("inputs/sweep.toml").write_text(
            'd_sae = 48\ntokens = 4096\nbatch_size = 256\nsweep = ["sae=topk,gradient,relu", "k=3,6"]\n'
        )
        self.run("train-sweep", "train --config inputs/sweep.toml --cache cache-array --out sweep")
        self.run(
            "train-two-hooks",
            f"train --cache cache-two --hook {HOOKS[0]} --sae mutual-choice {TRAINING} --out hooks/mlp",
        )

    def evaluations(self) -> None:
        for sae in ARCHITECTURES:
            self.run(f"eval-{sae}", f"eval runs/{sae}")
        for sae in ("topk", "mutual-choice", "gradient"):
            self.run(f"eval-{sae}-with-model", f"eval runs/{sae} --model cache --batch-size 8")
        for way in ("proxy", "oracle"):
            self.run(f"eval-gradient-{way}", f"eval runs/gradient --inference {way} --model cache")
        self.run("eval-text", "eval seeds/topk-1 --model demo --text inputs/documents.jsonl --tokens 200")
        self.run("eval-all-rows", "eval variants/orthogonal-pursuit --rows all --tokens 1000")
        for name in ("topk-k3", "topk-k6", "relu-k6"):
            self.run(f"eval-{name}", f"eval sweep/{name}")
        self.run("compare", "compare " + " ".join(f"runs/{sae}" for sae in ARCHITECTURES))
        self.run("compare-seeds", "compare runs/topk seeds/topk-1 sweep/topk-k3 sweep/topk-k6")

    def stores(self) -> None:
        settings = "--examples 6 --window 16 --seed 3"
        self.run("index", f"index runs/topk --cache cache --with-context-index {settings} --out store")
        several = "runs/topk seeds/topk-1 runs/matching-pursuit runs/jumprelu"
        self.run("index-several", f"index {several} --cache cache --model none --out store-several")
        self.run("index-array", "index sweep/relu-k6 --cache cache-array --name rows --out store-array")
        self.run("effects", "effects store --run runs/topk --contexts 2 --sample 6 --rows all")
        self.run("explain", "explain store --provider rules")
        self.run("explain-several", "explain store-several --sae jumprelu --limit 10 --seed 5")
        asked = "--provider hf --model demo --examples 2 --window 8 --limit 1"
        self.run("explain-hf", f"explain store-several --sae topk {asked}")
        with self.sb.open_store("store") as store:
            annotate(store.annotations)
        self.run("store-info", "store info store")
        self.run("store-check", "store check store --run runs/topk --cache cache --model cache")
        self.run("store-check-several", "store check store-several")
        self.run("store-export-parquet", "store export store --format parquet --out exports/parquet")
        chosen = "--features 3,10-14"
        self.run("store-export-html", f"store export store --format html {chosen} --out exports/html")
        self.run("store-export-delphi", "store export store --format delphi --out exports/delphi")
        self.run(
            "store-export-neuronpedia",
            "store export store --format neuronpedia --list interesting --out exports/neuronpedia",
        )
        self.run("store-rebuild", "store rebuild store-array")

    def formats(self) -> None:
        for sae in ARCHITECTURES:
            self.run(f"export-{sae}", f"export runs/{sae} saelens/{sae} --format saelens")
            self.run(f"import-{sae}", f"import saelens/{sae} --format saelens --out imported/{sae}")
        self.run("eval-imported", "eval imported/gated --cache cache")

    def whole_pipelines(self) -> None:
        self.run(
            "demo",
            "demo --all --text inputs/documents.jsonl --harvest-tokens 2000 --ctx 32 --d-sae 64 --k 8 "
            "--tokens 4096 --batch-size 256 --eval-tokens 100 --out demo",
        )
        self.run(
            "synth",
            "synth --data tree --data zipf --data readout --architectures topk --architectures mutual-choice "
            "--seeds 1 --tokens 10000 --out synth",
        )
        self.run("assets", "assets")

    # Python API

    def api_of_caches_and_saes(self) -> None:
        sb = self.sb
        with self.answers("caches", sb) as answers:
            for name in ("cache", "cache-two", "cache-array"):
                answers.keep(name, lambda name=name: describe_cache(sb.open_cache(name)))
        x_ND = sb.open_cache("cache").activations()[:40].float()
        with self.answers("saes", sb) as answers:
            folders = [*(f"runs/{sae}" for sae in ARCHITECTURES), *(f"variants/{name}" for name in VARIANTS)]
            for folder in [*folders, *sorted(map(str, Path("runs/topk/checkpoints").iterdir()))]:
                answers.keep(folder, lambda folder=folder: describe_sae(sb.load(folder), x_ND))
            answers.keep("topk with k=3", lambda: sb.load("runs/topk").encode(x_ND, k=3).to_dense())
            pursuit = sb.load("runs/matching-pursuit")
            answers.keep(
                "matching-pursuit with k=3", lambda: pursuit.encode(x_ND, k=3, tolerance=0.2).to_dense()
            )
        with self.answers("training", sb) as answers:
            common = {"cache": "cache-array", "d_sae": 32, "k": 4, "tokens": 2048, "batch_size": 256}
            answers.keep(
                "train", lambda: sb.train(**common, out="api/train", sae="batchtopk", quiet=True).spec
            )
            grid = {"lr": [1e-3, 3e-3], "seed": [0, 1]}
            runs = answers.keep("sweep", lambda: sb.sweep(grid, **common, out="api/sweep", quiet=True))
            for run in runs or ():
                answers.ask(f"evaluate {run.path}", run=run.path, quiet=True)
            answers.keep("evaluate", lambda: sb.evaluate("api/train", quiet=True).to_dict())
            answers.keep("compare", lambda: sb.compare(runs=[run.path for run in runs]))
            array = {"source": "inputs/rows.npy", "out": "api/rows", "dtype": "bf16", "quiet": True}
            answers.keep("import_activations", lambda: describe_cache(sb.import_activations(**array)))

    def api_of_stores(self) -> None:
        sb = self.sb
        with sb.open_store("store") as store, self.answers("store", store) as answers:
            ask_about_store(answers, SHOWN)
            answers.keep("tables", lambda: dict.fromkeys(sorted(store.tables), True))
            answers.keep("feature_columns", lambda: store.feature_columns)
            answers.ask(
                "features filtered",
                ["feature", "density"],
                ranges={"density": (0.01, 0.3)},
                flags={"dead": False},
                order_by="max_act",
                descending=True,
                limit=20,
            )
            answers.ask("features searched", ["feature"], text="e", search=("top_token", "explanation"))
            answers.ask("features regex", ["feature", "top_token"], regex="^ [a-z]", order_by="loss_effect")
            answers.ask("count_features", flags={"explained": True})
            answers.ask("neighbours_in_order", 3, order_by="density")
            answers.ask("train_course")
            answers.ask("context_features", 2, list(SHOWN))
            answers.ask("explained_by")
            answers.ask("explanation_outcomes", "rules")
            answers.ask("all_explanation_scores", "rules")
            answers.ask("all_explanations", "rules")
        with sb.open_store("store") as store, self.answers("annotations", store.annotations) as answers:
            ask_about_annotations(answers, "interesting")
        with (
            sb.open_store("store-several", "matching-pursuit") as store,
            self.answers("store-several", store) as answers,
        ):
            answers.keep("saes", lambda: store.saes)
            answers.ask("compare")
            answers.ask("features")
            answers.ask("same_firings", 3, "jumprelu")
            answers.ask("sql", "SELECT count(*) AS n FROM feature WHERE n_act > ?", [10])
        with sb.open_store("store-array") as store, self.answers("store-array", store) as answers:
            answers.ask("info")
            answers.ask("features")
            answers.ask("examples", 3)

    def api_of_analysis(self) -> None:
        sb = self.sb
        model = sb.load_model("demo")
        with self.answers("model", model) as answers:
            import torch

            tokens_BT = torch.arange(48).reshape(2, 24) * 31 % 8000
            answers.ask("run_to", tokens_BT, list(HOOKS))
            answers.ask("logits", tokens_BT)
            answers.ask("gradients", tokens_BT, torch.tensor([24, 20]), [HOOKS[1]])
        with self.answers("prompts", sb) as answers:
            for sae in ARCHITECTURES:
                answers.ask(f"features_of {sae}", PROMPT, f"runs/{sae}", model)
            found = sb.features_of(PROMPT, "runs/topk", model, top=4)
            answers.keep("features_of top", lambda: found)
            answers.ask("compare_prompts", OTHER_PROMPT, PROMPT, "runs/topk", model)
            answers.ask(
                "compare_prompts mean",
                OTHER_PROMPT,
                PROMPT,
                "runs/jumprelu",
                model,
                by="mean",
                keep_first=True,
            )
            strong = int(found[found["pos"] == 3]["feature"].iloc[0])
            answers.ask("ablate", PROMPT, [strong, 3], "runs/topk", model)
            answers.ask("ablate positions", PROMPT, strong, "runs/gated", model, positions=[2, 3])
            for mode in ("add", "clamp", "scale"):
                answers.ask(
                    f"steer {mode}",
                    PROMPT,
                    strong,
                    "runs/topk",
                    model,
                    strength=[2, 8],
                    mode=mode,
                    new_tokens=6,
                )
            answers.ask(
                "steer drawn",
                PROMPT,
                [strong],
                "runs/topk",
                model,
                strength=4,
                temperature=0.8,
                new_tokens=8,
                seed=2,
            )
            answers.ask("logit_attribution", PROMPT, "runs/topk", model, check=4)
            answers.ask(
                "logit_attribution direct",
                PROMPT,
                "runs/mutual-choice",
                model,
                target=" States",
                against=" people",
                by="direct",
            )
        with self.answers("effects", sb) as answers:
            for sae, settings in {
                "topk": {"rows": "all", "features": list(SHOWN)},
                "relu": {"seed": 1},
            }.items():
                answers.ask(
                    f"loss_effects {sae}",
                    f"runs/{sae}",
                    "cache",
                    model,
                    contexts=1,
                    sample=3,
                    quiet=True,
                    **settings,
                )
            answers.ask(
                "index_effects", "store-several", run="seeds/topk-1", contexts=0, sample=4, quiet=True
            )
        with self.answers("comparing", sb) as answers:
            for by in ("decoder", "activation"):
                answers.ask(f"match {by}", "runs/topk", "seeds/topk-1", by, quiet=True)
            answers.ask("match widths", "sweep/topk-k3", "api/train", "decoder", quiet=True)
            answers.ask("splits", "api/train", "sweep/topk-k3")
            answers.ask("absorbed", "runs/topk", rows=2000, share=0.1, cosine=0.05, at_least=2, quiet=True)
            for method in ("pca", "umap"):
                answers.ask(f"decoder_map {method}", "runs/topk", method, n_clusters=5)
            answers.ask("decoder_map neighbours", "runs/gated", "umap", neighbours=6)
            answers.ask("clusters", "runs/jumprelu", 7, seed=1)
            answers.ask("redundancy", "runs/topk", threshold=0.3)

    def api_of_figures(self) -> None:
        sb, figures = self.sb, self.sb.figures
        model = sb.load_model("demo")
        with self.answers("figures", figures) as answers, sb.open_store("store") as store:

            def draw(name: str, make: Callable[[], Any]) -> None:
                answers.keep(name, lambda: json.loads(make().to_json())["data"])

            draw("histogram", lambda: figures.histogram(store.histogram(3)))
            draw("density_histogram", lambda: figures.density_histogram(store.features()))
            found = sb.features_of(PROMPT, "runs/topk", model)
            draw("prompt_heatmap", lambda: figures.prompt_heatmap(found, top=8))
            points = sb.decoder_map("runs/topk")
            draw("decoder_scatter", lambda: figures.decoder_scatter(points, "density", store.features()))
            draw("decoder_scatter colour", lambda: figures.decoder_scatter(points, colour="cluster"))
            matching = sb.match("runs/topk", "seeds/topk-1", quiet=True)
            draw("matching_similarity", lambda: figures.matching_similarity(matching))
            scores = store.all_explanation_scores("rules")
            draw("score_distribution", lambda: figures.score_distribution(scores))
            steering = sb.steer(PROMPT, 3, "runs/topk", model, strength=[0, 4, 8], new_tokens=0)
            draw("steering_curve", lambda: figures.steering_curve(steering))
            draw("training_curves", lambda: figures.training_curves(["runs/topk", "seeds/topk-1"]))
            draw("compare", lambda: sb.compare(runs=["runs/topk", "runs/gated", "seeds/topk-1"]).figure())


class Answers:
    """Answers as JSON, by key. A call that raises leaves its error as the answer and the others go on."""

    def __init__(self, of: object) -> None:
        self.of = of
        self.kept: dict[str, Any] = {}

    def ask(self, key: str, *arguments: Any, **settings: Any) -> Any:
        """Call the method that the first word of ``key`` names; the other words tell calls of one apart."""
        return self.keep(key, lambda: getattr(self.of, key.split()[0])(*arguments, **settings))

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """Keep what ``make()`` returns."""
        try:
            made = make()
            self.kept[key] = plain(made)
            return made
        except Exception as error:
            self.kept[key] = {"error": f"{type(error).__name__}: {error}"}
            return None


def ask_about_store(answers: Answers, features: Sequence[int]) -> None:
    """What a store says as a whole, and all that it says of some features."""
    for method in ("info", "features", "train_metrics", "compare"):
        answers.ask(method)
    answers.ask("context", 1)
    answers.ask("firing_at", 1, 5)
    answers.ask("find_tokens", "th")
    answers.ask("features_on", " the")
    answers.ask("sql", "SELECT top_token, count(*) AS n FROM feature GROUP BY ALL ORDER BY ALL")
    for feature in features:
        answers.ask(f"feature {feature}", feature)
        answers.ask(f"examples {feature}", feature)
        answers.ask(f"activations {feature}", feature, limit=50, order="value")
        answers.ask(f"examples_between {feature}", feature, 0.1, 9.0, n=5, window=8)
        answers.ask(f"examples_in_bin {feature}", feature, 12, n=5)
        answers.ask(f"examples_on {feature}", feature, " the", n=5)
        for role in ("active", "previous", "next"):
            answers.ask(f"tokens {feature} {role}", feature, role)
        for kind in ("decoder", "encoder", "cofire", "correlation"):
            answers.ask(f"neighbors {feature} {kind}", feature, kind)
        for kind in ("value", "log10"):
            answers.ask(f"histogram {feature} {kind}", feature, kind)
        for name in ("logits", "quantiles", "positions", "labels"):
            answers.ask(f"{name} {feature}", feature)
        for name in ("explanations", "explanation_scores", "explanation_items"):
            answers.ask(f"{name} {feature}", feature)


def ask_about_annotations(answers: Answers, name: str) -> None:
    """All that `annotate` left; ``name`` is that of a list."""
    for method in ("labels", "bookmarks", "comments", "lists", "views", "export_json"):
        answers.ask(method)
    answers.ask("list_features", name)


def is_error(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.keys() == {"error"}


def signature(thing: Any) -> Any:
    """Parameter -> default of a function; of a class or the module of figures, those of its public functions.

    Of what is no function, True: it is there.
    """
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters.values()
        return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}
    if inspect.ismodule(thing):
        return {name: signature(getattr(thing, name)) for name in FIGURES if hasattr(thing, name)}
    if not inspect.isclass(thing):
        return True
    inherited = {name for base in thing.__mro__ if base.__name__ == "Module" for name in vars(base)}
    names = [name for name in dir(thing) if not name.startswith("_") and name not in inherited]
    return {name: signature(getattr(thing, name)) for name in names}


def command(words: str) -> tuple[int, str, str]:
    """Run ``saebench WORDS`` in this process, as its console script does; exit code, output and errors."""
    [script] = importlib.metadata.entry_points(group="console_scripts", name="saebench")
    before, sys.argv = sys.argv, ["saebench", *words.split()]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            code = script.load()()
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.argv = before
    return int(code or 0), out.getvalue(), errors.getvalue()


def flags(words: str) -> dict[str, bool]:
    """The flags that the help of a command lists."""
    _, shown, _ = command(f"{words} --help")
    return dict.fromkeys(sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown))), True)


def write_documents(cache: Any, path: Path, n: int = 64) -> None:
    """A .jsonl of ``n`` documents with titles, cut out of the text that ``cache`` was harvested from."""
    vocabulary = cache.vocab()
    text = b"".join(vocabulary[token] for token in cache.context_tokens.flatten().tolist())
    words = text.decode("utf-8", "ignore").split(" ")
    size = len(words) // n
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            piece = " ".join(words[i * size : (i + 1) * size])
            file.write(json.dumps({"text": piece, "title": f"piece {i % 7}"}) + "\n")


def write_rows(n_rows: int, folder: Path) -> None:
    """rows.npy [n_rows, 24], sums of a few of 48 directions, and gradients.npy of the same shape."""
    import numpy as np

    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(n_rows, 48)) * (rng.random((n_rows, 48)) < 0.08)
    rows = codes @ rng.normal(size=(48, 24)) + 0.05 * rng.normal(size=(n_rows, 24))
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "gradients.npy", rng.normal(size=rows.shape).astype(np.float32))


def annotate(notes: Any) -> None:
    """One or two of everything that people can leave beside a store."""
    notes.set_label(3, "a label with <b>markup</b> and \N{GREEK SMALL LETTER ALPHA}", author="one")
    notes.set_label(17, "another", author="two")
    notes.bookmark(3)
    notes.bookmark(5, author="one")
    notes.comment(3, "Why I think so.\nSecond line.", author="one")
    notes.add_to_list("interesting", [3, 5, 9])
    notes.add_to_list("other", 17)
    notes.save_view("dense ones", "sort=density&desc=1")


def describe_cache(cache: Any) -> dict[str, Any]:
    """What the properties of an ActivationCache answer."""
    names = (
        "hash",
        "model",
        "hooks",
        "n_rows",
        "n_contexts",
        "ctx_len",
        "dtype",
        "held_out",
        "tokens",
        "doc",
        "ctx",
        "pos",
        "context_tokens",
        "context_len",
    )
    out = {name: getattr(cache, name) for name in names}
    for hook in cache.hooks:
        out[f"activations {hook}"] = cache.activations(hook)
        out[f"gradients {hook}"] = cache.gradients(hook) if cache.has_gradients(hook) else None
    return out | {"vocab": cache.vocab(), "doc_labels": cache.doc_labels()}


def describe_sae(sae: Any, x_ND: Any) -> dict[str, Any]:
    """Weights of an SAE, and its codes and reconstructions of the rows ``x_ND`` [n, d_in]."""
    codes = sae.encode(x_ND)
    return {
        "spec": sae.spec,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "W_enc": sae.W_enc,
        "W_dec": sae.W_dec,
        "codes": codes.to_dense(),
        "l0": codes.l0(),
        "decoded": sae.decode(codes),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON: tables by column, tensors and arrays as shape, type and SHA-256."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "columns"):  # a pandas table
        return {"rows": len(value), "columns": {str(c): [plain(v) for v in value[c]] for c in value}}
    if hasattr(value, "detach"):  # a tensor
        import torch

        value = value.detach().cpu().contiguous()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": sha256(data)}
    if hasattr(value, "tobytes") and getattr(value, "shape", ()):
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": sha256(value.tobytes())}
    if hasattr(value, "item"):  # a number of numpy
        return plain(value.item())
    if type(value).__name__ in ("dtype", "NAType"):
        return str(value)
    raise TypeError(f"no JSON is defined for {type(value)}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
