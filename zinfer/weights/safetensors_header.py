"""Parse and validate the header of one safetensors file.

Layout of the format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N,
N bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the tensors' bytes; offsets
count from the end of the header.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from zinfer.errors import CheckpointError
from zinfer.weights.packed import read_bytes, read_pack

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_BYTES = (1 << 63) - 1  # of a file, and of a tensor
MAX_QUOTED = 200  # characters of a file's own text in a message

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def quote(value: Any) -> str:
    """`value`, which came out of a file and may be anything, short enough for a message."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply to show"
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


@dataclass(frozen=True)
class TensorEntry:
    """Where one checkpoint tensor lies: `length` bytes at `offset` of `path`, row-major."""

    name: str
    path: str
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: str) -> dict[str, TensorEntry]:
    """Every tensor of the safetensors file `path`, by name, fully validated against the file's size.

    Of a packed shard `path` is member 0, and offsets are those of the whole shard (see packed.py).

    Raises CheckpointError naming the file, the tensor and the remedy.
    """
    raw, size = _read_raw_header(path)
    data_start = 8 + len(raw)
    entries: dict[str, TensorEntry] = {}
    for name, fields in _parse_json(path, raw).items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, fields, data_start, size)
    _refuse_overlaps(path, entries)
    return entries


def _read_raw_header(path: str) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the shard in bytes: of all its members where it is packed."""
    pack = read_pack(path)
    try:
        with open(path, "rb", buffering=0) as file:
            size = pack.size if pack else os.fstat(file.fileno()).st_size
            prefix = read_bytes(pack, 0, min(8, size)) if pack else os.pread(file.fileno(), 8, 0)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header claims {length} bytes but the file has {size}; the file is truncated or "
                    "not a safetensors file, fetch it again"
                )
            return read_bytes(pack, 8, length) if pack else os.pread(file.fileno(), length, 8), size
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot read this shard: {error.strerror}; the checkpoint is incomplete, fetch it again"
        ) from error


def _parse_json(path: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: header lists {quote(key)} twice; fetch the file again")
            found[key] = value
        return found

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: header is not JSON ({error}); the file is damaged, fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object; the file is damaged, fetch it again")
    return header


def _entry(path: str, name: str, fields: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {quote(name)}: malformed header entry {quote(fields)}; fetch the file again"
        ) from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {quote(name)} has dtype {quote(dtype_name)}; zinfer knows {', '.join(DTYPES)}"
        )
    dtype = DTYPES[dtype_name]
    counts = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise CheckpointError(
            f"{path}: tensor {quote(name)}: shape {quote(shape)} or offsets {quote([begin, end])} are not counts; "
            "the file is damaged, fetch it again"
        )
    # Empty tensors too: torch multiplies the dimensions it is given. Stops early: a product of all would take
    # minutes for a hostile shape.
    products = itertools.accumulate((count or 1 for count in shape), operator.mul, initial=dtype.itemsize)
    if end > MAX_BYTES or any(product > MAX_BYTES for product in products):
        raise CheckpointError(
            f"{path}: tensor {quote(name)}: its shape or offsets are beyond any file; "
            "the file is damaged, fetch it again"
        )
    expected = prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {quote(name)}: {dtype_name} {quote(shape)} needs {expected} bytes, "
            f"its offsets {quote([begin, end])} give {quote(end - begin)}; the file is damaged, fetch it again"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{path}: tensor {quote(name)} ends at byte {data_start + end} but the file has {size}; "
            "the file is truncated, fetch it again"
        )
    return TensorEntry(name, path, data_start + begin, expected, dtype, tuple(shape))


def _refuse_overlaps(path: str, entries: dict[str, TensorEntry]) -> None:
    ordered = sorted((entry for entry in entries.values() if entry.length), key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.length > after.offset:
            raise CheckpointError(
                f"{path}: tensors {quote(before.name)} and {quote(after.name)} overlap at byte {after.offset}; "
                "the file is damaged, fetch it again"
            )
