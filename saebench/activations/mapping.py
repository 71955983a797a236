"""Memory mapping: the shards of a column as one file-backed tensor, without copies.

Address space for the whole column is reserved once, then the data of each shard is mapped to its part of it
(MAP_FIXED). The pages are private and copy-on-write: writing to the tensor does not change a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.manifest import CacheColumn, column_folder
from saebench.activations.shards import DATA_START, TORCH_DTYPES, row_bytes, shard_path
from saebench.core.errors import UserError

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module does not name it
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ = 22  # Linux 5.14


def map_files(files: Sequence[Path], n_bytes: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """A flat tensor over the data of ``files``, of which file i contributes ``n_bytes[i]`` bytes.

    Every file except the last must contribute a multiple of the page size. Where the platform does not
    support this mapping, the files are read into ordinary memory, with a warning. The mapping lives as long
    as the tensor or a view of it. As with every memory map, access kills the process if a file was truncated
    while it was mapped.
    """
    if sum(n_bytes) == 0:
        return torch.empty(0, dtype=dtype)
    buffer: ctypes.Array[ctypes.c_ubyte] | bytearray
    try:
        buffer = _map(files, n_bytes)
    except (OSError, NotImplementedError) as error:
        warnings.warn(
            f"{files[0].parent} cannot be memory-mapped here ({error}); reading it into memory instead",
            stacklevel=2,
        )
        buffer = _read(files, n_bytes)
    return torch.frombuffer(buffer, dtype=dtype)


def map_column(cache: Path, name: str, column: CacheColumn) -> Tensor:
    """The column ``name`` of the cache in directory ``cache``, [n, ...], mapped from disk."""
    kind = column.type
    files = [shard_path(cache / column_folder(name), i) for i in range(len(column.shards))]
    sizes = [shard.rows * row_bytes(kind.dtype, kind.row_shape) for shard in column.shards]
    return map_files(files, sizes, dtype=TORCH_DTYPES[kind.dtype]).view(-1, *kind.row_shape)


def populate(tensor: Tensor) -> None:
    """Read the pages of a contiguous mapped tensor into the page cache, in order."""
    libc = _libc()
    if libc is not None:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        if libc.madvise(start, length, _MADV_POPULATE_READ) == 0:
            return
    tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


@cache
def _libc() -> Any | None:
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mmap"):
        return None
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _mmap(libc: Any, address: int | None, n_bytes: int, protection: int, flags: int, file: int) -> int:
    offset = DATA_START if file >= 0 else 0
    result = libc.mmap(address, n_bytes, protection, flags, file, offset)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _map(files: Sequence[Path], n_bytes: Sequence[int]) -> ctypes.Array[ctypes.c_ubyte]:
    libc = _libc()
    if libc is None:
        raise NotImplementedError("no mmap on this platform")
    if any(size % mmap.ALLOCATIONGRANULARITY for size in n_bytes[:-1]):
        raise NotImplementedError(f"its shards are not multiples of {mmap.ALLOCATIONGRANULARITY:,} bytes")
    total = sum(n_bytes)
    private = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    base = _mmap(libc, None, total, 0, private | mmap.MAP_ANONYMOUS, -1)
    try:
        address = base
        for path, size in zip(files, n_bytes, strict=True):
            with _descriptor(path, DATA_START + size) as file:
                _mmap(libc, address, size, mmap.PROT_READ | mmap.PROT_WRITE, private | _MAP_FIXED, file)
            address += size
    except BaseException:
        libc.munmap(base, total)
        raise
    buffer = (ctypes.c_ubyte * total).from_address(base)
    # The tensor holds the buffer. Do not unmap at exit: threads may still be reading then.
    weakref.finalize(buffer, libc.munmap, base, total).atexit = False
    return buffer


@contextlib.contextmanager
def _descriptor(path: Path, n_bytes: int) -> Iterator[int]:
    """A descriptor of a file that has at least ``n_bytes``: access beyond the end would kill the process."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if (seen := os.fstat(descriptor).st_size) < n_bytes:
            raise UserError(
                f"{path} has {seen:,} bytes instead of {n_bytes:,}; restore it or make the cache again"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _read(files: Sequence[Path], n_bytes: Sequence[int]) -> bytearray:
    buffer = bytearray(sum(n_bytes))
    view, start = memoryview(buffer), 0
    for path, size in zip(files, n_bytes, strict=True):
        with open(path, "rb") as file:
            file.seek(DATA_START)
            if file.readinto(view[start : start + size]) != size:
                raise UserError(f"{path} is too short; restore it or make the cache again")
        start += size
    return buffer
