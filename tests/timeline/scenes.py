"""Timings and timelines made up for tests."""

from __future__ import annotations

from dataclasses import dataclass

from zinfer.timeline.events import COMPUTE, COPIES, READS, SWEEPS, WAITS, Span, Timeline


@dataclass
class FakeTiming:
    """A request that has ended as soon as `finished` is set."""

    started: float | None = None
    finished: float | None = None
    transferred: int | None = None
    timed: bool = True


def timeline(**changes: object) -> Timeline:
    """Two sweeps on thread 0: reads that overlap, a wait, a copy, operators."""
    spans = (
        Span(READS, "small tensors", 0.0, 0.25, nbytes=100, kind="load"),
        Span(SWEEPS, "0", 1.0, 3.0),
        Span(READS, "a", 1.0, 2.0, nbytes=1000, kind="demand"),
        Span(WAITS, "a", 1.0, 2.0),
        Span(READS, "b", 1.5, 2.5, nbytes=3000, kind="prefetch"),
        Span(COMPUTE, "a", 2.0, 2.5),
        Span(COPIES, "b", 2.5, 2.75, nbytes=3000),
        Span(COMPUTE, "b", 2.75, 3.0),
        Span(SWEEPS, "1", 3.25, 4.0),
        Span(READS, "c", 3.5, 4.5, nbytes=500, kind="rows"),
    )
    fields = {"model": "Model", "spans": spans, "window": ((1.5, 1000), (2.5, 4000)), "dropped": 0, **changes}
    return Timeline(**fields)  # type: ignore[arg-type]
