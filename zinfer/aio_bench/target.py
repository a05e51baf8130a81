"""The files that are measured: nameless ones made for it, or one that the user names, which is only read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zinfer.aio import Engine, File
from zinfer.aio.block_device import BlockDevice, block_device_of
from zinfer.aio_bench.memory import hold, pool_of
from zinfer.errors import OptionError, StoreError

FILL_BYTES = 8 << 20  # of random content, over and over, each time under another number
ROOM_LEFT = 64 << 20  # bytes of the drive that stay free


@dataclass(frozen=True)
class Target:
    """One file on one drive. `writer` where it was made for this: opened once, since opening empties a file."""

    folder: str  # as the user gave it, or the file
    path: str  # to open for reading; of a nameless file, through /proc
    size: int  # bytes
    device: BlockDevice
    writer: File | None

    def reader(self) -> File:
        """The file, opened for reading; the caller closes it."""
        return File(self.path)


def by_drive(targets: Sequence[Target]) -> list[list[Target]]:
    """`targets` in groups that lie on one device each: what shares a drive shares its queue."""
    groups: dict[BlockDevice, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.device, []).append(target)
    return list(groups.values())


@contextmanager
def given_targets(paths: Sequence[str]) -> Iterator[list[Target]]:
    """Files of the user's, to be read only. Raises DriveError for what cannot be read."""
    targets = []
    for path in paths:
        file = File(path)
        file.close()
        targets.append(Target(path, path, file.size, block_device_of(path), None))
    yield targets


@contextmanager
def made_targets(folders: Sequence[str], size: int) -> Iterator[list[Target]]:
    """A file of `size` bytes of random content in each of `folders`, without a name: gone when this ends,
    whatever ends it.

    Raises OptionError for what is no folder, StoreError where no file can be made, DriveError when it is full.
    """
    with contextlib.ExitStack() as made:
        yield [made.enter_context(_made(folder, size)) for folder in folders]


@contextmanager
def _made(folder: str, size: int) -> Iterator[Target]:
    if not os.path.isdir(folder):
        raise OptionError(
            f"{folder} is a file: name it with --file to have it read, and never written"
            if os.path.isfile(folder)
            else f"{folder}: no such folder; give one on the drive to measure"
        )
    try:
        descriptor = _nameless(folder)
    except OSError as error:
        raise StoreError(f"{folder}: no file can be made there: {error.strerror}") from error
    try:
        free = free_bytes(folder)
        if size + ROOM_LEFT > free:
            raise StoreError(
                f"{folder}: {free} bytes are free, too few for a file of {size} bytes and the {ROOM_LEFT} that stay "
                "free; free some, choose a smaller --size or another drive"
            )
        # By its number in this process, not "self": another program may be asked to read it too.
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        writer = File(path, "w", size=size)
        try:
            _fill(writer, size)
            yield Target(folder, path, size, block_device_of(folder), writer)
        finally:
            writer.close()
    finally:
        os.close(descriptor)


def free_bytes(folder: str) -> int:
    """What an unprivileged process may still write there."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _nameless(folder: str) -> int:
    """A descriptor of a new file without a name."""
    with contextlib.suppress(OSError):  # not every filesystem has such files
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = tempfile.mkstemp(prefix=".aio_bench-", dir=folder)
    os.unlink(name)
    return descriptor


def _fill(file: File, size: int) -> None:
    """Random bytes, each stretch under a number of its own: some drives do not store zeros, or the same twice."""
    with pool_of(FILL_BYTES) as pool, contextlib.closing(Engine()) as engine:
        region = hold(pool, FILL_BYTES)
        view = memoryview(region)
        view[:] = os.urandom(FILL_BYTES)
        for start in range(0, size, FILL_BYTES):
            view[:8] = start.to_bytes(8, "little")
            length = min(FILL_BYTES, size - start)
            engine.write([(file, start, length, region.address, False)], region).wait()
        file.sync()
