"""The tests in tests/gpu, in processes of their own that run while something else is made ready."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from benchmarks.gpu_figures import LATE, Outcome
from benchmarks.gpu_process import end_group, started
from benchmarks.report import cores

MOST_PROCESSES = 4
MOST_ALONE = 60.0  # seconds for a stage that others come after
Stage = Sequence[Sequence[str]]  # arguments of pytest, for each process


def all_tests() -> list[Stage]:
    """Those that need most of a card's memory, then those that several processes can share it for.

    In this order, and with the most telling ones of each file first, because the last ones may find no time.
    """
    count = max(1, min(MOST_PROCESSES, cores() // 2))
    shared = [["tests/gpu/test_gpu.py", "--share", f"{number + 1}/{count}"] for number in range(count)]
    return [[["tests/gpu/test_gpu_memory.py"]], shared]


def counted(name: str, text: str, wrong: str) -> Outcome:
    """What pytest's verbose output `text` tells of the tests of one process, which may have been ended; pure."""
    found = re.search(
        r"^collect(?:ed|ing \.\.\. collected) (\d+) items?(?:.* (\d+) selected)?", text, re.MULTILINE
    )
    all_of_them = int(found[2] or found[1]) if found else 0
    # An error in a fixture after a test that passed is another outcome of the same test.
    outcomes = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE))
    many = Counter(outcomes.values())
    passed, skipped = many["PASSED"], many["SKIPPED"]
    failed = many["FAILED"] + many["ERROR"]
    return Outcome(name, passed, failed, skipped, max(0, all_of_them - passed - failed - skipped), wrong)


class GpuTests:
    """Runs `stages`, one after the other, the first one from now on; end() has to be called."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._running: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []
        self._files = ExitStack()
        self._next()

    def _next(self) -> None:
        self._running = []
        for arguments in self._stages.pop(0):
            out = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (end() closes it)
            # Warnings are libraries' own here, and the plugins that pytest's settings name may not be installed.
            command = [sys.executable, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider"]
            # Several processes share the cores, and tiny models need few.
            process = started([*command, *arguments], out, {"OMP_NUM_THREADS": "2"})
            self._running.append((" ".join(arguments), process, out))

    def outcomes(self, end: float) -> list[Outcome]:
        """What came of each process; those that are not done at `end` (time.monotonic) are ended.

        Their output goes to stderr where it is not all good.
        """
        found = self._stage(end)
        while self._stages:
            self._next()
            found += self._stage(end)
        return found

    def _stage(self, end: float) -> list[Outcome]:
        if self._stages:  # one that hangs is not to cost those after it all their time
            end = min(end, time.monotonic() + MOST_ALONE)
        found = []
        for name, process, out in self._running:
            try:
                outcome = f"exit code {process.wait(max(0.0, end - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                outcome = LATE
                end_group(process)
            out.seek(0)
            text = out.read().decode(errors="replace").strip()
            last = text.splitlines()[-1] if text else "nothing was printed"
            good = outcome == "exit code 0"
            if not good:
                sys.stderr.write(f"{text}\n")
            sys.stderr.write(f"GPU tests, {name}: {last}\n")
            found.append(counted(name, text, "" if good else f"{outcome}: {last}"))
        return found

    def end(self) -> None:
        """End those that run still."""
        for _, process, _ in self._running:
            end_group(process)
        self._files.close()
