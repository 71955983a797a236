"""`saebench bench`: this library against others and against the bare matrix product, in one table."""

from __future__ import annotations

from saebench.bench import cpu, gpu
from saebench.bench.cpu import BenchReport
from saebench.bench.gpu import GpuReport
from saebench.config import BenchConfig
from saebench.fields import station
from saebench.files import require_writable_file, write_json_atomic
from saebench.progress import progress

__all__ = ["BenchReport", "GpuReport", "bench"]


@station(BenchConfig)
def bench(config: BenchConfig) -> BenchReport | GpuReport:
    """Time training steps, on the GPU if there is one; see `saebench.bench.timing.take_turns` for how.

    Raises:
        UserError: there is no GPU and ``cpu`` was not asked for, ``out`` cannot be written, or the peers'
            environment is broken.
    """
    if config.out is not None:
        require_writable_file(config.out, what="the results")
    if not config.cpu:
        gpu.require_gpu()
    total = cpu.n_parts(config) if config.cpu else gpu.n_parts(config)
    with progress("bench", total=total, unit="part", quiet=config.quiet) as bar:

        def said(what: str) -> None:
            bar.update(1, what)

        report = cpu.measure(config, said) if config.cpu else gpu.measure(config, said)
    if config.out is not None:
        write_json_atomic(config.out, report.as_json())
    return report
