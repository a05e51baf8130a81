"""The front desk: validates, splits and queues reads and writes; a reactor thread carries them out."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import NamedTuple

from zinfer.aio.portable.choose import Wanted, make_backend
from zinfer.aio.portable.descriptor import DIRECT_ALIGNMENT, MAX_ALIGNMENT, Descriptor
from zinfer.aio.portable.file import File, index_of
from zinfer.aio.portable.memory import is_mapped
from zinfer.aio.portable.reactor import Reactor
from zinfer.aio.portable.request import Progress, Request, refuse_if_forked
from zinfer.aio.portable.split import Extent, Geometry, Piece, merge, split, split_write
from zinfer.aio.portable.threads import Bell, new_eventfd, on_engine_thread, start_thread
from zinfer.aio.portable.work import Work
from zinfer.errors import DriveError, OptionError

MAX_DEPTH = 1024
MAX_WORKERS = 256
BLOCK_BYTES = (DIRECT_ALIGNMENT, 1 << 30)
SLOT_BYTES = (8 << 10, 4 << 20)
LARGEST = 2**63 - 1  # of offsets, lengths and addresses: off_t
LOOKED_AT = 1 << 36  # bytes of an extent; its end is looked at from there on


class MemoryExtent(NamedTuple):
    """What one transfer wants: file[offset, offset + length) to or from `address`; slack as in split.py."""

    file: File
    offset: int
    length: int
    address: int
    slack: bool


class Engine:
    """Carries out reads and writes on its own thread; see zinfer.aio. Any thread may use it, but not a forked child.

    Lifetime: the thread knows the reactor and not the engine. So an engine that is dropped, or alive when the
    interpreter exits, is ended by its finalizer: everything is cancelled and drained, the thread joined.
    Raises `OptionError`.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        depth: int = 16,
        block_bytes: int = 4 << 20,
        workers: int = 4,
        bounce_slot_bytes: int = 1 << 20,
        faults: object | None = None,
    ) -> None:
        self._owner = os.getpid()
        self._depth = _in_range("depth", depth, 1, MAX_DEPTH)
        self._block_bytes = _in_range("block_bytes", block_bytes, *BLOCK_BYTES)
        if self._block_bytes % DIRECT_ALIGNMENT:
            raise OptionError(f"block_bytes must be a multiple of {DIRECT_ALIGNMENT}, not {block_bytes}")
        self._slot_bytes = _in_range("bounce_slot_bytes", bounce_slot_bytes, *SLOT_BYTES)
        if self._slot_bytes & (self._slot_bytes - 1):
            raise OptionError(f"bounce_slot_bytes must be a power of two, not {bounce_slot_bytes}")
        if faults is not None and backend != "faults":
            raise OptionError(f'faults has an effect only with backend="faults", not "{backend}"')
        wanted = Wanted(backend, self._depth, _in_range("workers", workers, 1, MAX_WORKERS), faults)
        self._fallbacks: list[tuple[str, str]] = []
        self._reactor, self._direct_only = self._make_reactor(wanted)
        try:
            thread = start_thread("zinfer-aio", self._reactor.run)
        except OptionError:
            self._reactor.end_unstarted()
            raise
        self._thread = thread
        self._finalizer = weakref.finalize(self, _end, self._reactor, thread, self._owner)

    def _make_reactor(self, wanted: Wanted) -> tuple[Reactor, bool]:
        bell = Bell()
        try:
            backend = make_backend(wanted, bell, self._fallbacks)
            try:
                event_fd = new_eventfd()
            except OptionError:
                backend.close()
                raise
        except BaseException:
            bell.close()
            raise
        reactor = Reactor(backend, bell, self._depth, self._slot_bytes, event_fd)
        return reactor, backend.direct_only

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._usable().backend_name

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """`(backend not taken, reason)`."""
        self._usable()
        return list(self._fallbacks)

    @property
    def block_bytes(self) -> int:
        """Bytes of one operation, at most."""
        self._usable()
        return self._block_bytes

    @property
    def depth(self) -> int:
        """Operations in flight, at most."""
        self._usable()
        return self._depth

    @property
    def eventfd(self) -> int:
        """A descriptor that counts completed requests (eventfd, non-blocking); -1 once closed."""
        return self._usable().event_fd

    @property
    def bounce_bytes(self) -> int:
        """Bytes of bounce memory it may allocate, at most."""
        self._usable()
        return self._depth * self._slot_bytes

    @property
    def stats(self) -> dict[str, float]:
        """Totals since the engine was made: the compiled engine's `Stats`."""
        reactor = self._usable()
        return {**reactor.snapshot.figures, "busy_seconds": reactor.busy_seconds()}

    @property
    def latencies(self) -> list[tuple[float, int]]:
        """`(seconds, operations)`: how many took that long, shortest first; each bound is at most 1/16 too high."""
        return self._usable().latencies.buckets()

    def read(
        self,
        extents: Iterable[tuple[File, int, int, int, bool]],
        keepalive: object = None,
        *,
        urgent: bool = False,
    ) -> Request:
        """Start reading every `(file, offset, length, address, slack)`; urgent requests go before others.

        Nothing is read if one extent is bad: `ValueError` for negative numbers or a null address,
        `DriveError` (errno 0) for bytes beyond the file's end, `ClosedError` for a closed file or engine,
        `OptionError` for a buffered file with backend "libaio".
        """
        return self._submit(extents, keepalive, urgent=urgent, writing=False)

    def write(
        self,
        extents: Iterable[tuple[File, int, int, int, bool]],
        keepalive: object = None,
        *,
        urgent: bool = False,
    ) -> Request:
        """Start writing every `(file, offset, length, address, slack)`; the memory must not change meanwhile.

        `slack` must be False (`OptionError`). Nothing is written if one extent is bad, as in `read`; also
        `OptionError` for a file open for reading, or one that another engine is writing. Overlapping writes of
        one engine land in the order of submission (urgent ones may overtake). A request that failed or was
        cancelled may have been written in part.
        """
        return self._submit(extents, keepalive, urgent=urgent, writing=True)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if an idle engine has pieces in flight or bounce slots missing."""
        wrong = self._usable().check_integrity()
        if wrong:
            raise RuntimeError(f"engine integrity: {wrong}")

    def close(self) -> None:
        """Refuse new reads (`ClosedError`), finish the accepted ones, end the thread. Idempotent."""
        self._usable().stop()
        self._thread.join()

    def _usable(self) -> Reactor:
        refuse_if_forked(self._owner)
        return self._reactor

    # ---- submission -------------------------------------------------------------------------------------

    def _submit(
        self,
        extents: Iterable[tuple[File, int, int, int, bool]],
        keepalive: object,
        *,
        urgent: bool,
        writing: bool,
    ) -> Request:
        reactor = self._usable()
        wanted = [_parsed(row) for row in extents]
        work = Work(Progress(0), [], [], writing, urgent, keepalive)
        try:
            work.pieces = self._pieces(wanted, work)
            work.progress.nbytes = sum(extent.length for extent in wanted)
            request = Request(self, reactor, work, keepalive)  # before the first byte can move: it drains
            reactor.submit(work)
        except BaseException:
            if not reactor.knows(work):
                work.release_claims()
            raise
        return request

    def _pieces(self, wanted: list[MemoryExtent], work: Work) -> list[Piece]:
        """Validates everything; fills `work.files`, which a write claims."""
        rows: list[Extent] = []
        previous: File | None = None
        for extent in wanted:
            descriptor = extent.file.share()
            self._validate(extent, descriptor, work.writing)
            if extent.file is not previous:
                work.files.append(descriptor)
                if descriptor.writing is not None:
                    descriptor.writing.claim(descriptor.path, work.progress, id(self._reactor))
            previous = extent.file
            rows.append(Extent(len(work.files) - 1, *extent[1:]))
        pieces: list[Piece] = []
        for row in merge(rows):
            file = work.files[row.file]
            if file.alignment > self._slot_bytes:
                raise OptionError(
                    f"{file.path} takes blocks of {file.alignment} bytes; make the engine with bounce_slot_bytes of "
                    "at least that"
                )
            geometry = Geometry(file.alignment, self._block_bytes, self._slot_bytes)
            pieces += (split_write if work.writing else split)(row, geometry)
        return pieces

    def _validate(self, extent: MemoryExtent, file: Descriptor, writing: bool) -> None:
        writable = file.mode == "w"
        if writing and not writable:
            raise OptionError(f'{file.path} is open for reading; open it with mode="w" to write')
        if not writing and writable:
            raise OptionError(f'{file.path} is open for writing; open it again with mode="r" to read')
        if writing and extent.slack:
            raise OptionError(
                f"{file.path}: slack has no meaning for a write: the bytes around it belong to the file"
            )
        if self._direct_only and not file.direct:
            raise OptionError(
                f"{file.path} is not open for O_DIRECT ({file.direct_reason}), and {self._reactor.backend_name} would "
                'silently block on it; use backend="auto" or "threads"'
            )
        if extent.offset < 0 or extent.length < 0:
            raise _bad_extent(extent, "offset and length must not be negative")
        end = LARGEST - MAX_ALIGNMENT if writing else file.size
        if extent.offset + extent.length > end:
            if writing:
                raise _bad_extent(extent, "no file can be that long")
            raise DriveError(
                f"{file.path}: {extent.length} bytes at offset {extent.offset} were asked for, but the file's size "
                f"is {end} bytes; check that it was downloaded completely",
                file.path, extent.offset, extent.length, 0, self._reactor.backend_name,
            )  # fmt: skip
        if extent.length and extent.address <= 0:
            raise _bad_extent(extent, "the address must be positive")
        if extent.length and extent.length > LARGEST - extent.address:
            raise _bad_extent(extent, "the memory wraps around the address space")
        # Before it is cut into more pieces than memory holds.
        if extent.length > LOOKED_AT and not is_mapped(extent.address + extent.length - 1):
            raise _bad_extent(extent, "there is no memory at the end of the range")


def _end(reactor: Reactor, thread: threading.Thread, owner: int) -> None:
    """End an engine that has gone, or that the interpreter leaves behind; in the process that made it only."""
    if os.getpid() != owner:
        return
    reactor.cancel_all()
    reactor.stop()
    if not on_engine_thread():  # the cycle collector may run there: that thread ends by itself
        thread.join()


def _in_range(name: str, value: int, least: int, most: int) -> int:
    number = index_of(name, value)
    if least <= number <= most:
        return number
    raise OptionError(f"{name} must be between {least} and {most}, not {number}")


def _parsed(row: tuple[File, int, int, int, bool]) -> MemoryExtent:
    if len(row) != 5:
        raise ValueError("an extent is (file, offset, length, address, slack)")
    file, *numbers, slack = row
    if not isinstance(file, File):
        raise TypeError(f"an extent's first item is a File of this engine's kind, not {type(file).__name__}")
    offset, length, address = (
        index_of(name, number) for name, number in zip(("offset", "length", "address"), numbers, strict=True)
    )
    return MemoryExtent(file, offset, length, address, bool(slack))


def _bad_extent(extent: MemoryExtent, what: str) -> ValueError:
    return ValueError(
        f"{extent.file.path}: {what} (offset {extent.offset}, length {extent.length}, address {extent.address})"
    )
