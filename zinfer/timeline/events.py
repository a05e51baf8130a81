"""A timeline as plain data, and what can be said of it: lanes, unions, totals. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zinfer.timeline.sweeps import is_pause

SWEEPS, READS, COPIES, COMPUTE, WAITS = "sweeps", "nvme->host", "host->device", "compute", "wait"
ROWS = (SWEEPS, READS, COPIES, COMPUTE, WAITS)
KINDS = (
    "demand",
    "prefetch",
    "rows",
    "load",
)  # of reads; "rows": single rows; "load": what is read and kept at load

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end`, in seconds since the recorder was made.

    `name` is the weight's (a sweep's: its number), `thread` counts the threads that operators ran on (0 for reads),
    `nbytes` are the bytes moved (reads: by the drive, aligned supersets included) and `kind` is one of KINDS for
    reads, else "".
    """

    row: str
    name: str
    start: float
    end: float
    thread: int = 0
    nbytes: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Timeline:
    """What was recorded of one model. `window`: (seconds, bytes of the window in use), oldest first.

    `dropped`: events older than these that the recorder had no room to keep.
    """

    model: str
    spans: tuple[Span, ...]
    window: tuple[tuple[float, int], ...] = ()
    dropped: int = 0

    def row(self, row: str) -> list[Span]:
        """The spans of one row, by their start."""
        return sorted((span for span in self.spans if span.row == row), key=lambda span: span.start)


@dataclass(frozen=True)
class Totals:
    """What a timeline adds up to. Times in seconds.

    `seconds`: how long sweeps ran, gaps between them included unless the caller paused. `busy_seconds`: the part of
    it in which the drive had a read in flight; `bubble_seconds`: the rest, if there was anything to read.
    `wait_seconds`: operators' threads blocked, summed over threads. `bytes_read`: by all reads, those for loading
    included.
    """

    sweeps: int
    seconds: float
    busy_seconds: float
    bubble_seconds: float
    wait_seconds: float
    bytes_read: int


def lanes(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each interval, so that none of a lane overlap: the lowest that is free. By ascending start."""
    ends: list[int] = []
    chosen = []
    for start, end in intervals:
        lane = next((number for number, last in enumerate(ends) if last <= start), len(ends))
        if lane == len(ends):
            ends.append(end)
        ends[lane] = end
        chosen.append(lane)
    return chosen


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """The intervals with those made one that overlap, or are at most `gap` apart; ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that lie in both; each as union() returns them."""
    total, at, other = 0.0, 0, 0
    while at < len(first) and other < len(second):
        (a, b), (c, d) = first[at], second[other]
        total += max(0.0, min(b, d) - max(a, c))
        at, other = (at + 1, other) if b < d else (at, other + 1)
    return total


def swept(timeline: Timeline) -> list[Interval]:
    """When sweeps ran: each until the thread's next begins, unless the caller paused in between; as union()."""
    by_thread: dict[int, list[Span]] = {}
    for span in timeline.row(SWEEPS):
        by_thread.setdefault(span.thread, []).append(span)
    found: list[Interval] = []
    for spans in by_thread.values():
        for span, following in zip(spans, [*spans[1:], None], strict=True):
            joined = following is not None and not is_pause(span.start, span.end, following.start)
            found.append((span.start, following.start if following is not None and joined else span.end))
    return union(found)


def totals(timeline: Timeline) -> Totals:
    """What `timeline` adds up to."""
    running = swept(timeline)
    reads = timeline.row(READS)
    seconds = sum(end - start for start, end in running)
    busy = overlap(running, union((span.start, span.end) for span in reads))
    streamed = any(span.kind != "load" for span in reads)
    return Totals(
        sweeps=len(timeline.row(SWEEPS)),
        seconds=seconds,
        busy_seconds=busy,
        bubble_seconds=max(0.0, seconds - busy) if streamed else 0.0,
        wait_seconds=sum(span.end - span.start for span in timeline.row(WAITS)),
        bytes_read=sum(span.nbytes for span in reads),
    )


def rates(spans: Iterable[Span], start: float, end: float, bins: int) -> list[float]:
    """Bytes a second in each of `bins` equal parts of [start, end): each span's bytes spread evenly over its time."""
    width = (end - start) / bins
    if width <= 0:
        return [0.0] * bins
    counts = [0.0] * bins
    for span in spans:
        duration = span.end - span.start
        first = min(bins - 1, max(0, int((span.start - start) / width)))
        last = min(bins - 1, max(0, int((span.end - start) / width)))
        for number in range(first, last + 1):
            left = start + number * width
            inside = min(span.end, left + width) - max(span.start, left)
            counts[number] += span.nbytes * (max(0.0, inside) / duration if duration > 0 else 1.0)
    return [count / width for count in counts]
