"""Copy a checkpoint to the NVMe drive, once; an interrupted copy goes on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from zinfer.errors import CheckpointError, DriveError
from zinfer.store.entry import Entry, FileRecord
from zinfer.store.folder import describe, device_of, require_space, store_root
from zinfer.store.part_file import BLOCK, PART, CacheDropper, PartFile, read_at
from zinfer.store.source import SourceFile, identity_of, readable_name, small_files, source_file
from zinfer.weights.checkpoint import find_shards

if TYPE_CHECKING:
    from hashlib import _Hash

logger = logging.getLogger("zinfer")


def copy_checkpoint(folder: str, nvme_path: str, *, variant: str | None = None, progress: bool = True) -> str:
    """A folder on `nvme_path`'s filesystem that holds the checkpoint in `folder`.

    That is `folder` itself, unchanged, where all its safetensors shards (those of `variant`, when given)
    lie on that filesystem; otherwise the store's copy of the shards and of the small files, made now or
    found there. `progress` shows a bar in bytes.

    Raises CheckpointError when there are no shards or one is missing, CheckpointChangedError when a file
    changes while it is copied, DriveError when one cannot be read, and StoreError when `nvme_path` cannot be
    used or has too little room.
    """
    root = store_root(nvme_path)
    paths = find_shards(folder, variant)
    if paths is None:
        raise CheckpointError(f"{folder}: no safetensors shards in it, so there is nothing to copy")
    shards = [source_file(folder, path) for path in paths]
    device = device_of(root)
    if all(os.stat(shard.path).st_dev == device for shard in shards):
        return folder
    names = {shard.name for shard in shards}
    files = [file for file in small_files(folder) if file.name not in names] + shards
    identity = identity_of("copy", folder, files)
    entry = Entry(root, readable_name(folder), identity, "copy", os.path.realpath(folder))
    return entry.obtain(lambda: _copy_missing(entry, files, progress))


def _copy_missing(entry: Entry, files: list[SourceFile], progress: bool) -> dict[str, FileRecord]:
    """Copy what an earlier call has not finished; the records of all files."""
    records = entry.done()
    missing = [file for file in files if file.name not in records]
    parts = sum(min(_size_or_zero(entry.path(file.name) + PART), file.size) for file in missing)
    to_copy = sum(file.size for file in missing)
    require_space(entry.root, to_copy - parts, f"the rest of the copy of {entry.source}")
    logger.info("copying %d bytes of %s to %s", to_copy, entry.source, entry.folder)
    with byte_bar(sum(file.size for file in files), "copying", progress) as bar:
        bar.update(sum(records[file.name].size for file in files if file.name in records))
        for file in missing:
            records[file.name] = copy_file(file, entry.path(file.name), bar)
            entry.note(records)
    return {file.name: records[file.name] for file in files}


def byte_bar(total: int, description: str, progress: bool) -> Any:
    """A tqdm bar that counts `total` bytes; silent unless `progress`."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=not progress)


def copy_file(source: SourceFile, target: str, bar: Any) -> FileRecord:
    """Copy `source` to `target`, going on after what `target`.part already holds of it.

    An error leaves the part for the next call, but none of a source that changed meanwhile: that raises
    CheckpointChangedError. Raises DriveError and StoreError too.
    """
    try:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        message = f"{source.path}: cannot be opened: {describe(error)}; check the checkpoint"
        raise DriveError(message, source.path, 0, source.size, error.errno or 0, "buffered") from error
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        source.check(os.fstat(fd))
        with PartFile(target, source.size, keep=True) as part:
            buffer = memoryview(bytearray(min(BLOCK, source.size + 1)))
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
            return FileRecord(size, sha256, source.size, source.mtime_ns)
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
