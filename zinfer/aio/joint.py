"""Several requests, one to each drive, that are waited for as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from zinfer.errors import DriveError

LOOK_EVERY = 0.02  # seconds between looks whether another part has failed meanwhile


class Ran(Protocol):
    """When a request ran: see `zinfer.aio._native.Timing`."""

    @property
    def started(self) -> float | None:
        """When its first operation was submitted (seconds, time.perf_counter), or None."""

    @property
    def finished(self) -> float | None:
        """When it had ended, or None."""

    @property
    def transferred(self) -> int | None:
        """Bytes that the drive moved for it, or None until it has ended."""


class Waitable(Protocol):
    """What a joint request asks of its parts, and offers itself: see `zinfer.aio.Request`."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""

    @property
    def seconds(self) -> float:
        """From submission to completion; so far, while not done."""

    @property
    def timing(self) -> Ran:
        """When it really ran; may be kept when the request is dropped."""

    def wait(self, timeout: float | None = None) -> bool:
        """Return True once the bytes have moved, False after `timeout` seconds; raises DriveError."""

    def cancel(self) -> None:
        """Drop the pieces not started; those in flight drain."""


class JointTiming:
    """When the parts of a joint request ran: from the first operation of any to the end of all."""

    def __init__(self, parts: Sequence[Ran]) -> None:
        self._parts = tuple(parts)

    @property
    def started(self) -> float | None:
        """When the first operation of any part was submitted; None before."""
        return min((at for part in self._parts if (at := part.started) is not None), default=None)

    @property
    def finished(self) -> float | None:
        """When the last part had ended; None before, and where there are no parts."""
        ends = [part.finished for part in self._parts]
        known = [at for at in ends if at is not None]
        return max(known, default=None) if len(known) == len(ends) else None

    @property
    def transferred(self) -> int | None:
        """Bytes that all drives moved; None until the last part has ended."""
        moved = [part.transferred for part in self._parts]
        known = [count for count in moved if count is not None]
        return sum(known) if len(known) == len(moved) else None


class JointRequest:
    """The requests that one read became, of which each drive has a part. Any thread may use it.

    It fails as a whole: the first part that is seen to fail cancels the others, and the failure is raised once none
    of them is in flight any more. Dropping it drops the parts, and each of them cancels and drains. (No __del__ does
    it for all at once: a Ctrl-C that arrives in one is lost.)
    """

    def __init__(self, parts: Sequence[Waitable]) -> None:
        self._parts = tuple(parts)
        self._failed: Waitable | None = (
            None  # not its error: that would hold frames, and they the memory read into
        )
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return all(part.done for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
        return sum(part.nbytes for part in self._parts)

    @property
    def seconds(self) -> float:
        """From submission to completion of the last part; so far, while not done."""
        return max((part.seconds for part in self._parts), default=0.0)

    @property
    def timing(self) -> JointTiming:
        """When its parts really ran; may be kept when the request is dropped."""
        timings = []  # no comprehension over self, as in wait()
        for part in self._parts:
            timings.append(part.timing)
        return JointTiming(timings)

    def wait(self, timeout: float | None = None) -> bool:
        """Return True once all bytes have moved, False after `timeout` seconds.

        Raises the DriveError of the first part that failed, every time it is called.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pending = list(self._parts)
        while pending:
            waiting = []  # no comprehension: its frame, in the traceback of a Ctrl-C, would keep `self` for good
            for part in pending:
                if not self._settled(part):
                    waiting.append(part)
            pending = waiting
            if pending:
                left = LOOK_EVERY if deadline is None else min(LOOK_EVERY, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._settled(pending[0], left)
        if self._failed is not None:
            self._failed.wait()
        return True

    def cancel(self) -> None:
        """Drop the pieces not started; those in flight drain. Harmless when done."""
        for part in self._parts:
            part.cancel()

    def _settled(self, part: Waitable, timeout: float = 0.0) -> bool:
        """Whether nothing of `part` is in flight after `timeout` seconds; its failure cancels all."""
        try:
            return part.wait(timeout)
        except DriveError:
            with self._lock:
                self._failed = self._failed or part
            self.cancel()
            return True
