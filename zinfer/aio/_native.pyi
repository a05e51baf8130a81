from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Literal, TypedDict

class Stats(TypedDict):
    """Totals since the engine was made."""

    requests: int
    pieces: int
    bytes_requested: int
    bytes_transferred: int
    """What the drive delivered and took, aligned supersets and repetitions included."""
    bounced_bytes: int
    """Bytes copied out of and into bounce memory."""
    retries: int
    """Operations submitted again: EINTR, EAGAIN, short reads and writes."""
    errors: int
    """Failed requests; cancelled ones are not counted."""
    busy_seconds: float
    """Time with at least one piece in flight."""

class File:
    """A regular file open for reading ("r") or writing ("w"). Any thread may use it.

    Its descriptor is closed when the file is closed or gone and the last request on it has ended.
    Raises `DriveError` (backend "open") when it is missing, not a regular file, or `direct="on"` is refused.

    "w" creates the file, or empties it; it cannot be read. `size` reserves that many bytes: `DriveError` (backend
    "fallocate", errno ENOSPC) tells what is needed and what is free, and removes the file if it is new. A file
    that was given its size is also the one that libaio writes without blocking. It grows when written beyond.
    It is written by one `File` (flock) and by one engine at a time.

    A path need not be UTF-8; `OptionError` for one with a NUL character.
    """

    def __init__(
        self,
        path: str | bytes | PathLike[str] | PathLike[bytes],
        mode: Literal["r", "w"] = "r",
        *,
        size: int | None = None,
        direct: Literal["auto", "on", "off"] = "auto",
    ) -> None: ...
    @property
    def path(self) -> str:
        """As it was given, as a str: `os.fsdecode` of it."""

    @property
    def size(self) -> int:
        """Bytes: at open; when written, `size` or the end of what has been written, whichever is more."""

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache (O_DIRECT)."""

    @property
    def direct_reason(self) -> str:
        """Why `direct` is False; "" when it is True."""

    @property
    def alignment(self) -> int:
        """Bytes; 1 when buffered."""

    @property
    def identity(self) -> tuple[int, int, int, int, int]:
        """`(st_dev, st_ino, size, mtime_ns, ctime_ns)` at open."""

    def changed(self) -> bool:
        """Whether its contents may be others than at open. Raises `ClosedError` after `close()`.

        True when size or mtime differ, or ctime does and no link that came or went accounts for it: a file
        that was deleted, or replaced by a rename, still reads as it was.
        """

    def sync(self) -> None:
        """Make what has been written durable (fdatasync); requests in flight are not waited for.

        Raises `DriveError`, `OptionError` for a file open for reading, `ClosedError` after `close()`.
        """

    def close(self) -> None:
        """Refuse later requests (`ClosedError`); those in flight finish. Idempotent.

        A file open for writing waits for its writes, gets its true size and is made durable (fsync): raises
        `DriveError` if that fails, and is closed all the same. One that is dropped instead gets its size, but
        nobody hears of a failure.
        """

class Timing:
    """When a request ran, in seconds on the clock of `time.perf_counter`. Any thread may read it.

    It holds neither the keepalive nor the engine: kept, it keeps no memory of theirs.
    """

    @property
    def started(self) -> float | None:
        """When its first operation was submitted; None before, and for a request that ended without any."""

    @property
    def finished(self) -> float | None:
        """When its last byte had been delivered, or it had failed and drained; None before."""

    @property
    def transferred(self) -> int | None:
        """Bytes that the drive moved for it, aligned supersets and repetitions included; None until finished."""

class Request:
    """One read or write in progress, made by `Engine.read` or `Engine.write`.

    Holds its `keepalive` and its engine. Destroying an unfinished request cancels it and blocks until nothing
    of it is in flight, so memory is never touched after the keepalive has gone.
    """

    @property
    def done(self) -> bool: ...
    @property
    def nbytes(self) -> int:
        """Bytes asked for."""

    @property
    def seconds(self) -> float:
        """From submission to completion; so far, while not done."""

    @property
    def timing(self) -> Timing:
        """When it really ran; may be kept when the request is dropped."""

    def wait(self, timeout: float | None = None) -> bool:
        """Return True once the bytes have moved, False after `timeout` seconds.

        Raises `DriveError` if the request failed or was cancelled (errno ECANCELED), every time it is called.
        """

    def cancel(self) -> None:
        """Drop the pieces not started; those in flight drain. Harmless when done."""

class Engine:
    """Carries out reads and writes on its own thread. Any thread may use it, but not a forked child (`ClosedError`).

    `backend`: "auto" (the first of io_uring, libaio and threads that serves a trial read), "io_uring", "libaio",
    "threads", or "faults", the scripted backend of the tests. libaio blocks silently on buffered files: asked for
    by name it refuses them, taken by "auto" it leaves them to `workers` threads. `bounce_slot_bytes`: size of
    each of `depth` slots, mapped when first needed, for bytes that cannot land in place; a power of two.
    `faults`: one tuple for each operation in order: `("ok",)`, `("short", bytes)`, `("zero",)`,
    `("error", errno)`, `("delay", seconds)`,
    `("hold", later operations to complete first)`.
    Raises `OptionError`.
    """

    def __init__(
        self,
        backend: Literal["auto", "io_uring", "libaio", "threads", "faults"] = "auto",
        *,
        depth: int = 16,
        block_bytes: int = 4194304,
        workers: int = 4,
        bounce_slot_bytes: int = 1048576,
        faults: Sequence[tuple[str] | tuple[str, float]] | None = None,
    ) -> None: ...
    @property
    def backend(self) -> str:
        """The backend in use."""

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """`(backend not taken, reason)`."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one operation, at most."""

    @property
    def depth(self) -> int:
        """Operations in flight, at most."""

    @property
    def eventfd(self) -> int:
        """A descriptor that counts completed requests (eventfd, non-blocking); -1 once closed."""

    @property
    def bounce_bytes(self) -> int:
        """Bytes of bounce memory it may allocate, at most."""

    @property
    def stats(self) -> Stats: ...
    @property
    def latencies(self) -> list[tuple[float, int]]:
        """`(seconds, operations)`: how many took that long, shortest first; each bound is at most 1/16 too high.

        From submission to completion of one operation (at most `block_bytes`); failed ones are not counted.
        """
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

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if an idle engine has pieces in flight or bounce slots missing."""

    def close(self) -> None:
        """Refuse new reads (`ClosedError`), finish the accepted ones, end the thread. Idempotent."""

def _split(
    extents: Sequence[tuple[int, int, int, int, bool]],
    alignment: int,
    block_bytes: int,
    slot_bytes: int,
    *,
    writing: bool = False,
) -> list[tuple[int, int, int, int, int, int, bool]]: ...
