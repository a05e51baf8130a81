"""Write the parameters of a live module to the NVMe drive, once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zinfer.errors import OptionError
from zinfer.store.copying import byte_bar
from zinfer.store.entry import Entry, FileRecord
from zinfer.store.folder import require_space, store_roots
from zinfer.store.part_file import BLOCK
from zinfer.store.safetensors_writer import (
    NamedTensor,
    check_dtype,
    shard_names,
    tensor_bytes,
    write_index,
    write_shard,
)
from zinfer.store.source import safe_name
from zinfer.store.striped_file import shares

logger = logging.getLogger("zinfer")

SHARD_BYTES = 5_000_000_000


def save_module(
    module: nn.Module, nvme_path: str | Sequence[str], *, progress: bool = True
) -> tuple[str, dict[str, str]]:
    """Write each distinct parameter of `module` once, as a checkpoint in the store under `nvme_path`.

    With several paths its shards are striped over them. Returns the entry's folder and, for every parameter name, the
    name its tensor has there; tied parameters (the same object under several names) share one. A module of the same
    class, names, shapes, dtypes and contents is found again and not written. No more than one tensor's copy is held
    beyond the module.
    `progress` shows bars in bytes.

    Raises OptionError, before anything is written, when there are no parameters or one has no bytes (meta,
    lazy, streamed, sparse), and StoreError when `nvme_path` cannot be used or a dtype cannot be stored.
    """
    roots = store_roots(nvme_path)
    parameters, stored = _distinct_parameters(module)
    for name, parameter in parameters.items():
        _check_has_bytes(name, parameter)
        check_dtype(type(module).__name__, NamedTensor(name, parameter))
    total = sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters.values())
    tensors = []
    with byte_bar(total, "hashing", progress) as bar:
        for name, parameter in parameters.items():
            tensors.append(NamedTensor(name, parameter, _digest(parameter)))
            bar.update(tensors[-1].nbytes)
    entry = Entry(
        roots, safe_name(type(module).__name__), _identity(module, tensors, stored), "module", _class(module)
    )
    return entry.obtain(lambda: _write(entry, tensors, total, progress)), stored


def _distinct_parameters(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct parameter under its first name, and the first name for every name."""
    first: dict[int, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    stored: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored[name] = first.setdefault(id(parameter), name)
        parameters.setdefault(stored[name], parameter)
    if not parameters:
        raise OptionError(f"{_class(module)} has no parameters, so there is nothing to write to nvme_path")
    return parameters, stored


def _check_has_bytes(name: str, parameter: torch.Tensor) -> None:
    """Raise OptionError unless `parameter` is backed by memory that holds its elements."""
    with torch._C.DisableTorchFunctionSubclass():
        if is_lazy(parameter):
            raise OptionError(f"parameter {name!r} is not initialized; run the module once before")
        if parameter.layout != torch.strided:
            raise OptionError(f"parameter {name!r} has layout {parameter.layout}; make it dense: .to_dense()")
        if parameter.untyped_storage().device.type == "meta":
            raise OptionError(
                f"parameter {name!r} is on the meta device and has no bytes; load the module's weights"
            )
        if parameter.numel() and parameter.data_ptr() == 0:
            raise OptionError(
                f"parameter {name!r} is a {type(parameter).__name__}, a tensor without memory of its own, "
                "whose bytes cannot be written; give a module with plain parameters"
            )


def _digest(parameter: torch.Tensor) -> str:
    content = tensor_bytes(parameter)
    hasher = hashlib.sha256()
    for start in range(0, len(content), BLOCK):
        hasher.update(content[start : start + BLOCK])
    return hasher.hexdigest()


def _identity(module: nn.Module, tensors: list[NamedTensor], stored: dict[str, str]) -> str:
    facts = [
        (named.name, list(named.tensor.shape), str(named.tensor.dtype), named.sha256) for named in tensors
    ]
    return hashlib.sha256(json.dumps(["module", _class(module), facts, stored]).encode()).hexdigest()


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _write(entry: Entry, tensors: list[NamedTensor], total: int, progress: bool) -> dict[str, FileRecord]:
    entry.clear()
    shards = _shards(tensors)
    sizes = (sum(named.nbytes for named in shard) for shard in shards)
    needed = [sum(column) for column in zip(*(shares(size, len(entry.roots)) for size in sizes), strict=True)]
    require_space(entry.roots, needed, f"the parameters of {entry.source}")
    names = shard_names(len(shards))
    try:
        with byte_bar(total, "writing", progress) as bar:
            records = {
                name: write_shard(entry.shard_paths(name), shard, bar)
                for name, shard in zip(names, shards, strict=True)
            }
        if len(shards) > 1:
            shard_of = {
                named.name: name for name, shard in zip(names, shards, strict=True) for named in shard
            }
            index = "model.safetensors.index.json"
            records[index] = write_index(entry.folder, index, shard_of, total)
        return records
    except BaseException:
        entry.clear()
        raise


def _shards(tensors: list[NamedTensor]) -> list[list[NamedTensor]]:
    """`tensors` in order, cut before SHARD_BYTES are exceeded; a larger tensor is alone in its shard."""
    shards: list[list[NamedTensor]] = []
    room = -1
    for named in tensors:
        if not shards or named.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(named)
        room -= named.nbytes
    return shards
