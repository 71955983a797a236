"""Steps of a diagnosis that import packages: they run in a process of their own, which may die of one.

``python -P -m saebench.doctor.probe STEP ...`` prints ``[step, findings]`` as a line of JSON after each step.
A step is ``import NAME``, ``devices`` or ``plugins``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import warnings
from typing import Any

Row = dict[str, Any]


def imports(name: str) -> list[Row]:
    """Whether the module ``name`` can be imported."""
    importlib.import_module(name)
    return [{"name": name, "state": "ok"}]


def devices() -> list[Row]:
    """The CPU and each GPU, and which kernels training runs there."""
    import torch

    threads = torch.get_num_threads()
    found = [
        {
            "name": "cpu",
            "state": "ok",
            "found": f"{threads} thread{'s' * (threads != 1)}",
            "detail": "eager kernels: the fused ones need an NVIDIA GPU",
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "state": "ok",
                "found": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
                **_kernels(index),
            }
        )
    return found


def _kernels(index: int) -> Row:
    """Which kernels run on a GPU: its age and Triton decide, and a small run shows that they compile."""
    import torch

    from saebench_kernels import topk_encode
    from saebench_kernels.dispatch import why_not_fused

    reason = why_not_fused(index)
    if reason is not None:
        return {"detail": f"eager kernels: {reason}", "fix": "pip install 'saebench[gpu]'"}
    with torch.cuda.device(index):
        x = torch.randn(64, 64, device="cuda")
        weights, bias = torch.randn(256, 64, device="cuda"), torch.zeros(256, device="cuda")
        try:
            topk_encode(x, weights, bias, 8, scan_dtype=torch.bfloat16)
            torch.cuda.synchronize()
        except Exception as error:  # a compiler that is missing, a driver that is too old, ...
            return {
                "state": "broken",
                "detail": f"the fused kernels do not run: {one_line(error)}",
                "fix": "install a C compiler and a Triton that fits torch, or pip uninstall triton",
            }
    return {"detail": "fused kernels (Triton)"}


def plugins() -> list[Row]:
    """What other packages add to the registries, and whether it can be imported."""
    from saebench.core.registry import package_of
    from saebench.formats.registry import formats
    from saebench.saes.registry import architecture, architectures
    from saebench.store.export_registry import store_exports

    found: list[Row] = []
    for registry, load in (
        (architectures, architecture),
        (formats, formats.load),
        (store_exports, store_exports.load),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            added = registry.plugins
        found += [{"name": registry.group, "state": "missing", "detail": str(one.message)} for one in said]
        for name, plugin in added.items():
            row: Row = {"name": f"{registry.group}: {name}", "found": package_of(plugin)}
            try:
                load(name)
                found.append({**row, "state": "ok"})
            except Exception as error:
                fix = f"update or uninstall {package_of(plugin)}"
                found.append({**row, "state": "missing", "detail": one_line(error), "fix": fix})
    return found


def one_line(error: BaseException) -> str:
    """The type and the text of an error, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def main(steps: list[str]) -> None:
    for step in steps:
        try:
            # What packages print while they are imported must not get between the lines.
            with contextlib.redirect_stdout(sys.stderr):
                kind, _, name = step.partition(" ")
                rows = imports(name) if kind == "import" else {"devices": devices, "plugins": plugins}[step]()
        except BaseException as error:  # a package may also raise SystemExit
            rows = [{"name": step.removeprefix("import "), "state": "broken", "detail": one_line(error)}]
        print(json.dumps([step, rows]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
