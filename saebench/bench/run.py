"""``bench``: run one of the benchmarks (CPU, GPU or feature store)."""

from __future__ import annotations

from collections.abc import Callable

from saebench.bench import cpu, gpu
from saebench.bench import store as feature_store
from saebench.bench.cpu import BenchReport
from saebench.bench.gpu import GpuReport
from saebench.bench.settings import BenchConfig
from saebench.bench.store import StoreReport
from saebench.core.files import require_writable_file, write_json_atomic
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings


@accepts_settings(BenchConfig)
def bench(config: BenchConfig) -> BenchReport | GpuReport | StoreReport:
    """Time training steps on a GPU, or with ``cpu`` on the CPU; see `saebench.bench.timing.take_turns`.

    With ``store``, measure a feature store instead; see `saebench.bench.store.measure`.

    Raises:
        UserError: there is no GPU and ``cpu`` is False, ``out`` cannot be written, or the environment of the
            peers is broken.
    """
    if config.out is not None:
        require_writable_file(config.out, what="the results")
    measure, total = _what(config)
    with progress("bench", total=total, unit="part", quiet=config.quiet) as bar:

        def announce(what: str) -> None:
            bar.update(1, what)

        report = measure(config, announce)
    if config.out is not None:
        write_json_atomic(config.out, report.as_json())
    return report


def _what(config: BenchConfig) -> tuple[Callable[..., BenchReport | GpuReport | StoreReport], int]:
    """``(measure, parts)``: the function of the benchmark, and how often it calls ``announce``."""
    if config.store:
        return feature_store.measure, feature_store.N_PARTS
    if config.cpu:
        return cpu.measure, cpu.n_parts(config)
    gpu.require_gpu()
    return gpu.measure, gpu.n_parts(config)
