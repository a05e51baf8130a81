"""Write and read back shards that are striped over several folders (see zinfer/weights/packed.py)."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from zinfer.errors import StoreError
from zinfer.store.folder import write_errors
from zinfer.store.part_file import BLOCK, DROP_EVERY, PART, CacheDropper, PartFile, read_at, sync_folder
from zinfer.weights.packed import MAX_BYTES, PAGE, STRIPE, Geometry, Header, format_page

if TYPE_CHECKING:
    from hashlib import _Hash


class StripedPartFile:
    """The members `paths` of one shard, each as a .part, while the shard is written from front to back.

    Used as a PartFile is: by one thread, as a context manager; `commit` makes the shard whole. Headers are written
    last, so no part ever passes for a member. Left by an error the parts are removed: a striped shard is begun
    again. Raises StoreError naming the member, and OptionError for paths that no header can hold.
    """

    def __init__(self, paths: Sequence[str], expected: int) -> None:
        self.path = paths[0]
        self.offset = 0
        self._paths = tuple(paths)
        self._parts = tuple(path + PART for path in paths)
        self._geometry = Geometry(len(paths), STRIPE, expected)
        self._set_id = secrets.token_hex(16)
        self._hash: _Hash = hashlib.sha256()
        self._fds: list[int] = []
        self._pending = 0  # bytes written since the last flush
        self._pool = ThreadPoolExecutor(len(paths), "zinfer-flush")  # all drives at once, not one by one
        try:
            for part in self._parts:
                with write_errors(part, self._missing):
                    os.makedirs(os.path.dirname(part), exist_ok=True)
                    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                    self._fds.append(os.open(part, flags, 0o666))
        except BaseException:
            self._close()
            self.discard()
            raise

    def __enter__(self) -> StripedPartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Remove the parts."""
        for part in self._parts:
            if os.path.lexists(part):
                os.unlink(part)

    def write(self, data: memoryview) -> None:
        """Append `data` (bytes)."""
        for member, at, taken in self._geometry.pieces(self.offset, len(data)):
            self._write_at(member, data[:taken], at)
            self._hash.update(data[:taken])
            self.offset += taken
            data = data[taken:]

    def commit(self) -> tuple[int, str]:
        """Write the headers, make all members durable, read them back, name them; the shard's size and sha256 (hex).

        Raises StoreError when what the drives give back is not what was written; the parts are removed then.
        """
        written = (self.offset, self._hash.hexdigest())
        pages = self._pages()
        for member, page in enumerate(pages):
            self._write_at(member, memoryview(page), 0)
        self._flush()
        with write_errors(self.path, self._missing):
            found = hash_striped(self._parts, replace(self._geometry, size=self.offset), pages)
        if found != written:
            self.discard()
            raise StoreError(
                f"{self._parts[0]} and its other members: what the drives give back is not what was written to them; "
                "the files were removed. Check the drives and memory (smartctl, dmesg) before trying again"
            )
        renames = list(zip(self._parts, self._paths, strict=True))
        for part, path in reversed(renames):  # member 0, by which the shard is found, comes last
            with write_errors(part, self._missing):
                os.replace(part, path)
                sync_folder(os.path.dirname(path))
        return written

    def _pages(self) -> list[bytes]:
        geometry = replace(self._geometry, size=self.offset)
        folders = tuple(os.path.dirname(path) for path in self._paths)
        return [
            format_page(Header(self._set_id, member, geometry, folders)) for member in range(geometry.count)
        ]

    def _write_at(self, member: int, data: memoryview, at: int) -> None:
        with write_errors(self._parts[member], self._missing):
            while len(data):
                count = os.pwrite(self._fds[member], data[:BLOCK], at)
                at += count
                data = data[count:]
                self._pending += count
        if self._pending >= DROP_EVERY:
            self._flush()

    def _flush(self) -> None:
        """Make what was written durable on every drive, and drop it from the page cache."""
        list(self._pool.map(self._flush_member, range(len(self._fds))))
        self._pending = 0

    def _flush_member(self, member: int) -> None:
        with write_errors(self._parts[member], self._missing):
            os.fsync(self._fds[member])
            os.posix_fadvise(self._fds[member], 0, 0, os.POSIX_FADV_DONTNEED)

    def _missing(self) -> int:
        return max(self._geometry.size - self.offset, 0)

    def _close(self) -> None:
        self._pool.shutdown()  # no thread uses a descriptor that is closed, and perhaps another file's by then
        while self._fds:
            os.close(self._fds.pop())


Part = PartFile | StripedPartFile


def open_part(paths: Sequence[str], expected: int, *, keep: bool = False) -> Part:
    """The shard, or other file, `paths` (one, or the members) to be written, `expected` bytes of it.

    `keep` is as for PartFile; a striped shard is begun again whatever it says.
    """
    return PartFile(paths[0], expected, keep=keep) if len(paths) == 1 else StripedPartFile(paths, expected)


def check_fits(folders: Sequence[str]) -> None:
    """Raises OptionError where a header page cannot hold the paths `folders`."""
    format_page(Header("0" * 32, 0, Geometry(len(folders), STRIPE, MAX_BYTES), tuple(folders)))


def shares(size: int, count: int) -> list[int]:
    """Bytes on each of `count` drives that a shard of `size` bytes takes; all on one where it is not striped."""
    geometry = Geometry(count, STRIPE, size)
    return [size] if count == 1 else [geometry.member_bytes(member) for member in range(count)]


def hash_striped(paths: Sequence[str], geometry: Geometry, pages: Sequence[bytes] = ()) -> tuple[int, str]:
    """Size and sha256 (hex) of the shard whose members are `paths`, leaving none of it in the page cache.

    The size is what can be read: less than `geometry` says where a member is short, and 0 where a member does not
    begin with its page in `pages`. Raises OSError when a member cannot be opened, DriveError when one cannot be read.
    """
    hasher, size = hashlib.sha256(), 0
    with ExitStack() as closing:
        fds = []
        for path in paths:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            closing.callback(os.close, fds[-1])
        droppers = [CacheDropper(fd) for fd in fds]
        first = memoryview(bytearray(PAGE))
        for fd, path, page in zip(fds, paths, pages, strict=False):
            if read_at(fd, path, first, 0) != PAGE or first != page:
                return 0, hasher.hexdigest()
        view = memoryview(bytearray(geometry.stripe))
        for member, at, taken in geometry.pieces(0, geometry.size):
            count = read_at(fds[member], paths[member], view[:taken], at)
            hasher.update(view[:count])
            droppers[member].passed(count)
            size += count
            if count < taken:
                break
        for dropper in droppers:
            dropper.drop()
    return size, hasher.hexdigest()
