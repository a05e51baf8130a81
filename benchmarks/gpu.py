"""What zinfer does with a GPU: tests, streaming beside plain copies and reads, decode, prefill, memory, stress.

    python -m benchmarks.gpu --folder DIR

Synthesises a model of some 42 GB under --folder, which is removed again. `make gpu-check` builds zinfer first.
Without a GPU it refuses; --staged tries the benchmark itself, on a pretended one.

Each part runs in a process of its own (gpu_part.py), which is ended when its time is over: what it had measured by then
counts. This process never computes on the card, as whatever it took there would count as others' memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.drive import Drive, drive_of
from benchmarks.gpu_card import refuse_without_gpu
from benchmarks.gpu_figures import (
    Findings,
    decode_table,
    prefill_table,
    remarks,
    requirements,
    table_of_tests,
)
from benchmarks.gpu_process import PartProcess, State, ends
from benchmarks.gpu_tests import GpuTests, all_tests
from benchmarks.report import RESULTS, Result, conclude, main_of
from zinfer.planner.memory import parse_size

FULL: dict[str, Any] = {
    "hidden": 8192,
    "intermediate": 28672,
    "layers": 24,
    "vocabulary": 32000,
    "device_memory": "12GiB",
    "offload": "cpu",
    "drive_layers": 4,
    "drive_device_memory": "3GiB",
    "drive_host_memory": "2GiB",
    "stress_hidden": 1024,
    "batches": [1, 8, 16, 32, 48, 64, 96, 128],
    "prompt": 512,
    "decode_batches": [1, 64],
    "rounds": 3,
    "tokens": 4,
    "sweeps": 1000,
    "seconds": 1.0,
}
TINY: dict[str, Any] = FULL | {
    "hidden": 256,
    "intermediate": 688,
    "layers": 6,
    "vocabulary": 512,
    "device_memory": "3MiB",
    "drive_device_memory": "2MiB",
    "drive_host_memory": "2MiB",
    "stress_hidden": 128,
    "batches": [1, 2],
    "prompt": 8,
    "decode_batches": [1, 2],
    "rounds": 2,
    "tokens": 2,
    "sweeps": 20,
    "seconds": 0.01,
}
HELP = {
    "device_memory": "zinfer's max_memory[0], less than a third of the model",
    "offload": "of the model in host memory; with 'nvme' weights may leave the device for caches",
    "layers": "of the model; fewer are taken where drive or host memory have no room",
    "drive_layers": "of the model as it streams from the drive",
    "drive_device_memory": "max_memory[0] there",
    "drive_host_memory": "max_memory['cpu'] there",
    "stress_hidden": "width of the model whose memory is poisoned",
    "batches": "of the prefill, rising; the first that does not fit ends it",
    "sweeps": "of the model whose memory is poisoned",
    "tokens": "that count, in each round",
    "seconds": "that each yardstick takes",
}
# Seconds that each part gets at least, in the order in which they run; what one leaves is the next ones'. The tests run
# while the model is made. The last one, which is no requirement, gets what is left.
RESERVED = {"model": 100.0, "card": 60.0, "stress": 45.0, "drive": 50.0, "host": 130.0}
LAST, LEAST_LAST = "sanitizer", 25.0
MINUTES = 7.4  # ending what runs, tables and removing the model come after
Start = Callable[[str, str, float], Any]


def slug(name: str) -> str:
    """`name` as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", required=True, help="where the models are made and removed (some 42 GB)")
    parser.add_argument(
        "--staged", action="store_true", help="try the benchmark, tiny, on a pretended device"
    )
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    parser.add_argument("--without-tests", action="store_true", help="leave the tests in tests/gpu out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which all that runs is ended")
    parser.add_argument(
        "--started", type=float, help="when those minutes began (seconds since 1970); default: now"
    )
    parser.add_argument("--json", help="file to write; default: in benchmarks/results, named after the card")
    for name, value in FULL.items():
        kind = type(value[0] if isinstance(value, list) else value)
        count = "+" if isinstance(value, list) else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs=count, help=HELP.get(name))
    staged = parser.parse_args(arguments).staged
    parser.set_defaults(**(TINY if staged else FULL))
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.minutes <= 0:
        parser.error("--seconds and --minutes are more than 0")
    if 1 not in options.decode_batches:
        parser.error("--decode-batches has to have 1, which is held against plain copies")
    options.folder = os.path.abspath(options.folder)
    return options


class Check:
    """One run of everything: parts, each in a process that `start` starts; `found` grows with each that ends.

    `start`, by default PartProcess, takes the file that parts tell each other by, the part's name, and when it is
    ended, by time.monotonic.
    """

    def __init__(self, options: argparse.Namespace, start: Start | None = None) -> None:
        passed = time.time() - options.started if options.started else 0.0
        self.end = time.monotonic() + 60 * options.minutes - passed
        self._ends = ends(time.monotonic(), self.end, RESERVED)
        self._start = start or PartProcess
        self.options = options
        self.found = Findings(
            parse_size(options.device_memory), options.sweeps, decode_batches=options.decode_batches
        )

    def run(self) -> None:
        """Everything, in the order of what is needed for what comes next."""
        with ExitStack() as closing:
            folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-"))
            if not self.options.keep:
                closing.callback(remove_new, self.options.folder, set(os.listdir(self.options.folder)))
            path = os.path.join(folder, "state")
            State(vars(self.options), self.found).save(path)
            self._parts(path)

    def _parts(self, path: str) -> None:
        tests = None if self.options.without_tests else GpuTests(all_tests())
        try:
            making = self._start(path, "model", self._ends["model"])
            outcomes = None if tests is None else tests.outcomes(self._ends["model"])
            self._ended(path, "model", making)
        finally:
            if tests is not None:
                tests.end()
        self.found.tests = outcomes
        State(vars(self.options), self.found).save(path)
        for name in list(RESERVED)[1:]:
            self._run(path, name, self._ends[name])
        if not self.options.staged and self.end - time.monotonic() > LEAST_LAST:
            self._run(path, LAST, self.end)

    def _run(self, path: str, name: str, end: float) -> None:
        if time.monotonic() >= end:
            self._failed(path, f"{name}: not measured, as no time was left")
            return
        sys.stderr.write(f"{name} ({end - time.monotonic():.0f} s left for it)\n")
        self._ended(path, name, self._start(path, name, end))

    def _ended(self, path: str, name: str, running: Any) -> None:
        """Wait for the end of a part, and take over what it has found."""
        reason = running.wait()
        self.found = State.load(path).found
        if reason:
            self._failed(path, f"{name}: {reason}")

    def _failed(self, path: str, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        self.found.failed.append(line)
        State(vars(self.options), self.found).save(path)


def remove_new(folder: str, before: set[str]) -> None:
    """Remove what is in `folder` and was not `before`: models, and what is left of one whose making was ended."""
    for name in set(os.listdir(folder)) - before:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _drive(folder: str) -> Drive | None:
    try:
        return drive_of(folder)
    except (BenchmarkError, OSError):
        return None


def main(arguments: Sequence[str]) -> int:
    """Run everything that there is time for; 0 when every requirement is met."""
    options = _parse(arguments)
    load = os.getloadavg()[0]
    if not options.staged:
        refuse_without_gpu()
    os.makedirs(options.folder, exist_ok=True)
    check = Check(options)
    check.run()
    name = str(RESULTS / f"gpu-{slug(check.found.card)}.json")
    return conclude(_result(check, load), "benchmarks.gpu", arguments, options.json or name)


def _result(check: Check, load: float) -> Result:
    found, options = check.found, check.options
    introduction = (
        f"A Llama-shaped model of width {options.hidden} with {found.layers} layers, "
        f"{found.model_bytes / 1e9:.2f} GB in bf16, {found.model_bytes / found.budget:.2f} times the device's budget "
        f"of {found.budget / 2**30:.2f} GiB; its weights in host memory, or, with {options.drive_layers} layers, on "
        f"the drive. Medians and ranges over {options.rounds} rounds of {options.tokens} tokens, with plain copies, or "
        "reads of the same files, before and after each."
    )
    notes = "\n".join(f"- {line}" for line in remarks(found))
    texts = (introduction, decode_table(found), prefill_table(found), table_of_tests(found), notes)
    plain = asdict(found)
    decoded = [{"from": "host", **part} for part in plain.pop("from_host")]
    return Result(
        name="gpu",
        drive=_drive(options.folder),
        settings={**vars(options), "device_memory": found.budget, "layers": found.layers},
        rounds=[*decoded, {"from": "drive", "batch": 1, "rounds": plain.pop("from_drive")}],
        figures=plain,
        requirements=requirements(found),
        body="\n\n".join(text for text in texts if text),
        load_average=load,
        machine=found.facts,
    )


if __name__ == "__main__":
    main_of(main)
