"""What the reactor keeps of a request, of a piece that has been started, and what it tells others; plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from zinfer.aio.portable.descriptor import Descriptor
from zinfer.aio.portable.failures import Failure
from zinfer.aio.portable.request import Progress
from zinfer.aio.portable.split import Piece

FIGURES = ("requests", "pieces", "bytes_requested", "bytes_transferred", "bounced_bytes", "retries", "errors")


@dataclass(eq=False)
class Work:
    """A request and what remains of it. After submission it is the reactor's alone."""

    progress: Progress
    files: list[Descriptor]  # Piece.file indexes this
    pieces: list[Piece]
    writing: bool
    urgent: bool
    keepalive: object  # held until drained, whatever becomes of the Request
    next: int = 0  # first piece not started yet
    in_flight: int = 0  # pieces started and not ended
    failure: Failure | None = None

    @property
    def failing(self) -> bool:
        """Whether pieces not started are dropped."""
        return self.failure is not None or self.progress.cancelled

    def release_claims(self) -> None:
        """Let others write to its files; `files` is still whole."""
        for file in self.files:
            if self.writing and file.writing is not None:
                file.writing.release(self.progress)


@dataclass(eq=False)
class Operation:
    """A piece that has been started.

        free -> [parked ->] in flight -> (retry -> in flight)* -> free

    A write is parked while an earlier one overlaps its blocks: so overlapping writes land in the order in which
    they were started, and an edge is read, changed and written with nobody in between.
    """

    work: Work
    piece: Piece
    slot: int  # address of bounce memory, or 0
    issued: int = 0  # nanoseconds of time.monotonic_ns()
    fetching: bool = False  # an edge whose block is being read, to be changed and written
    resume_at: int = 0  # bytes of the span that need not be moved again (aligned)
    delivered: int = 0  # bytes of the span that have been moved
    tries: int = 0  # EINTR and EAGAIN so far
    stalls: int = 0  # resumed transfers that brought nothing new

    @property
    def file(self) -> Descriptor:
        """The file it reads or writes."""
        return self.work.files[self.piece.file]


@dataclass(frozen=True)
class Snapshot:
    """What others may know, published before any waiter is told."""

    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0))
    busy_seconds: float = 0.0
    busy_since: float | None = None
    in_flight: int = 0
    open: int = 0
    slots: int = 0
