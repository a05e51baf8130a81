"""Read and write large files block by block, hashing, without filling the page cache.

A process that may use little memory is charged for the page cache it fills, so what was read or written
is flushed and dropped every DROP_EVERY bytes.
"""

from __future__ import annotations

import hashlib
import os
from types import TracebackType
from typing import TYPE_CHECKING

from zinfer.errors import DriveError, StoreError
from zinfer.store.folder import describe, write_errors

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 8 << 20  # bytes of one read or write
DROP_EVERY = 64 << 20  # bytes after which the page cache is flushed and dropped
PART = ".part"


class CacheDropper:
    """Drops what `fd` left in the page cache, every DROP_EVERY bytes; flushes first when `written`."""

    def __init__(self, fd: int, *, written: bool = False) -> None:
        self._fd = fd
        self._written = written
        self._pending = 0

    def passed(self, nbytes: int) -> None:
        """Say that `nbytes` more bytes went through."""
        self._pending += nbytes
        if self._pending >= DROP_EVERY:
            self.drop()

    def drop(self) -> None:
        """Flush and drop everything now. Raises OSError when the flush fails."""
        if self._written:
            os.fdatasync(self._fd)  # dirty pages cannot be dropped
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._pending = 0


def read_at(fd: int, path: str, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` of `fd`; the number of bytes read, short only at the end of the file.

    Raises DriveError naming `path`.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise DriveError(
                f"{path}: cannot read {len(view) - done} bytes at offset {offset + done}: {describe(error)}; "
                "check the drive",
                path,
                offset + done,
                len(view) - done,
                error.errno or 0,
                "buffered",
            ) from error
        if count == 0:
            break
        done += count
    return done


def hash_file(path: str) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of the file at `path`, leaving none of it in the page cache.

    Raises OSError when it cannot be opened, DriveError when it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = memoryview(bytearray(min(BLOCK, os.fstat(fd).st_size + 1)))
        hasher, dropper, size = hashlib.sha256(), CacheDropper(fd), 0
        while count := read_at(fd, path, view, size):
            hasher.update(view[:count])
            dropper.passed(count)
            size += count
        dropper.drop()
        return size, hasher.hexdigest()
    finally:
        os.close(fd)


class PartFile:
    """`path`.part while it is written from front to back; `path` once `commit` has made sure of it.

    Used by one thread, as a context manager. Left by an error, the part is removed;
    with `keep` it stays, and a part that is already there is opened as it is.
    Writing and committing raise StoreError naming the file; `expected` is its final size in bytes.
    """

    def __init__(self, path: str, expected: int, *, keep: bool = False) -> None:
        self.path = path
        self.part = path + PART
        self.offset = 0
        self._expected = expected
        self._keep = keep
        self._hash: _Hash = hashlib.sha256()
        with write_errors(self.part, self._missing):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fresh = 0 if keep else os.O_TRUNC
            self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | fresh, 0o666)
        self._dropper = CacheDropper(self.fd, written=True)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        os.close(self.fd)
        if kind is not None and not self._keep:
            self.discard()

    def discard(self) -> None:
        """Remove the part."""
        if os.path.lexists(self.part):
            os.unlink(self.part)

    def length(self) -> int:
        """Bytes the part has on the drive."""
        return os.fstat(self.fd).st_size

    def start_at(self, offset: int, hasher: _Hash) -> None:
        """Keep the part's first `offset` bytes, whose hash is `hasher`, and write on from there."""
        with write_errors(self.part, self._missing):
            os.ftruncate(self.fd, offset)
        self.offset, self._hash = offset, hasher

    def write(self, data: memoryview) -> None:
        """Append `data` (bytes)."""
        with write_errors(self.part, self._missing):
            while len(data):
                count = os.pwrite(self.fd, data[:BLOCK], self.offset)
                self._hash.update(data[:count])
                self.offset += count
                self._dropper.passed(count)
                data = data[count:]

    def commit(self) -> tuple[int, str]:
        """Make the file durable, read it back, give it its name; its size in bytes and sha256 (hex).

        Raises StoreError when what the drive gives back is not what was written; the part is removed then.
        """
        written = (self.offset, self._hash.hexdigest())
        with write_errors(self.part, self._missing):
            os.fsync(self.fd)
            self._dropper.drop()
            if hash_file(self.part) != written:
                self.discard()
                raise StoreError(
                    f"{self.part}: what the drive gives back is not what was written to it; the file was "
                    "removed. Check the drive and memory (smartctl, dmesg) before trying again"
                )
            os.replace(self.part, self.path)
            sync_folder(os.path.dirname(self.path))
        return written

    def _missing(self) -> int:
        return max(self._expected - self.offset, 0)


def write_file(path: str, content: bytes) -> tuple[int, str]:
    """Write `content` to `path` whole or not at all; its size (bytes) and sha256. Raises StoreError."""
    with PartFile(path, len(content)) as file:
        file.write(memoryview(content))
        return file.commit()


def sync_folder(folder: str) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
