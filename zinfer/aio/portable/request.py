"""One read or write in progress: what the reactor ends, and what a user waits on.

The reactor must never need a lock that another thread may hold while the cycle collector runs there: the
collector may destroy an unfinished Request on any thread at any point, and destroying it waits for the reactor.
So there is no Condition here and no Event, which hold a lock in Python code, but one bare lock used as a gate.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from zinfer.aio.portable.failures import Failure
from zinfer.aio.portable.threads import on_engine_thread
from zinfer.errors import ClosedError

if TYPE_CHECKING:
    from zinfer.aio.portable.reactor import Reactor
    from zinfer.aio.portable.work import Work

# Seconds between looks at `done`: a waiter that is interrupted with the gate in hand delays the others, no more.
_SLICE = 0.1


class Progress:
    """How far a request is. The reactor ends it, once; any thread may look, wait and mark it cancelled."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.submitted = time.monotonic()
        self.started: float | None = None  # when its first operation was submitted
        self.finished = 0.0
        self.transferred = 0  # bytes moved by its operations
        self.failure: Failure | None = None  # valid once done
        self.cancelled = False
        self.done = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def finish(self, failure: Failure | None) -> None:
        """Tell the waiters. The reactor's, when no piece is in flight any more."""
        self.failure = failure
        self.finished = time.monotonic()
        self.done = True
        self._gate.release()

    def wait_until(self, deadline: float) -> bool:
        """Whether it was done before `deadline` (time.monotonic(), inf allowed)."""
        while not self.done:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._gate.acquire(timeout=min(left, _SLICE)):
                self._gate.release()
        return True


class Timing:
    """When a request ran, in seconds on the clock of `time.perf_counter`; see zinfer.aio.

    It holds neither the keepalive nor the engine: kept, it keeps no memory of theirs.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def started(self) -> float | None:
        """When its first operation was submitted; None before, and for a request that ended without any."""
        return self._progress.started

    @property
    def finished(self) -> float | None:
        """When its last byte had been delivered, or it had failed and drained; None before."""
        return self._progress.finished if self._progress.done else None

    @property
    def transferred(self) -> int | None:
        """Bytes that the drive moved for it, aligned supersets and repetitions included; None until finished."""
        return self._progress.transferred if self._progress.done else None


class Request:
    """One read or write in progress, made by `Engine.read` or `Engine.write`; see zinfer.aio.

    Holds its keepalive and its engine. Destroying an unfinished one cancels it and blocks until nothing of it is
    in flight. Where that happens on one of the engine's own threads, which the cycle collector may choose, it
    cannot block: there the engine holds the keepalive until the last piece has drained.
    """

    def __init__(self, engine: Any, reactor: Reactor, work: Work, keepalive: object) -> None:
        self._owner = os.getpid()
        self._engine = engine
        self._reactor = reactor
        self._work = work
        self._progress = work.progress
        self._keepalive = keepalive

    def __del__(self) -> None:
        if not hasattr(self, "_keepalive") or os.getpid() != self._owner or self._progress.done:
            return
        self._reactor.cancel(self._progress)
        if self._reactor.knows(self._work) and not on_engine_thread():
            self._progress.wait_until(math.inf)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._usable().done

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
        return self._usable().nbytes

    @property
    def seconds(self) -> float:
        """From submission to completion; so far, while not done."""
        progress = self._usable()
        return (progress.finished if progress.done else time.monotonic()) - progress.submitted

    @property
    def timing(self) -> Timing:
        """When it really ran; may be kept when the request is dropped."""
        return Timing(self._usable())

    def wait(self, timeout: float | None = None) -> bool:
        """Return True once the bytes have moved, False after `timeout` seconds.

        Raises `DriveError` if the request failed or was cancelled (errno ECANCELED), every time it is called.
        """
        progress = self._usable()
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout must be a number of seconds")
        if not progress.wait_until(math.inf if timeout is None else time.monotonic() + timeout):
            return False
        if progress.failure is not None:
            raise progress.failure.error()
        return True

    def cancel(self) -> None:
        """Drop the pieces not started; those in flight drain. Harmless when done."""
        progress = self._usable()
        if not progress.done:
            self._reactor.cancel(progress)

    def _usable(self) -> Progress:
        refuse_if_forked(self._owner)
        return self._progress


def refuse_if_forked(owner: int) -> None:
    """Raise ClosedError in any process but `owner`: the engine's threads do not exist there."""
    if os.getpid() != owner:
        raise ClosedError(
            "the engine belongs to the parent of this forked process; make a new one here, or start the process "
            'with the "spawn" method'
        )
