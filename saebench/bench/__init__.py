"""`saebench bench`: this library against others and against the bare matrix product, in one table."""

from saebench.bench.cpu import as_json, bench

__all__ = ["as_json", "bench"]
