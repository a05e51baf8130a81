"""One tool decoding one model, in a process of its own; the benchmarks start it and read its JSON.

Every tool runs through the same loop: load, first token (prefill), a pause in which the drive's own rate
is measured, one token that is not counted (it finds a window filled during the pause), the counted
tokens, and the drive's rate again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from glob import glob
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.child import ROOT
from benchmarks.drive import Drive, Traffic, drive_of, process_traffic
from benchmarks.neighbours import all_cpu_seconds, own_cpu_seconds

TOOLS = ("zinfer", "accelerate", "memory")
SETTLED_SECONDS = 0.2  # without a byte read, the tool's look-ahead has come to rest
SETTLE_LIMIT = 10.0


@dataclass(frozen=True)
class Task:
    """What a worker does.

    `scratch`: a folder on the checkpoint's drive, for a peer's files. `max_memory`: zinfer's budget in bytes,
    None for its default. `probe_seconds`: how long to measure the drive, before and after the counted tokens;
    0: not at all.
    """

    tool: str
    checkpoint: str
    prompt: list[int]
    new_tokens: int
    threads: int
    scratch: str | None = None
    max_memory: int | None = None
    probe_seconds: float = 1.0

    def command(self, out: str) -> list[str]:
        """The command line of the worker that does this and writes its Outcome to `out`."""
        return [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(self)), out]


@dataclass
class Phase:
    """A span of the run: seconds, what the whole drive moved, and what this process had it move.

    `foreign_cpu` are the CPU seconds that all other processes, the kernel's included, took meanwhile.
    """

    seconds: float
    drive: Traffic
    process: Traffic
    foreign_cpu: float


@dataclass
class Outcome:
    """Sizes in bytes, times in seconds, rates in bytes a second.

    `first_token` covers load and prefill: from the call that loads to the first token. `tokens_each` are
    the counted tokens. `engine_first_token` is the engine's own count for that span (zinfer only).
    """

    tool: str
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    first_token: Phase | None = None
    tokens_each: list[Phase] = field(default_factory=list)
    decode: Phase | None = None
    probes: list[Phase] = field(default_factory=list)
    probe_rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    process_peak: int = 0
    resident: int | None = None
    engine_first_token: int | None = None
    report: dict[str, Any] | None = None


def weight_files(checkpoint: str) -> list[str]:
    """The checkpoint's safetensors files. Raises BenchmarkError where there are none."""
    files = sorted(glob(os.path.join(checkpoint, "*.safetensors")))
    if not files:
        raise BenchmarkError(f"{checkpoint}: no .safetensors file; make one with zinfer synth")
    return files


class Clock:
    """Measures spans: time, the drive's traffic and this process's."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.restart()

    def restart(self) -> None:
        """Begin a span now."""
        self._started = time.perf_counter()
        self._drive_before, self._process_before = self.drive.traffic(), process_traffic()
        self._foreign_before = all_cpu_seconds() - own_cpu_seconds()

    def span(self) -> Phase:
        """What happened since the start of the span, which goes on."""
        return Phase(
            time.perf_counter() - self._started,
            self.drive.traffic() - self._drive_before,
            process_traffic() - self._process_before,
            all_cpu_seconds() - own_cpu_seconds() - self._foreign_before,
        )


def work(task: Task) -> Outcome:
    """Do `task` in this process."""
    outcome = Outcome(task.tool)
    started = time.perf_counter()
    import torch

    from zinfer.planner.memory import process_peak

    load = _loader(task)
    outcome.import_seconds = time.perf_counter() - started
    torch.set_num_threads(task.threads)
    clock = Clock(drive_of(task.checkpoint))
    model = load()
    outcome.load_seconds = clock.span().seconds
    with torch.no_grad():
        _decode(model, task, clock, outcome)
    outcome.process_peak = process_peak()
    if task.tool == "zinfer":
        report = model.zinfer.report()
        outcome.resident, outcome.report = report.resident_bytes, report.as_dict()
        model.zinfer.close()
    return outcome


def _decode(model: Any, task: Task, clock: Clock, outcome: Outcome) -> None:
    """Greedy decoding of one sequence, the key-value cache kept by the model's own code."""
    import torch

    cache: Any = None

    def step(ids: list[int]) -> int:
        nonlocal cache
        result = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        return int(result.logits[0, -1].argmax())

    outcome.tokens.append(step(task.prompt))
    outcome.first_token = clock.span()
    if task.tool == "zinfer":
        outcome.engine_first_token = model.zinfer.bytes_read
    _probe(task, clock, outcome)
    outcome.tokens.append(step(outcome.tokens[-1:]))
    whole = Clock(clock.drive)
    for _ in range(task.new_tokens - 2):
        clock.restart()
        outcome.tokens.append(step(outcome.tokens[-1:]))
        outcome.tokens_each.append(clock.span())
    outcome.decode = whole.span()
    _probe(task, clock, outcome)


def _probe(task: Task, clock: Clock, outcome: Outcome) -> None:
    """Wait until this process reads nothing, then measure what plain direct reads reach."""
    if not task.probe_seconds:
        return
    from zinfer.aio.probe import measure_read_rate

    deadline = time.monotonic() + SETTLE_LIMIT
    seen = -1
    while (now := process_traffic().read) != seen and time.monotonic() < deadline:
        seen = now
        time.sleep(SETTLED_SECONDS)
    clock.restart()
    rate = measure_read_rate(weight_files(task.checkpoint), task.probe_seconds)
    outcome.probe_rates.append(rate.bytes_per_second)
    outcome.probes.append(clock.span())


def _loader(task: Task) -> Callable[[], Any]:
    """What loads the model, its packages imported already."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if task.tool == "zinfer":
        import zinfer

        limit = {"cpu": task.max_memory} if task.max_memory else None
        return lambda: zinfer.run(task.checkpoint, offload="nvme", max_memory=limit)
    if task.tool == "memory":
        return lambda: transformers.AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto").eval()
    import accelerate  # noqa: F401  # so that its import is not counted as loading

    return lambda: transformers.AutoModelForCausalLM.from_pretrained(
        task.checkpoint, dtype="auto", device_map=disk_map(task.checkpoint), offload_folder=task.scratch
    ).eval()


def disk_map(checkpoint: str) -> dict[str, str]:
    """A device_map with every layer on "disk" and all else (embeddings, norm, head) on "cpu"."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    places: dict[str, str] = {}
    for name, child in model.named_children():
        parts = list(child.named_children()) if name == model.base_model_prefix else []
        for inner, part in parts:
            if isinstance(part, torch.nn.ModuleList):
                places |= {f"{name}.{inner}.{index}": "disk" for index in range(len(part))}
            else:
                places[f"{name}.{inner}"] = "cpu"
        if not parts:
            places[name] = "cpu"
    if "disk" not in places.values():
        raise BenchmarkError(f"{type(model).__name__}: no list of layers found to put on the disk")
    return places


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
    return Outcome(**{**fields, **{key: phase(fields[key]) for key in ("first_token", "decode")}})


def main(arguments: Sequence[str]) -> None:
    """Do the task in `arguments[0]`; for the benchmarks only."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker", description="Internal: see decode.py."
    )
    parser.add_argument("task")
    parser.add_argument("out")
    options = parser.parse_args(arguments)
    task = Task(**json.loads(options.task))
    if task.tool == "accelerate":
        parent = task.scratch or str(ROOT)
        scratch = tempfile.mkdtemp(prefix="offload-", dir=parent)
        try:
            outcome = work(Task(**{**asdict(task), "scratch": scratch}))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    else:
        outcome = work(task)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(asdict(outcome), file)


if __name__ == "__main__":
    main(sys.argv[1:])
