"""The output of `saebench bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.bench.settings import BenchConfig
from saebench.cli.output import Result, pairs, table

if TYPE_CHECKING:
    from saebench.bench import BenchReport, GpuReport, StoreReport
    from saebench.bench.gpu import GpuRow

MET = {None: "", True: "met", False: "missed"}


def bench(config: BenchConfig) -> Result:
    from saebench.bench import GpuReport, StoreReport
    from saebench.bench import bench as measure

    report = measure(config)
    if isinstance(report, StoreReport):
        shown = of_store(report)
    else:
        shown = of_gpu(report) if isinstance(report, GpuReport) else of_cpu(report)
    return Result(report.as_json(), shown)


def of_gpu(report: GpuReport) -> str:
    parts = [pairs({"device": report.device, **_when(report), **report.versions})]
    for size in report.sizes:
        rows = [row for row in report.rows if row.size == size.name]
        lines = [_gpu_line(row) for row in rows]
        goals = [
            (
                f"{ratio.slower} / {ratio.faster}",
                f"{ratio.value:.3f}",
                "" if ratio.goal is None else f"{ratio.bound} {ratio.goal:g}",
                MET[ratio.met],
            )
            for ratio in report.ratios
            if ratio.size == size.name
        ]
        what = f"{size.name}: N {size.batch_size}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}"
        parts.append(what)
        parts.append(table(("", "median ms", "min", "max", "x product", "GiB", "goal ms", ""), lines))
        parts.append(table(("times as long", "ratio", "goal", ""), goals))
    return "\n\n".join(parts)


def _gpu_line(row: GpuRow) -> tuple[str, ...]:
    if row.timing is None or row.products is None:
        return (row.name, "", "", "", "", "", "", row.reason or "")
    times = (row.timing.median, row.timing.smallest, row.timing.largest)
    return (
        row.name,
        *(f"{1e3 * seconds:.3f}" for seconds in times),
        f"{row.products:.2f}",
        "" if row.memory_gib is None else f"{row.memory_gib:.2f}",
        "" if row.goal_ms is None else f"{row.goal_ms:g}",
        MET[row.met],
    )


def _when(report: GpuReport | BenchReport) -> dict[str, str]:
    return {"date": report.date} | ({} if report.commit is None else {"commit": report.commit})


def of_cpu(report: BenchReport) -> str:
    from saebench.bench.peer import MISSING

    product = next(row.timing.median for row in report.rows if row.timing is not None)
    lines: list[tuple[str, ...]] = []
    for row in report.rows:
        if row.timing is None:
            lines.append((row.name, MISSING, "", "", "", ""))
            continue
        times = (row.timing.median, row.timing.smallest, row.timing.largest)
        shown = [f"{1e3 * seconds:,.0f}" for seconds in times]
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append((row.name, *shown, f"{row.timing.median / product:.1f}", error))
    goals = [
        (
            f"{ratio.slower} / {ratio.faster}",
            "" if ratio.value is None else f"{ratio.value:.2f}",
            f"{ratio.bound} {ratio.goal:g}",
            MET[ratio.met],
        )
        for ratio in report.ratios
    ]
    sweeps = [
        (f"{gain.n_saes} x {gain.d_sae:,} latents", gain.separate, gain.together, gain.gain)
        for gain in report.sweep
    ]
    sizes = " ".join(f"{name} {report.settings[name]}" for name in ("d_in", "d_sae", "k", "batch_size"))
    parts = [
        pairs(
            {
                "device": report.device,
                "sizes": sizes,
                "optimizer": report.optimizer,
                **_when(report),
                **report.versions,
            }
        ),
        table(("one step", "median ms", "min", "max", "x product", "error"), lines),
        table(("times as long", "ratio", "goal", ""), goals),
        table(("topk SAEs", "separate s", "sweep s", "gain"), sweeps),
    ]
    return "\n\n".join(parts)


def of_store(report: StoreReport) -> str:
    sizes, times = report.bytes_per_activation, (report.seconds, report.cpu_seconds)
    lines = [
        (name, *(f"{seconds[name]:,.1f}" if name in seconds else "" for seconds in times),
         f"{sizes[name]:.2f}" if name in sizes else "")
        for name in dict.fromkeys([*report.seconds, *sizes])
    ]  # fmt: skip
    goals, further = (
        [
            (one.name, f"{one.value:,.2f}", one.unit, "" if one.goal is None else f"{one.goal:g}",
             MET[one.met])
            for one in rows
        ]
        for rows in (report.measured, report.extrapolated)
    )  # fmt: skip
    heads = ("", "", "at most", "")
    return "\n\n".join([
        pairs({"device": report.device, **report.settings, **report.versions}),
        table(("table", "seconds", "CPU seconds", "bytes per activation"), lines),
        table(("measured", *heads), goals),
        table(("at 1,000,000,000 activations", *heads), further),
        report.reasoning,
    ])  # fmt: skip
