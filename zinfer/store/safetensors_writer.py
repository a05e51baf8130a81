"""Write safetensors files from tensors one at a time, whatever their layout or device.

safetensors' own `save_file` takes all tensors of a file as contiguous CPU tensors at once; here no more
than one tensor's copy is in memory, and the checksum comes with the write. The layout of the format is
drawn in `zinfer/weights/safetensors_header.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zinfer.errors import StoreError
from zinfer.store.entry import FileRecord
from zinfer.store.part_file import BLOCK, write_file
from zinfer.store.striped_file import Part, open_part
from zinfer.weights.safetensors_header import DTYPES, MAX_HEADER_BYTES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to write under `name`; `sha256` (hex), when known, is that of its bytes."""

    name: str
    tensor: torch.Tensor
    sha256: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.tensor.numel() * self.tensor.dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of `tensor` in row-major order; its own memory where possible, else a copy on the CPU."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach().as_subclass(torch.Tensor)
    if plain.device.type != "cpu" or not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
        plain = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
    array: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_dtype(where: str, named: NamedTensor) -> None:
    """Raise StoreError, beginning with `where`, when safetensors has no name for the tensor's dtype."""
    if named.tensor.dtype not in DTYPE_NAMES:
        raise StoreError(
            f"{where}: tensor {named.name!r} has dtype {named.tensor.dtype}, which a safetensors file cannot "
            f"hold; convert it to one of {', '.join(str(dtype) for dtype in DTYPE_NAMES)}"
        )


def write_shard(paths: Sequence[str], tensors: Sequence[NamedTensor], bar: Any) -> FileRecord:
    """Write `tensors` to the safetensors file `paths` (one, or the members to stripe over), whole or not at all.

    `bar` counts their bytes. Raises StoreError for a dtype the format lacks, a full or failing drive, and a tensor
    whose bytes do not have the sha256 it came with.
    """
    for named in tensors:
        check_dtype(paths[0], named)
    # As in the reference implementation wider types come first, so that every tensor is aligned to its type.
    ordered = sorted(tensors, key=lambda named: -named.tensor.dtype.itemsize)
    header = _header(paths[0], ordered)
    with open_part(paths, len(header) + sum(named.nbytes for named in ordered)) as file:
        file.write(memoryview(header))
        for named in ordered:
            _write_tensor(file, named, bar)
        size, sha256 = file.commit()
        return FileRecord(size, sha256, members=len(paths))


def write_index(folder: str, name: str, shard_of: dict[str, str], total: int) -> FileRecord:
    """Write the index `name` that places each tensor in its shard; `total` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    return FileRecord(*write_file(os.path.join(folder, name), json.dumps(index, indent=1).encode()))


def shard_names(count: int, variant: str | None = None) -> list[str]:
    """File names of `count` shards, as transformers writes them."""
    dot = f".{variant}" if variant else ""
    if count == 1:
        return [f"model{dot}.safetensors"]
    return [f"model{dot}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(path: str, ordered: Sequence[NamedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for named in ordered:
        header[named.name] = {
            "dtype": DTYPE_NAMES[named.tensor.dtype],
            "shape": list(named.tensor.shape),
            "data_offsets": [offset, offset + named.nbytes],
        }
        offset += named.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise StoreError(
            f"{path}: a header of {len(encoded)} bytes is over the format's limit, {MAX_HEADER_BYTES}"
        )
    return len(encoded).to_bytes(8, "little") + encoded


def _write_tensor(file: Part, named: NamedTensor, bar: Any) -> None:
    content = tensor_bytes(named.tensor)
    hasher = hashlib.sha256()
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        file.write(block)
        bar.update(len(block))
        if named.sha256 is not None:
            hasher.update(block)
    if named.sha256 not in (None, hasher.hexdigest()):
        raise StoreError(
            f"{file.path}: tensor {named.name!r} changed while it was written; keep the module unchanged "
            "until zinfer.run returns, and try again"
        )
