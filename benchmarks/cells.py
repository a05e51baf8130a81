"""What versus.py measures: cells, the order of the runs, and what is found in a cell. No process is started here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import BenchmarkError
from benchmarks.bench import Run, counting, interleave
from benchmarks.peers import TOOLS
from benchmarks.report import Spread
from zinfer.planner.memory import parse_size


@dataclass(frozen=True)
class Cell:
    """One column of the comparison: a memory limit, in bytes and as it was written, and a batch."""

    limit_text: str
    limit: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`3GiB:32` is a limit of 3 GiB and a batch of 32. Raises BenchmarkError for anything else."""
        size, _, batch = text.partition(":")
        if not batch.isdecimal() or int(batch) < 1:
            raise BenchmarkError(f"{text}: a cell is LIMIT:BATCH, for example 3GiB:32")
        return cls(size, parse_size(size), int(batch))

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.limit_text}:{self.batch}"


@dataclass(frozen=True)
class Step:
    """One run to come: a tool in round `number`, from 0, of a cell."""

    cell: Cell
    number: int
    tool: str


@dataclass
class Found:
    """What the runs of one cell showed: of each tool its runs by round, and why it failed where it did.

    A tool that failed is not tried again in the same cell.
    """

    cell: Cell
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The limit, the batch and the rounds there were, for a table."""
        count = len({number for runs in self.runs.values() for number in runs})
        return f"{self.cell.limit_text}, batch {self.cell.batch} ({count} round{'' if count == 1 else 's'})"

    def ran(self, tool: str) -> bool:
        """Whether `tool` ran in every round that it was to run in."""
        return bool(self.runs.get(tool)) and tool not in self.failed

    def of(self, tool: str) -> list[Run]:
        """The runs that count: the undisturbed ones, or all where those are too few."""
        return _quiet([(run,) for run in self.runs.get(tool, {}).values()], 0)

    def median(self, tool: str, figure: str) -> float | None:
        """Median of an attribute of the counted runs; None where the tool has no run."""
        values = [getattr(run, figure) for run in self.of(tool)]
        return Spread.of(values).median if values else None

    def ratios(self, peer: str) -> list[float]:
        """Seconds a token of `peer` over zinfer's, within each round in which neither was disturbed."""
        mine, other = self.runs.get("zinfer", {}), self.runs.get(peer, {})
        both = [(other[number], mine[number]) for number in other if number in mine]
        over, under = _quiet(both, 0), _quiet(both, 1)
        return [a.seconds_a_token / b.seconds_a_token for a, b in zip(over, under, strict=True)]

    def behind(self, figure: str, peers: Sequence[str]) -> list[str]:
        """The peers whose median of `figure` is as small as zinfer's or smaller; all that ran where zinfer failed."""
        mine = self.median("zinfer", figure) if self.ran("zinfer") else None
        theirs = {peer: self.median(peer, figure) for peer in peers}
        return [
            peer for peer, value in theirs.items() if value is not None and (mine is None or value <= mine)
        ]


def _quiet(rounds: Sequence[tuple[Run, ...]], index: int) -> list[Run]:
    """Of the rounds without a disturbed run, or of all where those are too few, the runs at `index`."""
    return [runs[index] for runs in counting(rounds, lambda runs: any(run.disturbed for run in runs))]


def plan(cells: Sequence[Cell], tools: Sequence[str], rounds: dict[Cell, int]) -> list[Step]:
    """All limited runs in order; the order of the tools turns round from round to round, over all cells."""
    steps: list[Step] = []
    orders = iter(interleave([tool for tool in tools if TOOLS[tool].limited], sum(rounds.values())))
    for cell in cells:
        for number in range(rounds[cell]):
            steps += [
                Step(cell, number, tool) for tool in next(orders) if number == 0 or not TOOLS[tool].once
            ]
    return steps


def seconds_left(steps: Sequence[Step], taken: dict[str, list[float]]) -> float | None:
    """How long `steps` will take, if each takes its tool's mean so far; None before anything has run."""
    known = {tool: sum(times) / len(times) for tool, times in taken.items() if times}
    if not known:
        return None
    usual = sum(known.values()) / len(known)
    return sum(known.get(step.tool, usual) for step in steps)


def difference(tokens: Sequence[int], reference: Sequence[int], batch: int) -> str:
    """ "equal", or how many of the rows differ, over the steps that both have; see Outcome.tokens."""
    count = min(len(tokens), len(reference)) // batch * batch
    rows = [tokens[row:count:batch] != reference[row:count:batch] for row in range(batch)]
    return "equal" if not any(rows) else f"{sum(rows)} of {batch} rows differ"
