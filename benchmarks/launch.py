"""Workers in processes of their own without a memory limit, one after the other, on a machine as quiet as it gets."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from benchmarks import BenchmarkError, spans
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import Drive
from benchmarks.neighbours import wait_until_quiet
from benchmarks.worker import Outcome, Task, read_outcome


@dataclass(frozen=True)
class Measured:
    """One worker's outcome and what follows from it."""

    outcome: Outcome

    @property
    def seconds_a_token(self) -> float:
        """Median over the counted tokens."""
        return median(token.seconds for token in self.outcome.tokens_each)

    @property
    def bytes_a_token(self) -> float:
        """Median bytes that the process had the drive read for a counted token."""
        return median(token.process.read for token in self.outcome.tokens_each)

    @property
    def watched(self) -> list[spans.Phase]:
        """The spans in which neighbours would falsify the figures: the counted tokens and the probes."""
        assert self.outcome.decode is not None
        return [self.outcome.decode, *self.outcome.probes]

    @property
    def disturbed(self) -> bool:
        """Whether neighbours used so much of drive or CPU that the figures are not the tool's own."""
        return spans.disturbed(self.watched)


Kind = TypeVar("Kind", bound=Measured)


@dataclass(frozen=True)
class Launched(Measured):
    """A worker without a memory limit. `anonymous`: its peak anonymous memory in bytes, sampled from outside."""

    anonymous: int


def launch(task: Task) -> Launched:
    """Run one worker to its end. Raises BenchmarkError, with the end of its output, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "outcome.json")
        ended = run_sampled(task.command(out), anonymous_bytes)
        if ended.exit_code != 0:
            raise BenchmarkError(
                f"{task.tool} with {task.checkpoint} failed with exit code {ended.exit_code}:\n{ended.tail}"
            )
        return Launched(read_outcome(out), ended.peak)


def run_quietly(
    label: str,
    once: Callable[[], Kind],
    drive: Drive,
    patience: float,
    repeats: int,
    discarded: list[Kind],
) -> Kind:
    """What `once` measures; a run that neighbours disturbed is discarded and repeated, `repeats` times at most.

    What it measured plays no part in that; the last one is kept, disturbed or not. `patience`: seconds to wait,
    before each run, for a quiet machine. `label` names the run on stderr.
    """
    for attempt in range(repeats + 1):
        if patience:
            wait_until_quiet(drive, patience)
        run = once()
        disturbed = " (disturbed)" if run.disturbed else ""
        sys.stderr.write(f"{label}: {run.seconds_a_token:.3f} s a token{disturbed}\n")
        if not run.disturbed or attempt == repeats:
            break
        discarded.append(run)
    return run


@dataclass
class Launcher:
    """Launches workers one after the other, each on a machine as quiet as `patience` and `repeats` allow."""

    drive: Drive
    patience: float
    repeats: int
    discarded: list[Launched] = field(default_factory=list)

    def run(self, label: str, task: Task) -> Launched:
        """See run_quietly."""
        return run_quietly(
            label, lambda: launch(task), self.drive, self.patience, self.repeats, self.discarded
        )
