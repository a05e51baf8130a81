"""Convert a checkpoint of PyTorch pickles (pytorch_model*.bin) to safetensors, once."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

from zinfer.errors import CheckpointError
from zinfer.store.copying import byte_bar, copy_file
from zinfer.store.entry import Entry, FileRecord
from zinfer.store.folder import require_space, store_roots
from zinfer.store.safetensors_writer import NamedTensor, shard_names, write_index, write_shard
from zinfer.store.source import SourceFile, identity_of, readable_name, small_files, source_file
from zinfer.store.striped_file import shares
from zinfer.weights.checkpoint import find_shards, read_index

logger = logging.getLogger("zinfer")

# What torch.load raises on a file that is damaged or that weights_only refuses.
_LOAD_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, AttributeError, TypeError),
)


def convert_bin(
    folder: str, nvme_path: str | Sequence[str], *, variant: str | None = None, progress: bool = True
) -> str:
    """A folder with the safetensors form of the checkpoint in `folder`, made in the store now or found there.

    The checkpoint has a pytorch_model.bin, or a pytorch_model.bin.index.json and the files it names (those of
    `variant`, when given). Each .bin file becomes one shard that holds the same names; the small files are
    copied; with several paths the shards are striped over them. `folder` itself is returned where it has safetensors
    shards already. Pickles are only read as
    plain tensors (`weights_only`), so no code in them runs. `progress` shows a bar in bytes.

    Raises CheckpointError when a file is missing, damaged, refused, or holds no tensors,
    CheckpointChangedError when one changes meanwhile, and StoreError when `nvme_path` cannot be used.
    """
    roots = store_roots(nvme_path)
    if find_shards(folder, variant) is not None:
        return folder
    index = os.path.join(folder, f"pytorch_model.bin.index{f'.{variant}' if variant else ''}.json")
    file_of = read_index(index) if os.path.lexists(index) else {}
    single = os.path.join(folder, f"pytorch_model{f'.{variant}' if variant else ''}.bin")
    if not file_of and not os.path.lexists(single):
        raise CheckpointError(
            f"{folder}: neither {os.path.basename(single)} nor {os.path.basename(index)} in it"
        )
    bins = [source_file(folder, path) for path in sorted(set(file_of.values())) or [single]]
    small = small_files(folder, leave=(os.path.basename(index),))
    identity = identity_of("convert", folder, [*bins, *small])
    entry = Entry(roots, readable_name(folder), identity, "convert", os.path.realpath(folder))
    return entry.obtain(lambda: _convert(entry, bins, file_of, small, variant, progress))


def _convert(
    entry: Entry,
    bins: list[SourceFile],
    file_of: dict[str, str],
    small: list[SourceFile],
    variant: str | None,
    progress: bool,
) -> dict[str, FileRecord]:
    """Write the entry's files; an interrupted conversion leaves none of them."""
    entry.clear()
    total = sum(file.size for file in (*bins, *small))
    needed = [
        sum(column) for column in zip(*(shares(file.size, len(entry.roots)) for file in bins), strict=True)
    ]
    needed[0] += sum(file.size for file in small)
    require_space(entry.roots, needed, f"the safetensors form of {entry.source}")
    logger.info("converting %d bytes of %s to %s", total, entry.source, entry.folder)
    shard_of: dict[str, str] = {}
    nbytes = 0
    try:
        with byte_bar(total, "converting", progress) as bar:
            records = {file.name: copy_file(file, (entry.path(file.name),), bar) for file in small}
            for file, name in zip(bins, shard_names(len(bins), variant), strict=True):
                tensors = [
                    NamedTensor(key, tensor)
                    for key, tensor in _load(file).items()
                    if file_of.get(key, file.path) == file.path and key not in shard_of
                ]
                records[name] = write_shard(entry.shard_paths(name), tensors, bar)
                file.check_now()
                shard_of.update({named.name: name for named in tensors})
                nbytes += sum(named.nbytes for named in tensors)
                del tensors
                _drop_cache(file.path)
        _check_names(entry.source, shard_of, file_of)
        if len(bins) > 1:
            index = f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
            records[index] = write_index(entry.folder, index, shard_of, nbytes)
        return records
    except BaseException:
        entry.clear()
        raise


def _load(file: SourceFile) -> dict[str, torch.Tensor]:
    """The tensors of one .bin file, mapped rather than read where its format allows that."""
    file.check_now()
    mapped = zipfile.is_zipfile(file.path)
    if not mapped:
        logger.info(
            "%s: in the format from before torch 1.6, which has to be read into memory whole", file.path
        )
    try:
        loaded: Any = torch.load(file.path, map_location="cpu", weights_only=True, mmap=mapped)
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{file.path}: cannot be read as plain tensors ({_reason(error)}): it is damaged, or holds "
            "more than tensors and could run code; fetch it again, or use a safetensors version of the model"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file.path}: holds a {type(loaded).__name__}, not a dict of tensors by name")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            logger.warning("%s: %r is a %s, not a tensor; left out", file.path, name, type(value).__name__)
        elif (
            not isinstance(name, str) or value.layout != torch.strided or value.is_quantized or value.is_meta
        ):
            raise CheckpointError(
                f"{file.path}: {name!r} is not a dense tensor with a name; zinfer cannot store it"
            )
        else:
            tensors[name] = value
    if not tensors:
        raise CheckpointError(f"{file.path}: no tensors in it; it is not a model's state dict")
    return tensors


def _reason(error: Exception) -> str:
    """What torch.load objects to, in one line, without its advice to load the file unsafely."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
    return text.partition(" Please use")[0].strip().splitlines()[0].rstrip(".")


def _check_names(source: str, shard_of: dict[str, str], file_of: dict[str, str]) -> None:
    lost = sorted(set(file_of) - set(shard_of))
    if lost:
        raise CheckpointError(
            f"{file_of[lost[0]]}: the index of {source} places {lost[0]!r} in this file, which lacks it "
            f"({len(lost)} such tensors); fetch the checkpoint again"
        )


def _drop_cache(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
