"""Ask DeepNVMe's `aio_handle`, which lives in another venv, to move a file."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import BenchmarkError
from zinfer.aio_bench.measurement import Trial
from zinfer.aio_bench.target import Target

WORKER = Path(__file__).with_name("aio_handle_worker.py")
BLOCKS, DEPTHS, THREADS = (1 << 20, 8 << 20), (8, 32), (1, 2, 4)


@dataclass(frozen=True)
class HandleSetting:
    """Of an `aio_handle`: bytes of one operation, operations in flight of a thread, threads."""

    block_bytes: int
    depth: int
    threads: int

    def text(self) -> str:
        """For a table."""
        return f"block {self.block_bytes >> 20} MiB, queue depth {self.depth}, {self.threads} thread(s)"


class AioHandle(AbstractContextManager["AioHandle"]):
    """The worker process; `version` is deepspeed's. Ended, and waited for, on exit.

    Raises BenchmarkError when it fails.
    """

    def __init__(self, python: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        # The op is compiled at first use, with what lies beside that Python.
        path = os.pathsep.join([os.path.dirname(os.path.abspath(python)), os.environ.get("PATH", "")])
        self._process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PATH": path},
        )
        try:
            self.version = str(self._answer()["version"])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def use(self, target: Target, setting: HandleSetting, buffer_bytes: int) -> None:
        """Make a handle of `setting`, and a page-locked tensor of `buffer_bytes`, for `target`."""
        self._ask(path=target.path, size=target.size, buffer_bytes=buffer_bytes, **vars(setting))

    def run(self, direction: str, seconds: float) -> Trial:
        """Move the file for about `seconds`."""
        told = self._ask(direction=direction, seconds=seconds)
        return Trial(told["nbytes"], told["seconds"], told["cpu_seconds"], {})

    def best(self, target: Target, direction: str, buffer_bytes: int, seconds: float) -> HandleSetting:
        """The fastest of a small grid, each tried once: the peer is shown at its best."""
        rates = {}
        for values in product(BLOCKS, DEPTHS, THREADS):
            self.use(target, setting := HandleSetting(*values), buffer_bytes)
            rates[setting] = self.run(direction, seconds).rate
        return max(rates, key=rates.__getitem__)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").strip().splitlines()[-3:]
        raise BenchmarkError(f"DeepNVMe's worker ended ({self._process.returncode}): {' | '.join(tail)}")
