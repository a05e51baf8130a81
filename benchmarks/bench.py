"""Runs of workers in memory groups of their own: one at a time, on a machine as quiet as can be had."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from benchmarks import BenchmarkError, spans
from benchmarks.cgroup import Usage, run_limited
from benchmarks.drive import Drive
from benchmarks.neighbours import wait_until_quiet
from benchmarks.report import Spread
from benchmarks.spans import Clock, Phase
from benchmarks.worker import Outcome, Pauses, Task, read_outcome, weight_files
from zinfer.aio.probe import measure_read_rate

QUIET_ROUNDS = 3  # fewer do not carry a median
REASON_CHARACTERS = 160


class RunFailed(BenchmarkError):
    """A tool's process did not finish; `reason` is a short line for a table."""

    def __init__(self, tool: str, reason: str, tail: str) -> None:
        super().__init__(f"{tool} failed: {reason}\n{tail}")
        self.reason = reason


@dataclass(frozen=True)
class Run:
    """One tool's process in one round: what it did, and what its group and the drive saw."""

    outcome: Outcome
    usage: Usage

    @property
    def seconds_a_token(self) -> float:
        """Median over the counted tokens."""
        return Spread.of([token.seconds for token in self.outcome.tokens_each]).median

    @property
    def read_rate(self) -> float:
        """Bytes a second that the process had the drive read over all counted tokens."""
        assert self.outcome.decode is not None
        return self.outcome.decode.process.read / self.outcome.decode.seconds

    @property
    def probe_rate(self) -> float:
        """Mean of the drive's plain direct read rate before and after the counted tokens."""
        return fmean(self.outcome.probe_rates)

    @property
    def share(self) -> float:
        """Read rate while decoding over the probe's."""
        return self.read_rate / self.probe_rate

    @property
    def bytes_a_token(self) -> float:
        """Median bytes read for a counted token."""
        return Spread.of([token.process.read for token in self.outcome.tokens_each]).median

    @property
    def first_seconds(self) -> float:
        """From the loading call to the first token."""
        assert self.outcome.first_token is not None
        return self.outcome.first_token.seconds

    @property
    def first_read(self) -> int:
        """Bytes read from the loading call to the first token."""
        assert self.outcome.first_token is not None
        return self.outcome.first_token.process.read

    @property
    def written(self) -> int:
        """Bytes the process had written to a drive, for load and first token and for the counted ones."""
        assert self.outcome.first_token is not None and self.outcome.decode is not None
        return self.outcome.first_token.process.written + self.outcome.decode.process.written

    @property
    def prefill_seconds(self) -> float:
        """From the loaded model to the first token."""
        return self.first_seconds - self.outcome.load_seconds

    @property
    def watched(self) -> list[Phase]:
        """The spans in which neighbours would falsify the figures: the counted tokens and the probes."""
        assert self.outcome.decode is not None
        return [self.outcome.decode, *self.outcome.probes]

    @property
    def foreign_read(self) -> int:
        """Bytes that others read from the drive in those spans."""
        return spans.foreign_read(self.watched)

    @property
    def foreign_cpu(self) -> float:
        """Cores that others kept busy in those spans: the most of them."""
        return spans.foreign_cpu(self.watched)

    @property
    def disturbed(self) -> bool:
        """Whether neighbours used so much of drive or CPU that the figures are not the tool's own."""
        return spans.disturbed(self.watched)


class PauseHost:
    """Measures the drive, in this process, whenever the worker that writes to `out` pauses for that."""

    def __init__(self, task: Task, out: str, drive: Drive) -> None:
        self._task, self._out, self._drive = task, out, drive
        self.rates: list[float] = []
        self.probes: list[Phase] = []

    def look(self) -> None:
        """Called while the worker runs; takes `probe_seconds` when the worker is waiting."""
        if not Pauses.asked(self._out, len(self.rates)).exists():
            return
        clock = Clock(self._drive)
        rate = measure_read_rate(weight_files(self._task.checkpoint), self._task.probe_seconds)
        self.probes.append(clock.span())
        Pauses.answered(self._out, len(self.rates)).touch()
        self.rates.append(rate.bytes_per_second)


def failure(usage: Usage, seconds: float | None) -> str | None:
    """Why a process that was to end within `seconds` did not finish, in a line; None if it did."""
    if usage.exit_code == 0:
        return None
    if usage.oom_kills:
        return "killed: out of memory"
    if seconds is not None and usage.seconds >= seconds:
        return f"stopped after {seconds:.0f} s"
    lines = [line for line in usage.tail.splitlines() if line.strip()]
    return lines[-1].strip()[:REASON_CHARACTERS] if lines else f"exit code {usage.exit_code}"


def run_one(
    task: Task, limit: int | None, drive: Drive, keep_page_cache: bool, seconds: float | None = None
) -> Run:
    """Run one worker, `seconds` at most. Raises RunFailed, with the end of its output, when it fails.

    Its files, in a folder under the task's `scratch`, are removed whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="zinfer-benchmark-", dir=task.scratch) as folder:
        out = os.path.join(folder, "outcome.json")
        os.mkdir(scratch := os.path.join(folder, "scratch"))
        host = PauseHost(task, out, drive)
        usage = run_limited(
            replace(task, scratch=scratch).command(out),
            limit,
            drive,
            keep_page_cache=keep_page_cache,
            meanwhile=host.look,
            seconds=seconds,
        )
        if (reason := failure(usage, seconds)) is not None:
            raise RunFailed(task.tool, reason, usage.tail)
        return Run(replace(read_outcome(out), probes=host.probes, probe_rates=host.rates), usage)


@dataclass
class Bench:
    """Runs workers one after the other, each on a machine as quiet as `patience` and `repeats` allow."""

    drive: Drive
    keep_page_cache: bool
    patience: float
    repeats: int
    seconds: float | None = None
    discarded: list[Run] = field(default_factory=list)

    def run(self, task: Task, limit: int | None) -> Run:
        """One run; one that neighbours disturbed is discarded and repeated, `repeats` times at most.

        What it measured plays no part in that; the last one is kept, disturbed or not. Raises RunFailed.
        """
        for attempt in range(self.repeats + 1):
            if self.patience:
                wait_until_quiet(self.drive, self.patience)
            run = run_one(task, limit, self.drive, self.keep_page_cache, self.seconds)
            disturbed = " (disturbed)" if run.disturbed else ""
            sys.stderr.write(f"{task.tool}: {run.seconds_a_token:.3f} s a token{disturbed}\n")
            if not run.disturbed or attempt == self.repeats:
                break
            self.discarded.append(run)
        return run


def interleave(tools: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round: forwards, backwards, forwards ... so that no tool always goes first."""
    return [list(tools) if number % 2 == 0 else list(reversed(tools)) for number in range(rounds)]
