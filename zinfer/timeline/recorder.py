"""Writes down what happens, cheaply and in bounded memory: names and numbers, never weights or tensors."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Protocol

from zinfer.timeline.events import COMPUTE, COPIES, READS, SWEEPS, WAITS, Span, Timeline

LIMIT = 1 << 16  # events kept, the newest; at most about 20 MB


class Timing(Protocol):
    """When a request or a copy ran, and what was moved for it: see `zinfer.aio`. Holds none of its memory."""

    @property
    def started(self) -> float | None:
        """When its first operation was submitted (time.perf_counter), or None."""

    @property
    def finished(self) -> float | None:
        """When it had ended, or None."""

    @property
    def transferred(self) -> int | None:
        """Bytes moved, or None until it has ended."""


class CopyTiming(Timing, Protocol):
    """When a copy runs, if anybody looks."""

    @property
    def timed(self) -> bool:
        """Whether `started` and `finished` will be known once it has run."""


class _Mine(threading.local):
    """Where one thread is."""

    number: int = -1  # not seen yet
    name: str = ""  # the weight that its operator computes with
    since: float = 0.0  # when it got that weight; 0: it computes nothing that is known
    sweep: float = 0.0  # when the sweep that it is in began; 0: none


class Recorder:
    """The events of one model, the newest `limit` of them. Any thread may call any method.

    A read or a copy is noted when it is started and told of once it has ended; a read that is dropped before counts
    with what the drive had moved. Times are time.perf_counter's.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._origin = time.perf_counter()
        self._limit = limit
        self._events: deque[tuple[str, str, float, float, int, int, str]] = deque()  # the fields of Span
        self._window: deque[tuple[float, int]] = deque(maxlen=limit)
        self._running: deque[tuple[str, str, str, Timing]] = deque()  # row, name, kind, when
        self._dropped = 0
        self._threads = 0
        self._sweeps = 0
        self._lock = threading.Lock()
        self._mine = _Mine()

    def read(self, name: str, kind: str, timing: Timing) -> None:
        """A read of a weight's bytes was started; `kind` is one of events.KINDS."""
        self._began(READS, name, kind, timing)

    def copying(self, name: str, timing: CopyTiming) -> None:
        """A copy of a weight from host memory to a device was started. One whose times nobody keeps is left out."""
        if timing.timed:
            self._began(COPIES, name, "", timing)

    def asked(self) -> None:
        """The calling thread asks for a weight, or ends its sweep: what it computed before is over."""
        mine = self._mine
        if mine.since:
            now, since, mine.since = time.perf_counter(), mine.since, 0.0
            with self._lock:
                self._keep(COMPUTE, mine.name, since, now, self._number(), 0, "")

    def got(self, name: str, window: int) -> None:
        """It has the weight now, and computes; `window` bytes of the window are in use."""
        mine = self._mine
        mine.name, mine.since = name, time.perf_counter()
        with self._lock:
            self._window.append((mine.since, window))

    def waited(self, name: str, start: float, end: float) -> None:
        """The calling thread was blocked until it had the weight, or room for it."""
        with self._lock:
            self._keep(WAITS, name, start, end, self._number(), 0, "")

    def begin_sweep(self) -> None:
        """A forward pass begins on the calling thread."""
        mine = self._mine
        if mine.sweep:
            mine.since = 0.0  # an error left the one before, and nobody knows when
        self.asked()
        mine.sweep = time.perf_counter()

    def end_sweep(self) -> None:
        """It ends."""
        self.asked()
        mine = self._mine
        if mine.sweep:
            begun, mine.sweep = mine.sweep, 0.0
            with self._lock:
                self._keep(SWEEPS, str(self._sweeps), begun, time.perf_counter(), self._number(), 0, "")
                self._sweeps += 1

    def timeline(self, model: str) -> Timeline:
        """What happened so far, reads that have not ended left out."""
        with self._lock:
            for _ in range(len(self._running)):
                moved = self._running.popleft()
                if moved[3].finished is None:
                    self._running.append(moved)
                else:
                    self._ended(*moved)
            events, window, dropped = list(self._events), list(self._window), self._dropped
        origin = self._origin
        spans = [
            Span(row, name, start - origin, end - origin, thread, nbytes, kind)
            for row, name, start, end, thread, nbytes, kind in events
        ]
        spans.sort(key=lambda span: (span.start, span.end))
        return Timeline(model, tuple(spans), tuple((at - origin, used) for at, used in window), dropped)

    def _began(self, row: str, name: str, kind: str, timing: Timing) -> None:
        with self._lock:
            while self._running and self._running[0][3].finished is not None:
                self._ended(*self._running.popleft())
            self._running.append((row, name, kind, timing))

    # ---- under the lock ---------------------------------------------------------------------------------

    def _number(self) -> int:
        mine = self._mine
        if mine.number < 0:
            mine.number = self._threads
            self._threads += 1
        return mine.number

    def _ended(self, row: str, name: str, kind: str, timing: Timing) -> None:
        started, finished = timing.started, timing.finished
        if started is not None and finished is not None:  # else it was dropped before it could start
            self._keep(row, name, started, finished, 0, timing.transferred or 0, kind)

    def _keep(
        self, row: str, name: str, start: float, end: float, thread: int, nbytes: int, kind: str
    ) -> None:
        if len(self._events) >= self._limit:
            self._events.popleft()
            self._dropped += 1
        self._events.append((row, name, start, end, thread, nbytes, kind))
