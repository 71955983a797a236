"""What `saebench bench` prints."""

from __future__ import annotations

from saebench.cli.output import Result, pairs, table
from saebench.config import BenchConfig


def bench(config: BenchConfig) -> Result:
    from saebench.bench import as_json, peer
    from saebench.bench import bench as measure

    report = measure(config)
    product = next(row.timing.median for row in report.rows if row.timing is not None)
    lines: list[tuple[str, ...]] = []
    for row in report.rows:
        if row.timing is None:
            lines.append((row.name, peer.MISSING, "", "", "", ""))
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
            {None: "", True: "met", False: "missed"}[ratio.met],
        )
        for ratio in report.ratios
    ]
    sweeps = [
        (f"{gain.n_saes} x {gain.d_sae:,} latents", gain.separate, gain.together, gain.gain)
        for gain in report.sweep
    ]
    sizes = " ".join(f"{name} {report.settings[name]}" for name in ("d_in", "d_sae", "k", "batch_size"))
    parts = [
        pairs({"device": report.device, "sizes": sizes, "optimizer": report.optimizer, **report.versions}),
        table(("one step", "median ms", "min", "max", "x product", "error"), lines),
        table(("times as long", "ratio", "goal", ""), goals),
        table(("topk SAEs", "apart s", "in a sweep s", "gain"), sweeps),
    ]
    return Result(as_json(report), "\n\n".join(parts))
