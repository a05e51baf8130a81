"""One tool decoding one model, in a process of its own; the benchmarks start it and read its JSON.

Every tool runs through the same loop: load, first token (prefill), then stretches, each of a pause in which
the drive's own rate is measured, one token that is not counted (it finds a window filled during the pause)
and counted tokens; and the drive's rate once more.
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
from benchmarks.drive import Traffic, drive_of, process_traffic
from benchmarks.spans import Clock, Phase

TOOLS = ("zinfer", "accelerate", "memory")
SETTLED_SECONDS = 0.2  # without a byte read, the tool's look-ahead has come to rest
SETTLE_LIMIT = 10.0


@dataclass(frozen=True)
class Task:
    """What a worker does.

    `scratch`: a folder on the checkpoint's drive, for a peer's files. `max_memory`: zinfer's budget in bytes,
    None for its default. `probe_seconds`: how long to measure the drive in each pause; 0: not at all.
    `probe_bytes`: memory that a second such measurement reads into; 0: no second one. `stretches`: of counted
    tokens, with a pause before, between and after them. `batch`: sequences, see `rows`. `copied`: the tool
    "memory" copies its weights out of the checkpoint's mapping, whose pages the kernel may drop.
    """

    tool: str
    checkpoint: str
    prompt: list[int]
    new_tokens: int
    threads: int
    scratch: str | None = None
    max_memory: int | None = None
    probe_seconds: float = 1.0
    probe_bytes: int = 0
    stretches: int = 1
    batch: int = 1
    copied: bool = False

    @property
    def rows(self) -> list[list[int]]:
        """The prompts of all sequences, each different: turned by one more id from row to row, then raised."""
        turns = [divmod(number, len(self.prompt)) for number in range(self.batch)]
        return [[token + up for token in self.prompt[by:] + self.prompt[:by]] for up, by in turns]

    @property
    def counted(self) -> list[int]:
        """Counted tokens of each stretch: what the first token and one in each stretch leave of `new_tokens`."""
        left = self.new_tokens - 1 - self.stretches
        return [left // self.stretches + (number < left % self.stretches) for number in range(self.stretches)]

    def command(self, out: str) -> list[str]:
        """The command line of the worker that does this and writes its Outcome to `out`."""
        return [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(self)), out]


@dataclass
class Outcome:
    """Sizes in bytes, times in seconds, rates in bytes a second.

    `first_token` covers load and prefill: from the call that loads to the first token. `tokens_each` are
    the counted tokens and `decode` their sum. `tokens` are the ids of a step, row by row, step after step.
    `probe_rates` are of reads into 8 MiB, `memory_rates` of reads into the task's `probe_bytes`. `swept` are the
    bytes that one decoding sweep needs (see `swept_bytes`), `first_swept` the first sweep, and `cache_bytes` is the
    key-value cache in the end. `engine_first_token` is the engine's own count for that span (zinfer only).
    """

    tool: str
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    first_token: Phase | None = None
    tokens_each: list[Phase] = field(default_factory=list)
    decode: Phase | None = None
    probes: list[Phase] = field(default_factory=list)
    probe_rates: list[float] = field(default_factory=list)
    memory_rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    swept: int = 0
    first_swept: int = 0
    cache_bytes: int = 0
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
    """Greedy decoding of `task.rows`, the key-value cache kept by the model's own code."""
    import torch

    cache: Any = None

    def step(rows: list[list[int]]) -> list[list[int]]:
        nonlocal cache
        result = model(input_ids=torch.tensor(rows), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        found: list[int] = result.logits[:, -1].argmax(-1).tolist()
        outcome.tokens += found
        return [[token] for token in found]

    last = step(task.rows)
    outcome.first_token = clock.span()
    if task.tool == "zinfer":
        outcome.engine_first_token = model.zinfer.bytes_read
    for counted in task.counted:
        _probe(task, clock, outcome)
        last = step(last)
        for _ in range(counted):
            clock.restart()
            last = step(last)
            outcome.tokens_each.append(clock.span())
    outcome.decode = sum(outcome.tokens_each[1:], outcome.tokens_each[0])
    _probe(task, clock, outcome)
    outcome.swept = swept_bytes(model, task.batch)
    outcome.first_swept = swept_bytes(model, task.batch * len(task.prompt))
    outcome.cache_bytes = sum(
        tensor.nbytes for layer in getattr(cache, "layers", ()) for tensor in (layer.keys, layer.values)
    )


def swept_bytes(model: Any, tokens: int) -> int:
    """Weight bytes that a pass over `tokens` tokens needs: tables of rows count a row a token, all else in full."""
    import torch

    whole: dict[int, int] = {}
    tables: dict[int, int] = {}
    for module in model.modules():
        table = isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False):
            nbytes = parameter.numel() * parameter.element_size()
            if table:
                tables[id(parameter)] = min(nbytes, tokens * parameter.shape[1] * parameter.element_size())
            else:
                whole[id(parameter)] = nbytes
    return sum((tables | whole).values())


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
    files = weight_files(task.checkpoint)
    clock.restart()
    outcome.probe_rates.append(measure_read_rate(files, task.probe_seconds).bytes_per_second)
    if task.probe_bytes:
        rate = measure_read_rate(files, task.probe_seconds, task.probe_bytes)
        outcome.memory_rates.append(rate.bytes_per_second)
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
        return lambda: _in_memory(task)
    import accelerate  # noqa: F401  # so that its import is not counted as loading

    return lambda: transformers.AutoModelForCausalLM.from_pretrained(
        task.checkpoint, dtype="auto", device_map=disk_map(task.checkpoint), offload_folder=task.scratch
    ).eval()


def _in_memory(task: Task) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto").eval()
    if task.copied:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


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
        return outcome_of(json.load(file))


def outcome_of(fields: dict[str, Any]) -> Outcome:
    """The outcome whose fields are these, as JSON has them."""

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
