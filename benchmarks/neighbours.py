"""What other processes do to the machine while a benchmark runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.drive import Drive

QUIET_CPU = 0.1  # of one core, used by all processes together
QUIET_READ = 20e6  # bytes a second
LOOK_SECONDS = 2.0


def all_cpu_seconds() -> float:
    """CPU time that all processes, the kernel's and other guests' included, have taken since boot."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    interrupts_and_steal = rest[:3]
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


def own_cpu_seconds() -> float:
    """CPU time that this process has taken."""
    times = os.times()
    return times.user + times.system


def wait_until_quiet(drive: Drive, patience: float) -> bool:
    """Wait at most `patience` seconds for two in which nobody uses CPU or drive; whether they came."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        cpu, read = all_cpu_seconds(), drive.traffic().read
        time.sleep(LOOK_SECONDS)
        used, moved = all_cpu_seconds() - cpu, drive.traffic().read - read
        if used < QUIET_CPU * LOOK_SECONDS and moved < QUIET_READ * LOOK_SECONDS:
            return True
    return False
