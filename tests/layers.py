"""Which package may import which: the one place that says so. CONTRIBUTING.md shows this table.

``python -m tests.layers`` writes the table into CONTRIBUTING.md.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVERYTHING = "everything"
LAYERS: dict[str, tuple[str, ...]] = {
    "saebench_kernels": (),
    "saebench_data": (),
    "saebench.core": ("saebench_kernels",),
    "saebench.assets": ("saebench.core", "saebench_data"),
    "saebench.sources": ("saebench.assets", "saebench.core"),
    "saebench.activations": ("saebench.sources", "saebench.core"),
    "saebench.saes": ("saebench.core", "saebench_kernels"),
    "saebench.runs": ("saebench.saes", "saebench.activations", "saebench.sources", "saebench.core"),
    "saebench.evaluation": (
        "saebench.runs", "saebench.saes", "saebench.activations", "saebench.sources", "saebench.core",
        "saebench_kernels",
    ),
    "saebench.training": (
        "saebench.runs", "saebench.saes", "saebench.activations", "saebench.core", "saebench_kernels",
    ),
    "saebench.store": (
        "saebench.runs", "saebench.saes", "saebench.activations", "saebench.sources", "saebench.core",
    ),
    "saebench.analysis": (
        "saebench.store", "saebench.evaluation", "saebench.runs", "saebench.saes", "saebench.activations",
        "saebench.sources", "saebench.core", "saebench_kernels",
    ),
    "saebench.explaining": ("saebench.store", "saebench.sources", "saebench.assets", "saebench.core"),
    "saebench.formats": ("saebench.runs", "saebench.saes", "saebench.core"),
    "saebench_app": (
        "saebench.analysis", "saebench.explaining", "saebench.store", "saebench.runs", "saebench.sources",
        "saebench.assets", "saebench.core",
    ),
    "saebench.synth": (EVERYTHING,),
    "saebench.bench": (EVERYTHING,),
    "saebench.demo": (EVERYTHING,),
    "saebench.doctor": (EVERYTHING,),
    "saebench.cli": (EVERYTHING,),
    "saebench_data.scripts": ("saebench.sources", "saebench_data"),
    "saebench": (EVERYTHING,),
}  # fmt: skip
"""Package -> the packages that its modules may import, anywhere in them. ``saebench`` is its own
``__init__`` and ``config``, which name the public objects and import them when they are used."""


def folder_of(package: str) -> str:
    """Its place in the repository: ``saebench_kernels`` is ``kernels/saebench_kernels``."""
    top, *rest = package.split(".")
    outer = {"saebench_app": "app/", "saebench_data": "data/", "saebench_kernels": "kernels/"}.get(top, "")
    path = outer + "/".join([top, *rest])
    return path if (ROOT / path).is_dir() else path + ".py"


def table() -> str:
    """`LAYERS` as a table of Markdown."""
    lines = ["| package | may import |", "|---|---|"]
    for package, allowed in LAYERS.items():
        if package == "saebench":
            continue
        names = ", ".join(f"`{name.removeprefix('saebench.')}`" for name in allowed)
        shown = "nothing of ours" if not allowed else "everything" if EVERYTHING in allowed else names
        lines.append(f"| `{folder_of(package)}` | {shown} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """CONTRIBUTING.md with the table of today between its marks."""
    begin, end = "<!-- layers: begin -->", "<!-- layers: end -->"
    return re.sub(f"{begin}.*{end}", f"{begin}\n{table()}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    contributing = ROOT / "CONTRIBUTING.md"
    contributing.write_text(with_table(contributing.read_text("utf-8")), "utf-8")
