"""Spans of a run: seconds, traffic, and what neighbours did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.drive import Drive, Traffic, process_traffic
from benchmarks.neighbours import all_cpu_seconds, own_cpu_seconds

FOREIGN_READ = 0.05  # of the bytes that the tool itself read
FOREIGN_BYTES = 64e6  # ... and this much besides: a tool that reads nothing has neighbours too
FOREIGN_CPU = 0.4  # cores, over any of the spans watched


@dataclass
class Phase:
    """A span of the run: seconds, what the whole drive moved, and what this process had it move.

    `foreign_cpu` are the CPU seconds that all other processes, the kernel's included, took meanwhile.
    """

    seconds: float
    drive: Traffic
    process: Traffic
    foreign_cpu: float

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            self.seconds + other.seconds,
            self.drive + other.drive,
            self.process + other.process,
            self.foreign_cpu + other.foreign_cpu,
        )


class Clock:
    """Measures spans: time, the drive's traffic and this process's."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.restart()

    def restart(self) -> None:
        """Begin a span now."""
        self._started = time.perf_counter()
        self._drive_before, self._process_before = self.drive.traffic(), process_traffic()
        self._foreign_before = all_cpu_seconds() - own_cpu_seconds()

    def span(self) -> Phase:
        """What happened since the start of the span, which goes on."""
        return Phase(
            time.perf_counter() - self._started,
            self.drive.traffic() - self._drive_before,
            process_traffic() - self._process_before,
            all_cpu_seconds() - own_cpu_seconds() - self._foreign_before,
        )


def foreign_read(spans: Sequence[Phase]) -> int:
    """Bytes that others read from the drive in `spans`."""
    return sum(max(0, span.drive.read - span.process.read) for span in spans)


def foreign_cpu(spans: Sequence[Phase]) -> float:
    """Cores that others kept busy in `spans`: the most of them."""
    return max([0.0, *(span.foreign_cpu / span.seconds for span in spans)])


def disturbed(spans: Sequence[Phase]) -> bool:
    """Whether neighbours used so much of drive or CPU in `spans` that the figures are not the tool's own."""
    mine = sum(span.process.read for span in spans)
    return foreign_read(spans) > FOREIGN_READ * mine + FOREIGN_BYTES or foreign_cpu(spans) > FOREIGN_CPU
