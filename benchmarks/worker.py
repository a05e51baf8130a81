"""One tool decoding one model, in a process of its own; the benchmarks start it and read its JSON.

Every tool runs through the same loop: load, first token (prefill), a rest and tokens in which it settles (none unless
asked for), a pause in which the drive's own rate is measured, one token that is not counted (it finds a window filled
during the pause), the counted tokens, and the drive's rate again. The measuring is the parent's (see bench.py): it
must not use memory of the tool's group. This module runs in the venvs of all tools, so it imports none of them and
not zinfer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.child import peak_bytes
from benchmarks.drive import Drive, Traffic, drive_of, process_traffic
from benchmarks.neighbours import own_cpu_seconds
from benchmarks.spans import Clock, Phase
from benchmarks.tools import Session

UNCOUNTED = 2  # new tokens: prefill's, and the one after the pause; those in which a tool settles come on top
SETTLED_SECONDS = 0.2  # without a byte read and next to no CPU used, the tool's look-ahead has come to rest
SETTLED_CPU = 0.1  # cores
SETTLE_LIMIT = 20.0
ANSWER_SECONDS = 0.02  # between two looks for the parent's answer


@dataclass(frozen=True)
class Task:
    """What a worker does.

    `tool`: a module of benchmarks/tools. `python`: of the tool's venv; None: this one. `batch`: sequences, see
    `rows`. `scratch`: a folder on the checkpoint's drive, for the tool's files. `converted`: the tool's own copy
    of the weights. `max_memory`: zinfer's budget in bytes, None for its default. `probe_seconds`: how long the
    parent measures the drive, before and after the counted tokens; 0: not at all. `probe_bytes`: memory that it
    reads into when it measures a second time; 0: no second time. `settling`: tokens between prefill and pause, in which
    residents come to stay. `varied`: each step is fed ids that were drawn, not those that were found: with random
    weights a greedy model repeats one. `uniform_routing`: the experts of each token and layer are drawn, each alike.
    `prefill`: tokens of another prompt, drawn, that a new sequence begins with in the end; 0: none.
    """

    tool: str
    checkpoint: str
    prompt: list[int]
    new_tokens: int
    threads: int
    batch: int = 1
    python: str | None = None
    scratch: str | None = None
    converted: str | None = None
    max_memory: int | None = None
    probe_seconds: float = 1.0
    probe_bytes: int = 0
    settling: int = 0
    varied: bool = False
    uniform_routing: bool = False
    prefill: int = 0

    @property
    def varied_ids(self) -> int:
        """Ids that are drawn lie below this."""
        return vocabulary_of(self.checkpoint)

    @property
    def rows(self) -> list[list[int]]:
        """The prompts of all sequences, each different: turned by one more id from row to row, then raised."""
        turns = [divmod(number, len(self.prompt)) for number in range(self.batch)]
        return [[token + up for token in self.prompt[by:] + self.prompt[:by]] for up, by in turns]

    def command(self, out: str) -> list[str]:
        """The command line of the worker that does this and writes its Outcome to `out`."""
        drive = json.dumps(asdict(drive_of(self.checkpoint)))
        return [
            self.python or sys.executable,
            "-m",
            "benchmarks.worker",
            json.dumps(asdict(self)),
            drive,
            out,
        ]


@dataclass
class Outcome:
    """Sizes in bytes, times in seconds, rates in bytes a second.

    `first_token` covers load and prefill: from the call that loads to the first token; `from_start` is from the
    process's start to there. `tokens_each` are the counted tokens; `tokens` the ids of a step, row by row, step
    after step. `probes`, `probe_rates` and, of reads into the task's `probe_bytes`, `memory_rates` are filled in by
    the parent. `engine_first_token` is the tool's own count of bytes for `first_token`, `resident` is weights in
    memory for good (zinfer only), `resident_each` the same after each token from the first pause on. `rested` is from
    the end of the first pause to the rest before the second, when the tool had read ahead what `read_ahead` says.
    `counts`: the tool's own, before and after the counted tokens, and before the `prefill` of another sequence.
    """

    tool: str
    versions: dict[str, str] = field(default_factory=dict)
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    from_start: float = 0.0
    first_token: Phase | None = None
    tokens_each: list[Phase] = field(default_factory=list)
    decode: Phase | None = None
    probes: list[Phase] = field(default_factory=list)
    probe_rates: list[float] = field(default_factory=list)
    memory_rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    process_peak: int = 0
    resident: int | None = None
    resident_each: list[int | None] = field(default_factory=list)
    rested: Phase | None = None
    read_ahead: list[int | None] = field(default_factory=list)
    counts: list[dict[str, float] | None] = field(default_factory=list)
    prefill: Phase | None = None
    engine_first_token: int | None = None
    report: dict[str, Any] | None = None


def weight_files(checkpoint: str) -> list[str]:
    """The checkpoint's safetensors files. Raises BenchmarkError where there are none."""
    files = sorted(glob(os.path.join(checkpoint, "*.safetensors")))
    if not files:
        raise BenchmarkError(f"{checkpoint}: no .safetensors file; make one with zinfer synth")
    return files


def vocabulary_of(checkpoint: str) -> int:
    """Ids of a model of text."""
    with open(os.path.join(checkpoint, "config.json"), encoding="utf-8") as file:
        return int(json.load(file)["vocab_size"])


class Pauses:
    """Asks the parent to measure the drive, by a file beside `out`, and waits for its answer.

    `asked` and `answered` name the files of pause `number`, for both sides.
    """

    def __init__(self, out: str) -> None:
        self._out, self._number, self._parent = out, 0, os.getppid()

    @staticmethod
    def asked(out: str, number: int) -> Path:
        """Appears when the tool has come to rest."""
        return Path(f"{out}.pause-{number}")

    @staticmethod
    def answered(out: str, number: int) -> Path:
        """Appears when the drive has been measured."""
        return Path(f"{out}.resume-{number}")

    def rest(self) -> None:
        """Wait until this process reads nothing and its threads rest."""
        deadline = time.monotonic() + SETTLE_LIMIT
        resting = False
        while not resting and time.monotonic() < deadline:
            read, used = process_traffic().read, own_cpu_seconds()
            time.sleep(SETTLED_SECONDS)
            used = own_cpu_seconds() - used
            resting = process_traffic().read == read and used < SETTLED_CPU * SETTLED_SECONDS

    def take(self) -> None:
        """Wait until the parent has measured."""
        self.asked(self._out, self._number).touch()
        while not self.answered(self._out, self._number).exists():
            if os.getppid() != self._parent:
                raise BenchmarkError("the benchmark that started this worker has ended")
            time.sleep(ANSWER_SECONDS)
        self._number += 1


def seconds_since_start() -> float:
    """Since this process was started, in steps of the kernel's clock tick (10 ms)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc_pid_stat(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def work(task: Task, drive: Drive, out: str) -> Outcome:
    """Do `task` in this process."""
    outcome = Outcome(task.tool)
    started = time.perf_counter()
    tool = importlib.import_module(f"benchmarks.tools.{task.tool}")
    load = tool.prepare(task)
    outcome.import_seconds = time.perf_counter() - started
    outcome.versions = {name: importlib.metadata.version(name) for name in tool.PACKAGES}
    outcome.versions["python"] = platform.python_version()
    clock = Clock(drive)
    session: Session = load()
    outcome.load_seconds = clock.span().seconds
    _decode(session, task, clock, Pauses(out) if task.probe_seconds else None, outcome)
    outcome.process_peak = peak_bytes(os.getpid())
    outcome.report = session.close()
    outcome.resident = (outcome.report or {}).get("resident_bytes")
    return outcome


def _decode(session: Session, task: Task, clock: Clock, pauses: Pauses | None, outcome: Outcome) -> None:
    dice, ids = random.Random(task.batch), task.varied_ids

    def step(rows: list[list[int]]) -> list[list[int]]:
        found = session.step(rows)
        outcome.tokens += found
        return [[dice.randrange(ids) if task.varied else token] for token in found]

    last = step(task.rows)
    outcome.first_token, outcome.from_start = clock.span(), seconds_since_start()
    outcome.engine_first_token = session.engine_bytes
    if pauses and task.settling:
        pauses.rest()  # until the memory is there of what is to stay
    for _ in range(task.settling):
        last = step(last)
    if pauses:
        pauses.rest()
        pauses.take()
    rested = Clock(clock.drive)
    outcome.read_ahead.append(session.read_ahead)
    last = step(last)
    outcome.resident_each.append(session.resident)
    outcome.counts.append(session.counts)
    whole = Clock(clock.drive)
    for _ in range(task.new_tokens - UNCOUNTED - task.settling):
        clock.restart()
        last = step(last)
        outcome.tokens_each.append(clock.span())
        outcome.resident_each.append(session.resident)
    outcome.decode = whole.span()
    outcome.counts.append(session.counts)
    if pauses:
        pauses.rest()
    outcome.rested = rested.span()
    outcome.read_ahead.append(session.read_ahead)
    if pauses:
        pauses.take()
    if task.prefill:
        session.restart()
        outcome.counts.append(session.counts)
        clock.restart()
        session.step([[dice.randrange(ids) for _ in range(task.prefill)]])
        outcome.prefill = clock.span()


def read_outcome(path: str) -> Outcome:
    """What a worker wrote."""
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)

    def phase(value: dict[str, Any]) -> Phase:
        return Phase(
            value["seconds"], Traffic(**value["drive"]), Traffic(**value["process"]), value["foreign_cpu"]
        )

    for key in ("tokens_each", "probes"):
        fields[key] = [phase(value) for value in fields[key]]
    single = [key for key in ("first_token", "decode", "rested", "prefill") if fields[key] is not None]
    return Outcome(**{**fields, **{key: phase(fields[key]) for key in single}})


def main(arguments: Sequence[str]) -> None:
    """Do the task in `arguments[0]`; for the benchmarks only."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker", description="Internal: see bench.py."
    )
    parser.add_argument("task")
    parser.add_argument("drive")
    parser.add_argument("out")
    options = parser.parse_args(arguments)
    outcome = work(Task(**json.loads(options.task)), Drive(**json.loads(options.drive)), options.out)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(asdict(outcome), file)


if __name__ == "__main__":
    main(sys.argv[1:])
