"""The progress of generation: what is read of each sweep, how fast, and seconds a token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from zinfer.cli.terminal import Terminal

PERIOD = 0.2  # seconds between two drawings
BAR = 20  # characters


class Source(Protocol):
    """The part of `model.zinfer` that progress looks at; sizes in bytes."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the drive so far."""

    @property
    def sweep_bytes(self) -> int:
        """Bytes a sweep is expected to read once the residents are loaded."""

    @property
    def sweeps(self) -> int:
        """Sweeps begun so far."""


@dataclass(frozen=True)
class Span:
    """One sweep, or the part of it so far: bytes read and seconds."""

    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0


class SweepMeter:
    """Counts tokens and what was read for each. Its two methods may run on two threads.

    A token ends when the streamer gets it; the sweep for the next begins there. `first_bytes` is what the
    first sweep is expected to read: the residents too.
    """

    def __init__(
        self, source: Source, tokens: int, first_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._source = source
        self._tokens = tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._expected = first_bytes
        self._done = 0
        self._last: Span | None = None
        self._mark = (clock(), source.bytes_read)

    def token(self) -> str:
        """A token is there; what it cost, as a line."""
        with self._lock:
            now = (self._clock(), self._source.bytes_read)
            span = Span(now[1] - self._mark[1], now[0] - self._mark[0])
            self._mark, self._last, self._done = now, span, self._done + 1
            # A second sweep shows what later ones will read: encoders and idle experts are left out.
            self._expected = self._source.sweep_bytes if self._done == 1 else span.nbytes
            cost = f"{_gb(span.nbytes)} read at {_speed(span)}, {_a_token(span)}"
            return f"token {self._done} of {self._tokens}: {cost}"

    def line(self) -> str:
        """The status line for this moment."""
        with self._lock:
            if self._done >= self._tokens:
                return ""
            if not self._source.sweeps:
                return "starting"
            span = Span(self._source.bytes_read - self._mark[1], self._clock() - self._mark[0])
            last = f", {_a_token(self._last)}" if self._last else ""
            head = f"token {self._done + 1} of {self._tokens}"
            if not self._expected:
                return f"{head}, all weights in memory{last}"
            expected = max(self._expected, span.nbytes)  # reading ahead of the next sweep goes beyond it
            bar = "#" * (BAR * span.nbytes // expected)
            return f"{head} [{bar:<{BAR}}] {_gb(span.nbytes)} of {_gb(expected)}, {_speed(span)}{last}"


class Progress:
    """Shows a meter until it is stopped: a status line drawn by a thread, or a plain line a token.

    On a terminal the thread draws every PERIOD seconds; elsewhere nothing is shown unless `plain`.
    Use it in a `with` statement: leaving it ends the thread and removes the line.
    """

    def __init__(self, terminal: Terminal, meter: SweepMeter, *, shown: bool) -> None:
        self._terminal = terminal
        self._meter = meter
        self._live = shown and terminal.live
        self._plain = shown and not terminal.live
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zinfer-progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._live:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._terminal.status("")

    def token(self) -> None:
        """A token is there."""
        text = self._meter.token()
        if self._plain:
            self._terminal.note(text)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._terminal.status(self._meter.line())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _speed(span: Span) -> str:
    return f"{span.rate / 1e9:.2f} GB/s"


def _a_token(span: Span) -> str:
    return f"{span.seconds:.2f} s a token" if span.seconds >= 0.1 else f"{span.seconds * 1000:.1f} ms a token"
