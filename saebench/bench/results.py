"""Write the tables of GPU times into the documentation, from kernels/saebench_kernels/results/.

    python -m saebench.bench.results [kernels/saebench_kernels/results/FILE.json]

writes the tables of FILE, or of the newest results, into docs/performance.md between two comments.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import write_bytes_atomic
from saebench.core.reading import read_json

RESULTS = Path("kernels/saebench_kernels/results")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- saebench bench: begin -->", "<!-- saebench bench: end -->"
MET = {None: "", True: "met", False: "missed"}
_SAME = ("saebench", "torch", "triton")
"""Versions that come first; the others are those of peers."""


def newest(folder: Path) -> Path | None:
    """The results with the latest date, or None if there are none."""
    dates = {path: str(_read(path)["date"]) for path in folder.glob("*.json")}
    return max(dates, key=lambda path: (dates[path], path.name), default=None)


def render(report: dict[str, Any]) -> str:
    """Markdown of one report of `saebench bench`: device and date, milliseconds, ratios and goals."""
    sizes = report["sizes"]
    cells = {(row["size"], row["name"]): _milliseconds(row) for row in report["rows"]}
    names = list(dict.fromkeys(row["name"] for row in report["rows"]))
    timed = [[name, *(cells.get((size["name"], name), "") for size in sizes)] for name in names]
    heads = [f"d_in {size['d_in']}, d_sae {size['d_sae']}, k {size['k']}" for size in sizes]
    return "\n\n".join(
        [
            _where(report),
            "Milliseconds, medians; in brackets, how many bare matrix products take as long, and the goal:",
            _table(["", *heads], timed),
            "How many times as long, measured in turns, and the goal:",
            _table(["", *heads], _ratios(report)),
        ]
    )


def rewrite(text: str, made: str) -> str:
    """``text`` with ``made`` between the two comments.

    Raises:
        UserError: the text does not have each comment once, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{PAGE} needs the lines {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{made + chr(10) if made else ''}{END}{after}"


def main(words: list[str]) -> None:
    """Render the named file, or else the newest one, into docs/performance.md of the working directory."""
    path = Path(words[0]) if words else newest(RESULTS)
    if path is None:
        raise UserError(f"there is no JSON in {RESULTS}; make one with saebench bench --out")
    text = rewrite(PAGE.read_text(encoding="utf-8"), render(_read(path)))
    write_bytes_atomic(PAGE, text.encode())


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_json(path, what="results of saebench bench")
    if not isinstance(report, dict) or not {"date", "rows", "ratios", "sizes"} <= report.keys():
        raise UserError(f"{path} has no results of saebench bench on a GPU; make one with --out")
    return report


def _where(report: dict[str, Any]) -> str:
    versions = report["versions"]
    rest = [name for name in versions if name not in _SAME and versions[name] != "not installed"]
    listed = ", ".join(f"{name} {versions[name]}" for name in (*_SAME, *sorted(rest)) if name in versions)
    commit = f", commit `{report['commit']}`" if report.get("commit") else ""
    rows = f"{report['sizes'][0]['batch_size']:,}"
    return textwrap.fill(
        f"One {report['device']}, {report['date'][:10]}{commit}; {listed}. Batches of {rows} random rows, "
        "products in bfloat16, masters in float32.",
        width=120,
        break_on_hyphens=False,
    )


def _milliseconds(row: dict[str, Any]) -> str:
    if row["timing"] is None:
        return str(row["reason"] or "")
    shown = f"{1e3 * row['timing']['median']:.3g} ({row['products']:.2f}"
    goal = "" if row["goal_ms"] is None else f"; at most {row['goal_ms']:g} ms: {MET[row['met']]}"
    return f"{shown}{goal})"


def _ratios(report: dict[str, Any]) -> list[list[str]]:
    cells = {
        (ratio["size"], f"{ratio['slower']} / {ratio['faster']}"): _ratio(ratio) for ratio in report["ratios"]
    }
    names = list(dict.fromkeys(name for _, name in cells))
    return [[name, *(cells.get((size["name"], name), "") for size in report["sizes"])] for name in names]


def _ratio(ratio: dict[str, Any]) -> str:
    shown = f"{ratio['value']:.2f}"
    if ratio["goal"] is None:
        return shown
    return f"{shown} ({ratio['bound']} {ratio['goal']:g}: {MET[ratio['met']]})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
