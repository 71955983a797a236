"""`saebench bench`: this library against others and against the bare matrix product, in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.bench.cpu import BenchReport
    from saebench.bench.gpu import GpuReport
    from saebench.bench.run import bench
    from saebench.bench.store import StoreReport

__all__ = ["BenchReport", "GpuReport", "StoreReport", "bench"]

__getattr__ = lazy_names(
    __name__, {"BenchReport": "cpu", "GpuReport": "gpu", "StoreReport": "store", "bench": "run"}
)
