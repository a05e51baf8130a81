"""Copy a checkpoint to the NVMe drive, once; an interrupted copy goes on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from zinfer.errors import CheckpointError, DriveError, OptionError
from zinfer.store.entry import Entry, FileRecord
from zinfer.store.folder import describe, device_of, require_space, store_roots
from zinfer.store.part_file import BLOCK, PART, CacheDropper, PartFile, read_at
from zinfer.store.source import SourceFile, identity_of, readable_name, small_files, source_file
from zinfer.store.striped_file import open_part, shares
from zinfer.weights.checkpoint import find_shards
from zinfer.weights.packed import read_pack

if TYPE_CHECKING:
    from hashlib import _Hash

logger = logging.getLogger("zinfer")


def copy_checkpoint(
    folder: str, nvme_path: str | Sequence[str], *, variant: str | None = None, progress: bool = True
) -> str:
    """A folder on `nvme_path`'s filesystem that holds the checkpoint in `folder`.

    That is `folder` itself, unchanged, where all its safetensors shards (those of `variant`, when given)
    lie on that filesystem; otherwise the store's copy of the shards and of the small files, made now or
    found there. With several paths it is always the store's, in the first, the shards striped over all of them.
    `progress` shows a bar in bytes.

    Raises CheckpointError when there are no shards or one is missing, CheckpointChangedError when a file
    changes while it is copied, DriveError when one cannot be read, StoreError when `nvme_path` cannot be
    used or has too little room, and OptionError when it names a folder twice or the checkpoint is striped already.
    """
    roots = store_roots(nvme_path)
    paths = find_shards(folder, variant)
    if paths is None:
        raise CheckpointError(f"{folder}: no safetensors shards in it, so there is nothing to copy")
    shards = [source_file(folder, path) for path in paths]
    device = device_of(roots[0])
    if len(roots) == 1 and all(os.stat(shard.path).st_dev == device for shard in shards):
        return folder
    for path in paths:
        if read_pack(path) is not None:
            raise OptionError(
                f"{path}: the checkpoint is striped over drives already and streams as it is: leave nvme_path out, or "
                "give the checkpoint that it was made from"
            )
    names = {shard.name for shard in shards}
    files = [file for file in small_files(folder) if file.name not in names] + shards
    identity = identity_of("copy", folder, files)
    entry = Entry(roots, readable_name(folder), identity, "copy", os.path.realpath(folder))
    targets = {
        file.name: entry.shard_paths(file.name) if file.name in names else (entry.path(file.name),)
        for file in files
    }
    return entry.obtain(lambda: _copy_missing(entry, files, targets, progress))


def _copy_missing(
    entry: Entry, files: list[SourceFile], targets: dict[str, tuple[str, ...]], progress: bool
) -> dict[str, FileRecord]:
    """Copy what an earlier call has not finished; the records of all files."""
    records = entry.done()
    missing = [file for file in files if file.name not in records]
    to_copy = sum(file.size for file in missing)
    needed = [0] * len(entry.roots)
    for file in missing:
        paths = targets[file.name]
        for number, share in enumerate(shares(file.size, len(paths))):
            needed[number] += share - min(_size_or_zero(paths[number] + PART), share)
    require_space(entry.roots, needed, f"the rest of the copy of {entry.source}")
    logger.info("copying %d bytes of %s to %s", to_copy, entry.source, entry.folder)
    with byte_bar(sum(file.size for file in files), "copying", progress) as bar:
        bar.update(sum(records[file.name].size for file in files if file.name in records))
        for file in missing:
            records[file.name] = copy_file(file, targets[file.name], bar)
            entry.note(records)
    return {file.name: records[file.name] for file in files}


def byte_bar(total: int, description: str, progress: bool) -> Any:
    """A tqdm bar that counts `total` bytes; silent unless `progress`."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=not progress)


def copy_file(source: SourceFile, target: Sequence[str], bar: Any) -> FileRecord:
    """Copy `source` to `target`, one path, going on after what its .part already holds; or the members of a shard.

    An error leaves the part for the next call, but none of a striped shard, nor of a source that changed meanwhile:
    that raises CheckpointChangedError. Raises DriveError and StoreError too.
    """
    try:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        message = f"{source.path}: cannot be opened: {describe(error)}; check the checkpoint"
        raise DriveError(message, source.path, 0, source.size, error.errno or 0, "buffered") from error
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        source.check(os.fstat(fd))
        with open_part(target, source.size, keep=True) as part:
            buffer = memoryview(bytearray(min(BLOCK, source.size + 1)))
            if isinstance(part, PartFile):
                _resume(part, fd, source, buffer, bar)
            dropper = CacheDropper(fd)
            while part.offset < source.size:
                count = read_at(fd, source.path, buffer[: source.size - part.offset], part.offset)
                if count == 0:
                    break
                part.write(buffer[:count])
                dropper.passed(count)
                bar.update(count)
            dropper.drop()
            try:
                source.check(os.fstat(fd))
                source.check_now()
            except CheckpointError:
                part.discard()
                raise
            if part.offset != source.size:
                message = (
                    f"{source.path}: the file ended at byte {part.offset} of {source.size}; check its drive"
                )
                raise DriveError(message, source.path, part.offset, source.size - part.offset, 0, "buffered")
            size, sha256 = part.commit()
            return FileRecord(size, sha256, source.size, source.mtime_ns, len(target))
    finally:
        os.close(fd)


def _resume(part: PartFile, fd: int, source: SourceFile, buffer: memoryview, bar: Any) -> None:
    """Set `part` to go on after its bytes when they are the source's first; else to start again."""
    length = part.length()
    hasher = _hash_of_common_prefix(part.fd, part.part, fd, source.path, length, buffer, bar)
    if hasher is None or length > source.size:
        logger.warning("%s: not the beginning of %s; copying the file from its start", part.part, source.path)
        length, hasher = 0, hashlib.sha256()
    elif length:
        logger.info("%s: going on after %d bytes", part.part, length)
    part.start_at(length, hasher)


def _hash_of_common_prefix(
    part_fd: int, part_path: str, fd: int, path: str, length: int, buffer: memoryview, bar: Any
) -> _Hash | None:
    """sha256 of the first `length` bytes of both files where they agree, else None; `bar` follows."""
    hasher, offset = hashlib.sha256(), 0
    own = memoryview(bytearray(len(buffer)))
    droppers = (CacheDropper(part_fd, written=True), CacheDropper(fd))
    while offset < length:
        count = read_at(part_fd, part_path, own[: length - offset], offset)
        if read_at(fd, path, buffer[:count], offset) != count or own[:count] != buffer[:count]:
            bar.update(-offset)
            return None
        hasher.update(buffer[:count])
        offset += count
        bar.update(count)
        for dropper in droppers:
            dropper.passed(count)
    return hasher


def _size_or_zero(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0
