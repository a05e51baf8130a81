"""What sweep.py makes of its runs: each cell's time over its bound. Pure functions on what workers wrote.

t_sweep >= max( (W - R) / drive bandwidth, compute )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.bench import QUIET_ROUNDS, Run, counting
from benchmarks.report import Requirement, Spread, table

TIME_BOUND = 1.05
READ_BOUND = 1.01
FIRST_BOUND = 1.02
OVERHEAD_BOUND = 1.01
PREDICTION_BOUND = 0.10
UNUSED_BOUND = 512 << 20  # bytes of the budget that need not be resident weights or key-value cache
ROW_EDGES = 8192  # bytes: a row looked up is read with the rest of its first and last page
GB = 1e9


@dataclass(frozen=True)
class Cell:
    """One budget (bytes, and percent of the model's) at one batch."""

    percent: float
    budget: int
    batch: int

    @property
    def label(self) -> str:
        """How tables and progress name it."""
        return f"{self.percent:g} %, batch {self.batch}"


@dataclass(frozen=True)
class Point:
    """A cell in one round, beside the model in memory at the same batch in the same round."""

    cell: Cell
    run: Run
    memory: Run

    @property
    def seconds(self) -> float:
        """Seconds a token: a step of all sequences of the batch."""
        return self.run.seconds_a_token

    @property
    def compute(self) -> float:
        """Seconds a token of the model in memory."""
        return self.memory.seconds_a_token

    @property
    def swept(self) -> int:
        """W, in bytes."""
        return self._counted("swept_bytes")

    @property
    def resident(self) -> int:
        """R, in bytes, small tensors included."""
        return self.run.outcome.resident or 0

    @property
    def cache(self) -> int:
        """Bytes of the key-value cache in the end."""
        return int((self.run.outcome.report or {})["cache_bytes"])

    @property
    def streamed(self) -> int:
        """W - R: bytes that a decoding sweep has to read."""
        return max(0, self.swept - self.resident)

    @property
    def rate(self) -> float:
        """Bytes a second that plain reads into as much memory as the window bring, mean over the pauses."""
        return fmean(self.run.outcome.memory_rates)

    @property
    def plain_rate(self) -> float:
        """The same of reads into 8 MiB, which a large cache can hold."""
        return fmean(self.run.outcome.probe_rates)

    @property
    def drive_bound(self) -> bool:
        """Whether the drive is the bottleneck, not the operators."""
        return self.streamed / self.rate > self.compute

    @property
    def bound(self) -> float:
        """Seconds that a token takes at least."""
        return max(self.streamed / self.rate, self.compute)

    @property
    def over_bound(self) -> float:
        """Seconds a token over the bound."""
        return self.seconds / self.bound

    @property
    def over_plain_bound(self) -> float:
        """The same with the rate of reads into 8 MiB."""
        return self.seconds / max(self.streamed / self.plain_rate, self.compute)

    @property
    def read(self) -> float:
        """Bytes that the process read for a token: all of them from one rest to the next.

        What lay read ahead at the second rest, and not at the first, is a later token's.
        """
        outcome = self.run.outcome
        assert outcome.rested is not None
        first, second = (count or 0 for count in outcome.read_ahead)
        return (outcome.rested.process.read - (second - first)) / len(outcome.resident_each)

    @property
    def read_ratio(self) -> float:
        """Bytes read a token over W - R, the pages of the rows looked up included; R as it was at each token."""
        streamed = fmean(max(0, self.swept - (count or 0)) for count in self.run.outcome.resident_each)
        return self.read / (streamed + ROW_EDGES * self.cell.batch)

    @property
    def first_ratio(self) -> float:
        """Bytes that the process read from the loading call to the first token over what that sweep needs."""
        return self.run.first_read / self._counted("first_swept_bytes")

    @property
    def unused(self) -> int:
        """Bytes of the budget, or of W where that is less, that are neither weights nor key-value cache."""
        return min(self.cell.budget, self.swept) - self.resident - self.cache

    @property
    def disturbed(self) -> bool:
        """Whether neighbours falsified either time."""
        return self.run.disturbed or self.memory.disturbed

    def _counted(self, name: str) -> int:
        """What was counted on the model in memory, not by zinfer."""
        return int((self.memory.outcome.report or {})[name])


@dataclass(frozen=True)
class Overhead:
    """Seconds of each token of one model in memory, computed in turns with zinfer and without."""

    zinfer: list[float]
    plain: list[float]
    tokens_equal: bool

    @property
    def ratio(self) -> float:
        """Median over the pairs of neighbouring tokens."""
        return median(mine / other for mine, other in zip(self.zinfer, self.plain, strict=True))


def counted(points: Sequence[Point]) -> list[Point]:
    """The undisturbed points of one cell, or all of them where those are too few."""
    return counting(points, lambda point: point.disturbed)


def prediction_error(points: Mapping[Cell, Sequence[Point]], predicted: Mapping[Cell, float]) -> float:
    """Median over the cells of |predicted / measured - 1|."""
    return median(
        abs(predicted[cell] / median(point.seconds for point in counted(mine)) - 1)
        for cell, mine in points.items()
    )


def cell_rows(points: Mapping[Cell, Sequence[Point]], predicted: Mapping[Cell, float]) -> str:
    """One row a cell: times, bound and their ratio."""
    header = ["budget, batch", "s a token", "in memory, s", "(W - R) / drive, s", "limited by"]
    header += ["over the bound", "... drive into 8 MiB", "predicted, s", "disturbed rounds"]
    rows = []
    for cell, all_points in points.items():
        mine = counted(all_points)
        rows.append(
            [
                cell.label,
                _spread(mine, lambda point: point.seconds, 3),
                _spread(mine, lambda point: point.compute, 3),
                _spread(mine, lambda point: point.streamed / point.rate, 3),
                "drive" if limited_by_drive(mine) else "compute",
                _spread(mine, lambda point: point.over_bound, 3),
                _spread(mine, lambda point: point.over_plain_bound, 3),
                f"{predicted[cell]:.3f}",
                str(sum(point.disturbed for point in all_points)),
            ]
        )
    return table(header, rows)


def byte_rows(points: Mapping[Cell, Sequence[Point]]) -> str:
    """One row a cell: bytes, in GB, and the drive's rates."""
    header = [
        "GB",
        "budget",
        "W",
        "resident",
        "W - R",
        "read a token",
        "over W - R",
        "first token over W",
    ]
    header += ["used", "KV cache", "drive, GB/s", "... into 8 MiB"]
    rows = []
    for cell, all_points in points.items():
        mine = counted(all_points)
        rows.append(
            [
                cell.label,
                f"{cell.budget / GB:.3f}",
                _spread(mine, lambda point: point.swept / GB, 3),
                _spread(mine, lambda point: point.resident / GB, 3),
                _spread(mine, lambda point: point.streamed / GB, 3),
                _spread(mine, lambda point: point.read / GB, 3),
                _spread(mine, lambda point: point.read_ratio, 4),
                _spread(mine, lambda point: point.first_ratio, 4),
                _spread(mine, lambda point: point.run.account / GB, 3),
                _spread(mine, lambda point: point.cache / GB, 3),
                _spread(mine, lambda point: point.rate / GB, 2),
                _spread(mine, lambda point: point.plain_rate / GB, 2),
            ]
        )
    return table(header, rows)


def limited_by_drive(points: Sequence[Point]) -> bool:
    """Whether the drive is the bottleneck in most of a cell's points."""
    return 2 * sum(point.drive_bound for point in points) > len(points)


def requirements(
    points: Mapping[Cell, Sequence[Point]],
    overheads: Sequence[Overhead],
    predicted: Mapping[Cell, float],
    tokens_equal: bool,
) -> list[Requirement]:
    """What zinfer promises, as measured: medians over a cell's rounds, and of these the worst cell."""
    mine = {cell: counted(all_points) for cell, all_points in points.items()}

    def worst(figure: Callable[[Point], float], cells: Sequence[Cell]) -> float:
        return max(median(figure(point) for point in mine[cell]) for cell in cells)

    everywhere = list(mine)
    by_drive = [cell for cell in everywhere if limited_by_drive(mine[cell])]
    by_compute = [cell for cell in everywhere if cell not in by_drive]
    found = []
    if by_drive:
        over = worst(lambda point: point.over_bound, by_drive)
        found.append(Requirement("limited by the drive: s a token / bound", over, TIME_BOUND, False))
    if by_compute:
        over = worst(lambda point: point.seconds / point.compute, by_compute)
        found.append(Requirement("limited by compute: s a token / in memory", over, TIME_BOUND, False))
    least = min(len([point for point in each if not point.disturbed]) for each in points.values())
    rounds = max(len(each) for each in points.values())
    return [
        *found,
        Requirement(
            "bytes read a sweep / (W - R)",
            worst(lambda point: point.read_ratio, everywhere),
            READ_BOUND,
            False,
        ),
        Requirement(
            "bytes read to the first token / W",
            worst(lambda point: point.first_ratio, everywhere),
            FIRST_BOUND,
            False,
        ),
        Requirement(
            "budget - resident - KV cache, bytes",
            worst(lambda point: point.unused, everywhere),
            UNUSED_BOUND,
            False,
        ),
        Requirement(
            "zinfer's account with the KV cache / budget",
            worst(lambda point: point.run.account / point.cell.budget, everywhere),
            1,
            False,
        ),
        Requirement(
            "everything resident: s a token with zinfer / without",
            median(each.ratio for each in overheads),
            OVERHEAD_BOUND,
            False,
        ),
        Requirement(
            "predicted over measured s a token: distance from 1, median of the cells",
            prediction_error(points, predicted),
            PREDICTION_BOUND,
            False,
        ),
        Requirement("tokens equal at each batch (1: yes)", float(tokens_equal), 1, True),
        Requirement("undisturbed rounds of a cell, the fewest", least, min(QUIET_ROUNDS, rounds), True),
    ]


def _spread(points: Sequence[Point], figure: Callable[[Point], float], digits: int) -> str:
    return Spread.of([figure(point) for point in points]).text(1, digits)
