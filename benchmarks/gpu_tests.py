"""The tests in tests/gpu, in processes of their own that run while something else is made ready."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

# Two processes, as one alone would take as long as all the rest.
SELECTED = ("bfloat16", "not bfloat16")


class GpuTests:
    """Starts them at once, each process with the tests that one of `selected` selects; end() has to be called."""

    def __init__(self, selected: Sequence[str] = SELECTED, path: str = "tests/gpu") -> None:
        self._running: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []
        self._files = ExitStack()
        for wanted in selected:
            out = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (end() closes it)
            # Warnings are libraries' own here, and the plugins that pytest's settings name may not be installed.
            command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
            process = subprocess.Popen([*command, "-k", wanted, path], stdout=out, stderr=subprocess.STDOUT)
            self._running.append((wanted, process, out))

    def failed(self, seconds: float) -> list[str]:
        """A line for each process that did not pass, or is not done after `seconds`; their output goes to stderr."""
        deadline, failed = time.monotonic() + seconds, []
        for wanted, process, out in self._running:
            try:
                outcome = f"exit code {process.wait(max(0.0, deadline - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                outcome = f"not done after {seconds:.0f} s"
            out.seek(0)
            text = out.read().decode(errors="replace").strip()
            last = text.splitlines()[-1] if text else "nothing was printed"
            if outcome != "exit code 0":
                sys.stderr.write(f"{text}\n")
                failed.append(f"{wanted}: {outcome}: {last}")
            sys.stderr.write(f"GPU tests, {wanted}: {last}\n")
        return failed

    def end(self) -> None:
        """End those that run still."""
        for _, process, _ in self._running:
            process.kill()
            process.wait()
        self._files.close()
