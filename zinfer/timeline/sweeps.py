"""The sweeps of one model: when each began and ended, on which thread, and what it cost."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

REMEMBERED = 4096  # sweeps
PAUSE = 1.0  # seconds: a gap between two sweeps that is longer than this and than the sweep before it is the caller's


@dataclass(frozen=True)
class Mark:
    """Totals at one moment: the engines' (all threads), then those of the thread that runs the sweep."""

    at: float  # seconds on time.perf_counter's clock
    busy: float  # seconds with reads in flight, averaged over the drives
    transferred: int  # bytes that the drives moved
    asked: int  # the thread's own, as in Tally, from here on
    waited: float
    hits: int
    misses: int


@dataclass(frozen=True)
class Sweep:
    """One sweep. Times in seconds, sizes in bytes.

    `seconds` last from its begin to the begin of the thread's next sweep, so that sampling and text output count as
    part of a token's time; where none follows, or only after a pause of the caller's, to the end of the forward
    pass. `nvme_bytes` are those of the reads that its thread started meanwhile, ahead or on demand; `host_bytes` and
    `device_bytes` the weights that were in memory for good at its end, where operators found them. `thread` counts
    the threads that ran sweeps.
    """

    number: int
    thread: int
    begun: float  # on time.perf_counter's clock
    seconds: float
    nvme_bytes: int
    host_bytes: int
    device_bytes: int
    wait_seconds: float
    hits: int
    misses: int


@dataclass(frozen=True)
class Steady:
    """The sweeps after the first, together. Medians are over the sweeps; None where there is none.

    `wall_seconds`: how long at least one of them ran. `bubble_seconds`: the part of it in which the drive had no
    read in flight (averaged over several drives), where the sweeps read anything at all. `rate`: bytes a second that
    the drives moved over `wall_seconds`. `wait_seconds`: operators blocked, summed over threads.
    """

    sweep_seconds: float | None
    sweep_bytes: float | None
    rate: float | None
    wall_seconds: float
    bubble_seconds: float
    wait_seconds: float


@dataclass
class _Entry:
    number: int
    thread: int
    begin: Mark
    end: Mark | None = None
    host_bytes: int = 0
    device_bytes: int = 0


class SweepLog:
    """Follows the sweeps of one model. Any thread may call it; a sweep begins and ends on the same one.

    A sweep that never ends, because an error left it, is forgotten when its thread begins the next.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self.begun = 0  # sweeps, those that failed included
        self.first_seconds: float | None = None  # of the first forward pass that ended
        self._first_end: float | None = None
        self._threads = 0
        self._entries: deque[_Entry] = deque(maxlen=remembered)  # those that ended, in that order
        self._lock = threading.Lock()
        self._local = threading.local()

    def begin(self, mark: Mark) -> None:
        """A forward pass begins on the calling thread."""
        local = self._local
        before: _Entry | None = getattr(local, "entry", None)
        with self._lock:
            if before is None:
                local.thread = self._threads
                self._threads += 1
            elif before.end is not None and not is_pause(before.begin.at, before.end.at, mark.at):
                before.end = mark
            local.entry = _Entry(self.begun, local.thread, mark)
            self.begun += 1

    def end(self, mark: Mark, host_bytes: int, device_bytes: int) -> None:
        """It ends, with so many bytes of weights in memory for good."""
        entry: _Entry | None = getattr(self._local, "entry", None)
        if entry is None or entry.end is not None:
            return  # the hook of a model that was copied in the midst of a pass
        with self._lock:
            entry.end, entry.host_bytes, entry.device_bytes = mark, host_bytes, device_bytes
            self._entries.append(entry)
            if self.first_seconds is None:
                self.first_seconds, self._first_end = mark.at - entry.begin.at, mark.at

    def sweeps(self) -> tuple[Sweep, ...]:
        """Those that ended, the oldest forgotten beyond `remembered`, in the order in which they began."""
        with self._lock:
            found = [(entry, entry.end) for entry in self._entries]
        sweeps = [_sweep(entry, end) for entry, end in found if end is not None]
        return tuple(sorted(sweeps, key=lambda sweep: sweep.number))

    def steady(self) -> Steady:
        """The sweeps that began after the first had ended: that one loads the residents too."""
        with self._lock:
            first = self._first_end
            pairs = [(entry, entry.end) for entry in self._entries]
        later = [
            (entry, end) for entry, end in pairs if end and first is not None and entry.begin.at >= first
        ]
        if not later:
            return Steady(None, None, None, 0.0, 0.0, 0.0)
        blocks = _blocks([(entry.begin, end) for entry, end in later])
        wall = sum(end.at - begin.at for begin, end in blocks)
        moved = sum(end.transferred - begin.transferred for begin, end in blocks)
        busy = sum(end.busy - begin.busy for begin, end in blocks)
        return Steady(
            sweep_seconds=statistics.median(end.at - entry.begin.at for entry, end in later),
            sweep_bytes=statistics.median(end.asked - entry.begin.asked for entry, end in later),
            rate=moved / wall if wall > 0 else None,
            wall_seconds=wall,
            bubble_seconds=max(0.0, wall - busy) if moved else 0.0,
            wait_seconds=sum(end.waited - entry.begin.waited for entry, end in later),
        )


def is_pause(begun: float, ended: float, following: float) -> bool:
    """Whether the time from the end of a sweep to the next one's begin is a pause that the caller made."""
    gap = following - ended
    return gap > PAUSE and gap > ended - begun


def _sweep(entry: _Entry, end: Mark) -> Sweep:
    begin = entry.begin
    return Sweep(
        number=entry.number,
        thread=entry.thread,
        begun=begin.at,
        seconds=end.at - begin.at,
        nvme_bytes=end.asked - begin.asked,
        host_bytes=entry.host_bytes,
        device_bytes=entry.device_bytes,
        wait_seconds=end.waited - begin.waited,
        hits=end.hits - begin.hits,
        misses=end.misses - begin.misses,
    )


def _blocks(spans: Sequence[tuple[Mark, Mark]]) -> list[tuple[Mark, Mark]]:
    """The spans with those that overlap, on different threads, made one."""
    merged: list[tuple[Mark, Mark]] = []
    for begin, end in sorted(spans, key=lambda span: span[0].at):
        if merged and begin.at <= merged[-1][1].at:
            last = merged[-1]
            merged[-1] = last[0], max(last[1], end, key=lambda mark: mark.at)
        else:
            merged.append((begin, end))
    return merged
