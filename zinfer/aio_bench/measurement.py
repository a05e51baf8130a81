"""What trials of one setting come to, and which setting is best. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zinfer.aio.profile import BACKENDS
from zinfer.aio_bench.settings import Setting

LEAST_DEPTH = 4
SLACK = 0.003  # seconds that the queue should last: while a model computes, the thread that refills it gets no core
# Of the fastest: nearer ones swap places from run to run, and a shorter queue serves urgent reads sooner.
GOOD_ENOUGH = 0.95


@dataclass(frozen=True)
class Trial:
    """One setting measured once: bytes moved, seconds, CPU seconds of this process, operations by latency.

    `by_drive`: the bytes that each of several drives moved.
    """

    nbytes: int
    seconds: float
    cpu_seconds: float
    latencies: Mapping[float, int]
    by_drive: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class Measurement:
    """One setting in one direction, over its trials. Rates in bytes a second, times in seconds."""

    direction: str
    setting: Setting
    rate: float  # the median trial's
    low: float
    high: float
    cpu_per_gb: float  # CPU seconds for 10^9 bytes, the median
    p50: float  # latency of a block, over all trials
    p99: float
    shares: tuple[float, ...] = (1.0,)  # of each drive in the bytes

    @classmethod
    def of(cls, direction: str, setting: Setting, trials: Sequence[Trial]) -> Measurement:
        """Raises statistics.StatisticsError for no trials."""
        rates = [trial.rate for trial in trials]
        latencies: Counter[float] = Counter()
        for trial in trials:
            latencies.update(trial.latencies)
        return cls(
            direction,
            setting,
            statistics.median(rates),
            min(rates),
            max(rates),
            statistics.median(trial.cpu_seconds / trial.nbytes * 1e9 for trial in trials),
            percentile(latencies, 0.50),
            percentile(latencies, 0.99),
            _shares([trial.by_drive for trial in trials]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `depth` is the number of threads for the backend "threads"."""
        return {
            "direction": self.direction,
            "backend": self.setting.backend,
            "block_bytes": self.setting.block_bytes,
            "depth": self.setting.depth,
            "threads": self.setting.threads,
            "bytes_per_second": self.rate,
            "lowest": self.low,
            "highest": self.high,
            "cpu_seconds_per_gb": self.cpu_per_gb,
            "latency_p50_seconds": self.p50,
            "latency_p99_seconds": self.p99,
        }


def _shares(by_drive: Sequence[tuple[int, ...]]) -> tuple[float, ...]:
    sums = [sum(column) for column in zip(*by_drive, strict=True)] or [1]
    return tuple(column / sum(sums) for column in sums)


def percentile(latencies: Mapping[float, int], share: float) -> float:
    """The shortest time within which `share` of the operations were done; 0 where there were none."""
    total, seen = sum(latencies.values()), 0
    for seconds, count in sorted(latencies.items()):
        seen += count
        if seen >= share * total:
            return seconds
    return 0.0


def choose(measurements: Iterable[Measurement]) -> Measurement:
    """Of those within 5 % of the fastest, the one with the fewest bytes in flight, then the least CPU.

    A depth below LEAST_DEPTH, or a queue that the drive empties within SLACK, is looked at only where there is no
    other: what is measured here on an idle machine must hold beside a computing model, where blocks of 256 KiB, the
    fastest here by 5 %, were 12 % slower than the default. Raises ValueError for no measurements.
    """
    candidates = list(measurements)
    if not candidates:
        raise ValueError("nothing was measured")
    lasting = [item for item in candidates if _lasts(item)] or candidates
    fastest = max(item.rate for item in lasting)
    return min(
        (item for item in lasting if item.rate >= GOOD_ENOUGH * fastest),
        key=lambda item: (
            item.setting.in_flight,
            item.cpu_per_gb,
            BACKENDS.index(item.setting.backend),
        ),
    )


def _lasts(item: Measurement) -> bool:
    return item.setting.depth >= LEAST_DEPTH and item.setting.in_flight >= SLACK * item.rate
