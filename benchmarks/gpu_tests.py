"""The tests in tests/gpu, in processes of their own that run while something else is made ready."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from benchmarks.gpu_process import end_group, started
from benchmarks.report import cores

MOST_PROCESSES = 4
Stage = Sequence[Sequence[str]]  # arguments of pytest, for each process


def all_tests() -> list[Stage]:
    """Those that several processes can share a card for, then those that need most of its memory."""
    count = max(1, min(MOST_PROCESSES, cores() // 2))
    shared = [["tests/gpu/test_gpu.py", "--share", f"{number + 1}/{count}"] for number in range(count)]
    return [shared, [["tests/gpu/test_gpu_memory.py"]]]


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
            command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
            # Several processes share the cores, and tiny models need few.
            process = started([*command, *arguments], out, {"OMP_NUM_THREADS": "2"})
            self._running.append((" ".join(arguments), process, out))

    def failed(self, end: float) -> list[str]:
        """A line for each process that did not pass, or is not done at `end` (time.monotonic).

        Their output goes to stderr.
        """
        failed = self._stage(end)
        while self._stages:
            self._next()
            failed += self._stage(end)
        return failed

    def _stage(self, end: float) -> list[str]:
        failed = []
        for name, process, out in self._running:
            try:
                outcome = f"exit code {process.wait(max(0.0, end - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                outcome = "not done when its time was over"
                end_group(process)
            out.seek(0)
            text = out.read().decode(errors="replace").strip()
            last = text.splitlines()[-1] if text else "nothing was printed"
            if outcome != "exit code 0":
                sys.stderr.write(f"{text}\n")
                failed.append(f"{name}: {outcome}: {last}")
            sys.stderr.write(f"GPU tests, {name}: {last}\n")
        return failed

    def end(self) -> None:
        """End those that run still."""
        for _, process, _ in self._running:
            end_group(process)
        self._files.close()
