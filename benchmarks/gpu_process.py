"""The parts of benchmarks.gpu as processes: what they tell each other, how long each has, and their end."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any

from benchmarks.child import ROOT
from benchmarks.gpu_figures import Findings

DYING_SECONDS = 15.0  # a process that has tens of GB page-locked takes its time to end


@dataclass
class State:
    """The command line's options, and what was found so far: in a file, written anew after each figure.

    One process at a time writes it: the part that runs, else the one that starts them.
    """

    options: dict[str, Any]
    found: Findings

    def save(self, path: str) -> None:
        """Write it; whoever is ended meanwhile leaves the file that was there."""
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            pickle.dump(self, file)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str) -> State:
        """What was saved last."""
        with open(path, "rb") as file:
            state: State = pickle.load(file)
        return state


def ends(now: float, end: float, reserved: Mapping[str, float]) -> dict[str, float]:
    """When each part is ended, so that those after it have at least what is `reserved` for them; pure.

    Where there is less time between `now` and `end` than all of it, each has its share.
    """
    scale = min(1.0, max(0.0, end - now) / sum(reserved.values()))
    later = list(accumulate(reversed(list(reserved.values())), initial=0.0))[:-1]
    return {name: end - scale * after for name, after in zip(reserved, reversed(later), strict=True)}


class PartProcess:
    """The part `name` of `python -m benchmarks.gpu_part`, started at once; wait() has to be called.

    `path`: the State's. It is ended at `end` (time.monotonic), with all that it has started.
    """

    def __init__(self, path: str, name: str, end: float) -> None:
        self._end = end
        self._begun = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_part", path, name, repr(end)]
        self._process = started(command)

    def wait(self) -> str:
        """Returns when it has ended; why that was not well, or nothing."""
        try:
            code = self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"ended after {time.monotonic() - self._begun:.0f} s, its share of the time"
        finally:
            end_group(self._process)
        return f"ended with exit code {code}" if code else ""


def started(
    command: list[str], stdout: int | IO[bytes] = 2, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process of this program's, in a group of its own; what it prints goes to `stdout`, by default to stderr."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        start_new_session=True,
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End `process`, which started() started, and what it has started, if they run still."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DYING_SECONDS)
