"""Runs of workers, in memory groups of their own or without: one at a time, on a machine as quiet as can be had."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TypeVar

from benchmarks import BenchmarkError, spans
from benchmarks.cgroup import Usage, run_free, run_limited
from benchmarks.drive import Drive
from benchmarks.neighbours import wait_until_quiet
from benchmarks.report import Spread
from benchmarks.spans import Clock, Phase
from benchmarks.worker import Outcome, Pauses, Task, read_outcome, weight_files
from zinfer.aio.probe import measure_read_rate

QUIET_ROUNDS = 3  # fewer do not carry a median
REASON_CHARACTERS = 160
PROMPT_IDS = 250  # prompt ids lie below this, and those of a batch of 32 a little above
IN_MEMORY_FACTOR = 1.5  # free memory over model bytes, for the reference in memory to be run at all
WINDOW_BYTES = 256 << 20  # what probes read into: about the window of the models measured here
ACCOUNT = (
    "planned_resident_bytes",
    "window_bytes",
    "small_bytes",
    "bounce_bytes",
    "conversion_bytes",
    "cache_bytes",
)
Kind = TypeVar("Kind")


def prompt_of(length: int) -> list[int]:
    """The prompt of a first sequence; see Task.rows for the others."""
    return [(37 * index + 11) % PROMPT_IDS for index in range(length)]


def counting(rounds: Sequence[Kind], disturbed: Callable[[Kind], bool]) -> list[Kind]:
    """The rounds that were not `disturbed`, or all of them where those are too few."""
    quiet = [each for each in rounds if not disturbed(each)]
    return quiet if len(quiet) >= min(QUIET_ROUNDS, len(rounds)) else list(rounds)


def tried_twice(work: Callable[[], Kind], label: str, failed: list[str]) -> Kind | None:
    """What `work` returns, at the second attempt where the first fails; None, and a line in `failed`, where both do.

    So one failing run costs neither the rounds before it nor those after.
    """
    for last in (False, True):
        try:
            return work()
        except BenchmarkError as error:
            sys.stderr.write(f"{label}: {error}\n")
            if last:
                reason = error.reason if isinstance(error, RunFailed) else str(error).splitlines()[0]
                failed.append(f"{label}: {reason[:REASON_CHARACTERS]}")
    return None


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
    def account(self) -> int:
        """Bytes that zinfer accounts for in the end, and of the key-value cache."""
        report = self.outcome.report or {}
        return sum(report[name] for name in ACCOUNT)

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
        self.memory_rates: list[float] = []
        self.probes: list[Phase] = []

    def look(self) -> None:
        """Called while the worker runs; measures once, or twice, when the worker is waiting."""
        if not Pauses.asked(self._out, len(self.rates)).exists():
            return
        clock = Clock(self._drive)
        files, seconds = weight_files(self._task.checkpoint), self._task.probe_seconds
        rate = measure_read_rate(files, seconds)
        if self._task.probe_bytes:
            into_memory = measure_read_rate(files, seconds, self._task.probe_bytes)
            self.memory_rates.append(into_memory.bytes_per_second)
        self.probes.append(clock.span())
        Pauses.answered(self._out, len(self.rates)).touch()
        self.rates.append(rate.bytes_per_second)

    def fill(self, outcome: Outcome) -> Outcome:
        """The outcome with what was measured."""
        return replace(outcome, probes=self.probes, probe_rates=self.rates, memory_rates=self.memory_rates)


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
    task: Task,
    limit: int | None,
    drive: Drive,
    *,
    grouped: bool = True,
    keep_page_cache: bool = True,
    seconds: float | None = None,
) -> Run:
    """Run one worker, `seconds` at most. Raises RunFailed, with the end of its output, when it fails.

    Not `grouped`: without a memory group, hence without a limit and with the page cache as it is. Its files, in a
    folder under the task's `scratch`, are removed whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="zinfer-benchmark-", dir=task.scratch) as folder:
        out = os.path.join(folder, "outcome.json")
        os.mkdir(scratch := os.path.join(folder, "scratch"))
        host = PauseHost(task, out, drive)
        command = replace(task, scratch=scratch).command(out)
        if grouped:
            usage = run_limited(
                command,
                limit,
                drive,
                keep_page_cache=keep_page_cache,
                meanwhile=host.look,
                seconds=seconds,
            )
        else:
            usage = run_free(command, drive, meanwhile=host.look, seconds=seconds)
        if (reason := failure(usage, seconds)) is not None:
            raise RunFailed(task.tool, reason, usage.tail)
        return Run(host.fill(read_outcome(out)), usage)


@dataclass
class Bench:
    """Runs workers one after the other, each on a machine as quiet as `patience` and `repeats` allow."""

    drive: Drive
    keep_page_cache: bool
    patience: float
    repeats: int
    seconds: float | None = None
    grouped: bool = True
    discarded: list[Run] = field(default_factory=list)

    def run(self, task: Task, limit: int | None, label: str = "") -> Run:
        """One run, which stderr calls `label`, or by its tool.

        One that neighbours disturbed is discarded and repeated, `repeats` times at most.
        What it measured plays no part in that; the last one is kept, disturbed or not. Raises RunFailed.
        """
        for attempt in range(self.repeats + 1):
            if self.patience:
                wait_until_quiet(self.drive, self.patience)
            run = run_one(
                task,
                limit,
                self.drive,
                grouped=self.grouped,
                keep_page_cache=self.keep_page_cache,
                seconds=self.seconds,
            )
            disturbed = " (disturbed)" if run.disturbed else ""
            sys.stderr.write(f"{label or task.tool}: {run.seconds_a_token:.3f} s a token{disturbed}\n")
            if not run.disturbed or attempt == self.repeats:
                break
            self.discarded.append(run)
        return run


def interleave(tools: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round: forwards, backwards, forwards ... so that no tool always goes first."""
    return [list(tools) if number % 2 == 0 else list(reversed(tools)) for number in range(rounds)]
