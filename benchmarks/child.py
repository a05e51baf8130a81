"""Run one process to its end, sampling something meanwhile."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1
TAIL_CHARACTERS = 4000
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How the process ended, the largest sample (0 if it never gave one), and the end of its output."""

    exit_code: int
    peak: int
    seconds: float
    tail: str


def run_sampled(
    command: Sequence[str], sample: Callable[[int], int], *, seconds: float | None = None
) -> Ended:
    """Run `command` from the repository's root; `sample(pid)` is called ten times a second.

    The process is killed after `seconds`, if given; and killed and waited for should anything, Ctrl-C
    included, end this call early.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    peak, started = 0, time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
        try:
            while process.poll() is None:
                peak = max(peak, sample(process.pid))
                if seconds is not None and time.perf_counter() - started >= seconds:
                    break
                try:
                    process.wait(SAMPLE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
        taken = time.perf_counter() - started
        output.seek(0)
        tail = output.read().decode(errors="replace")[-TAIL_CHARACTERS:]
    return Ended(process.returncode, peak, taken, tail)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process now, huge pages included; 0 once it has ended."""
    return _status_bytes(pid, "RssAnon:")


def peak_bytes(pid: int) -> int:
    """The most resident memory a process has had, in bytes; 0 once it has ended."""
    return _status_bytes(pid, "VmHWM:")


def _status_bytes(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
