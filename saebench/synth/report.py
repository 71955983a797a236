"""``SynthReport``: the results of the suite as tables, Markdown and JSON."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saebench
from saebench.core.files import write_bytes_atomic, write_json_atomic
from saebench.saes.gradient import ORACLE
from saebench.synth.claims import Claim
from saebench.synth.scores import L0_TOLERANCE, Score
from saebench.synth.settings import SynthConfig

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"
HEADINGS = {
    "explained_variance": "EV",
    "mcc_hungarian": "MCC",
    "uniqueness": "uniqueness",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "l0": "L0",
    "dead": "dead",
    "across_levels": "across levels",
    "within_level_error": "error within",
    "matched_cosine": "|cos|",
    "difficulty_correlation": "corr L0",
    "density_rank_correlation": "rank corr",
    "empty_rate": "empty",
    "small_recall": "small recall",
    "ce_damage": "CE damage",
    "kl": "KL",
    "changed_picks": "changed",
}
LEGEND = (
    "Mean \u00b1 standard deviation over seeds, on test rows. EV: explained variance; MCC: mean |cos| of the "
    "best one-to-one matching; uniqueness, precision, recall, F1: as in saebench.evaluation.synthetic; "
    f"L0: at inference, * if it differs from k by more than {L0_TOLERANCE:.0%}; dead: latents that fire on "
    f"no test row. ({ORACLE}): latents are selected by the gradient of the loss, which depends on the "
    "labels; compare such rows only with each other."
)


@dataclass(frozen=True, kw_only=True)
class SynthReport:
    """Scores, verdicts on the claims, and the provenance of the numbers."""

    scores: list[Score]
    claims: list[Claim]
    troubles: list[str]
    """Errors of trainings that failed; the scores are those of the other SAEs."""
    provenance: dict[str, Any]

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each data set's table."""
        for data in dict.fromkeys(score.data for score in self.scores):
            scores = [score for score in self.scores if score.data == data]
            metrics = list(scores[0].values)
            header = ["SAE", *(HEADINGS[metric] for metric in metrics)]
            rows = [[score.sae, *(_cell(score, metric) for metric in metrics)] for score in scores]
            first = scores[0]
            yield f"{data} (k {first.k}, {first.n_seeds} seeds, {first.test_rows:,} test rows)", header, rows

    def verdicts(self) -> list[list[str]]:
        """Verdict, claim and evidence of each claim."""
        return [[claim.verdict, claim.text, claim.evidence] for claim in self.claims]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the contents of results.json."""
        return {
            "provenance": self.provenance,
            "scores": [
                {
                    "data": score.data,
                    "sae": score.sae,
                    "k": score.k,
                    "test_rows": score.test_rows,
                    "at_k": score.at_k,
                    "mean": {metric: score.mean(metric) for metric in score.values},
                    "sd": {metric: score.sd(metric) for metric in score.values},
                    "seeds": score.values,
                }
                for score in self.scores
            ],
            "claims": [
                {"claim": claim.text, "verdict": claim.verdict, "evidence": claim.evidence}
                for claim in self.claims
            ],
            "troubles": self.troubles,
        }

    def to_markdown(self) -> str:
        """The contents of results.md."""
        facts = [f"{name}: {value}" for name, value in self.provenance.items() if value is not None]
        lines = ["# saebench synth", "", "; ".join(facts) + ".", "", LEGEND, ""]
        for title, header, rows in self.tables():
            lines += [f"## {title}", "", *_markdown(header, rows), ""]
        lines += ["## Claims", "", *_markdown(["verdict", "claim", "evidence"], self.verdicts()), ""]
        lines += [f"Failed: {trouble}" for trouble in self.troubles]
        return "\n".join(lines).rstrip() + "\n"


def write_report(report: SynthReport, out: Path) -> None:
    """Write results.json and results.md into ``out``."""
    write_json_atomic(out / RESULTS_JSON, report.to_dict())
    write_bytes_atomic(out / RESULTS_MARKDOWN, report.to_markdown().encode())


def provenance(config: SynthConfig) -> dict[str, Any]:
    """Date, commit, versions and settings of the measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "saebench": saebench.__version__,
        "torch": _torch_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "suite": "full" if config.full else "small",
        "tokens": config.tokens,
        "seeds": config.seeds,
    }


def _commit() -> str | None:
    """The commit of this checkout, with '+' if files differ from it; None outside a checkout."""
    root = Path(saebench.__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def _torch_version() -> str:
    import torch

    return torch.__version__


def _cell(score: Score, metric: str) -> str:
    mark = "*" if metric == "l0" and not score.at_k else ""
    if metric in ("l0", "dead"):
        return f"{score.mean(metric):.2f} \u00b1 {score.sd(metric):.2f}{mark}"
    return f"{score.mean(metric):.3f} \u00b1 {score.sd(metric):.3f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
