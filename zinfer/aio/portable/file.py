"""What a user holds of an open file."""

from __future__ import annotations

import operator
import os
from typing import SupportsIndex

from zinfer.aio.portable.descriptor import Descriptor, Direct, Identity, Mode
from zinfer.errors import ClosedError, OptionError


class File:
    """A regular file open for reading ("r") or writing ("w"); see zinfer.aio. Any thread may use it.

    Its descriptor is closed when the file is closed or gone and the last request on it has ended.
    Raises `DriveError` (backends "open" and "fallocate") and `OptionError`.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        mode: Mode = "r",
        *,
        size: int | None = None,
        direct: Direct = "auto",
    ) -> None:
        if direct not in ("auto", "on", "off"):
            raise OptionError(f'direct must be "auto", "on" or "off", not "{direct}"')
        if mode not in ("r", "w"):
            raise OptionError(f'mode must be "r" or "w", not "{mode}"')
        if size is not None and mode == "r":
            raise OptionError('size has an effect only with mode="w"')
        nbytes = 0 if size is None else index_of("size", size)
        if nbytes < 0:
            raise OptionError(f"size must not be negative, but is {nbytes}")
        decoded = os.fsdecode(path)
        if "\0" in decoded:
            raise OptionError(f"path must not contain a NUL character, but is {path!r}")
        descriptor = Descriptor(decoded, mode, nbytes, direct)
        self._mode = mode
        self._path = decoded
        self._size = descriptor.size
        self._direct = descriptor.direct
        self._direct_reason = descriptor.direct_reason
        self._alignment = descriptor.alignment
        self._identity = descriptor.identity
        self._writing = descriptor.writing
        self._open = [descriptor]  # empty once closed; list.pop is one step for every thread

    @property
    def path(self) -> str:
        """As it was given, as a str: `os.fsdecode` of it."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes: at open; when written, `size` or the end of what has been written, whichever is more."""
        return self._writing.size if self._writing else self._size

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache (O_DIRECT)."""
        return self._direct

    @property
    def direct_reason(self) -> str:
        """Why `direct` is False; "" when it is True."""
        return self._direct_reason

    @property
    def alignment(self) -> int:
        """Bytes; 1 when buffered."""
        return self._alignment

    @property
    def identity(self) -> Identity:
        """`(st_dev, st_ino, size, mtime_ns, ctime_ns)` at open."""
        return self._identity

    def changed(self) -> bool:
        """Whether its contents may be others than at open. Raises `ClosedError` after `close()`.

        True when size or mtime differ, or ctime does and no link that came or went accounts for it: a file
        that was deleted, or replaced by a rename, still reads as it was.
        """
        return self.share().changed()

    def sync(self) -> None:
        """Make what has been written durable (fdatasync); requests in flight are not waited for.

        Raises `DriveError`, `OptionError` for a file open for reading, `ClosedError` after `close()`.
        """
        if self._writing is None:
            raise OptionError(f"{self._path} is open for reading: there is nothing to sync")
        self.share().sync()

    def close(self) -> None:
        """Refuse later requests (`ClosedError`); those in flight finish. Idempotent.

        A file open for writing waits for its writes, gets its true size and is made durable (fsync): raises
        `DriveError` if that fails, and is closed all the same.
        """
        try:
            descriptor = self._open.pop()
        except IndexError:
            return
        descriptor.finish()

    def share(self) -> Descriptor:
        """The descriptor, for a request on it. Raises ClosedError after close()."""
        try:
            return self._open[0]
        except IndexError:
            raise ClosedError(f"{self._path}: the file was closed; open it again to use it") from None


def index_of(name: str, value: SupportsIndex) -> int:
    """`value` as an integer. Raises OptionError for one that does not fit in 64 bits, TypeError for what is none."""
    number = operator.index(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise OptionError(f"{name} must fit in 64 bits, which {number} does not")
    return number
