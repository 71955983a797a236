"""Shards: the fixed-size, page-aligned safetensors files that hold a column of a cache.

A shard is a safetensors file with one tensor named ``data``. Its header is padded with spaces so that the
data begins at byte 65,536, and the data of a full shard is a multiple of 64 KiB, so that the shards of a
column can be mapped one after the other into one tensor (mapping.py). Equal tensors make equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from saebench.core.errors import UserError
from saebench.core.files import atomic_file
from saebench.core.reading import open_file

DATA_START = 65_536
TENSOR_NAME = "data"
BLOCK_BYTES = 131_072
"""Data of a shard that has one checksum, from the first byte after the header; the last block is shorter."""
BLOCK_ALGORITHM = "xxh3-64"
SUM_DIGITS = 16


class Sums(NamedTuple):
    """Checksums of a shard: SHA-256 of the file, and XXH3 of each block of its data, 16 hexadecimal digits
    each, one after the other."""

    sha256: str
    blocks: str


TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "bool": torch.bool,
}
_SAFETENSORS_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int32": "I32", "bool": "BOOL"}


def row_bytes(dtype: str, row_shape: tuple[int, ...]) -> int:
    """Bytes of one row of a column."""
    n_bytes = TORCH_DTYPES[dtype].itemsize
    for size in row_shape:
        n_bytes *= size
    return n_bytes


def shard_path(column: Path, index: int) -> Path:
    return column / f"{index:05d}.safetensors"


def shard_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first 65,536 bytes of a shard of this type and shape."""
    n_bytes = row_bytes(dtype, shape)
    entry = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [0, n_bytes]}
    text = json.dumps({TENSOR_NAME: entry}, separators=(",", ":")).encode()
    return (DATA_START - 8).to_bytes(8, "little") + text.ljust(DATA_START - 8)


def sums_of(header: bytes, data: memoryview) -> Sums:
    """The checksums of a shard with this header and this data."""
    digest = hashlib.sha256(header)
    digest.update(data)
    blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    return Sums(digest.hexdigest(), "".join(map(xxh3_64_hexdigest, blocks)))


def write_shard(path: Path, rows: Tensor, dtype: str) -> Sums:
    """Write ``rows`` [n, ...] as one shard, atomically; returns its checksums.

    Raises:
        UserError: the disk is full or not writable.
    """
    assert rows.dtype == TORCH_DTYPES[dtype], rows.dtype
    header = shard_header(dtype, tuple(rows.shape))
    data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
    with atomic_file(path) as file:
        file.write(header)
        file.write(data)
    return sums_of(header, data)


def check_shard(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise a UserError for a shard that is missing, truncated, or of another type or shape.

    Does not read its data.
    """
    expected = DATA_START + row_bytes(dtype, shape)
    with open_file(path, what="the shard", way_out="restore it or make the cache again") as file:
        seen = os.fstat(file.fileno()).st_size
        header = file.read(DATA_START)
    if seen != expected:
        raise UserError(
            f"{path} has {seen:,} bytes instead of {expected:,}; restore it or make the cache again"
        )
    if header != shard_header(dtype, shape):
        raise UserError(
            f"{path} does not have the header of a shard of type {dtype} and shape {list(shape)}; "
            "restore it or make the cache again"
        )
