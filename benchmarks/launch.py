"""Workers in processes of their own without a memory limit, one after the other, on a machine as quiet as it gets."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from statistics import median

from benchmarks import BenchmarkError, spans
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import Drive
from benchmarks.neighbours import wait_until_quiet
from benchmarks.worker import Outcome, Task, read_outcome


@dataclass(frozen=True)
class Launched:
    """One worker's outcome, and its peak anonymous memory in bytes as sampled from outside."""

    outcome: Outcome
    anonymous: int

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


@dataclass
class Launcher:
    """Launches; a run that neighbours disturbed is discarded and repeated, `repeats` times at most.

    What it measured plays no part in that; the last one is kept, disturbed or not. `patience`: seconds to wait,
    before each run, for a quiet machine.
    """

    drive: Drive
    patience: float
    repeats: int
    discarded: list[Launched] = field(default_factory=list)

    def run(self, label: str, task: Task) -> Launched:
        """One run of `task`, told to stderr as `label`."""
        for attempt in range(self.repeats + 1):
            if self.patience:
                wait_until_quiet(self.drive, self.patience)
            run = launch(task)
            disturbed = " (disturbed)" if run.disturbed else ""
            sys.stderr.write(f"{label}: {run.seconds_a_token:.3f} s a token{disturbed}\n")
            if not run.disturbed or attempt == self.repeats:
                break
            self.discarded.append(run)
        return run
