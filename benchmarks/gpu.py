"""What zinfer does with a GPU: tests, streaming beside plain copies and reads, decode, prefill, memory, stress.

    python -m benchmarks.gpu --folder DIR

Synthesises a model of some 42 GB under --folder, which is removed again. `make gpu-check` builds zinfer first.
Without a GPU it refuses; --staged tries the benchmark itself, on a pretended one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import transformers

import zinfer
from benchmarks import BenchmarkError
from benchmarks.drive import Drive, drive_of
from benchmarks.gpu_card import Card, CudaCard, StagedCard, Watch
from benchmarks.gpu_figures import (
    Decode,
    Findings,
    Memory,
    Round,
    decode_table,
    prefill_table,
    remarks,
    requirements,
)
from benchmarks.gpu_runs import (
    Shape,
    card_hardware,
    decode,
    drive_rate,
    make_model,
    model_folder,
    prefill,
    prompts,
    streaming,
)
from benchmarks.gpu_stress import sanitized, stress
from benchmarks.gpu_tests import GpuTests
from benchmarks.report import RESULTS, Result, conclude, main_of
from benchmarks.worker import weight_files
from zinfer.planner.hardware import Hardware
from zinfer.planner.memory import free_memory, parse_size

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
    "layers": 8,
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
    "seconds": 0.02,
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
STRESS_LAYERS, STRESS_VOCABULARY = 8, 512
SANITIZER_SECONDS = 90.0
DECODE_PROMPT = 32  # tokens
PASSES = 2  # of each prefill
ROOM = 0.9  # of the free drive and host memory, which the model may take
HOST_SHARE = 1.25  # of the model's bytes, which are max_memory["cpu"] where all of it is in host memory
NO_PLAN: tuple[float | None, str] = None, ""
REASON = 300  # characters
Kind = TypeVar("Kind")


def fitting_layers(shape: Shape, room: int) -> int:
    """The layers of `shape` that `room` bytes hold, beside embedding and head in bf16; all of them at most."""
    heads = 2 * 2 * shape.vocabulary * shape.hidden
    layer = 2 * shape.hidden * (4 * shape.hidden + 3 * shape.intermediate)  # more than grouped heads take
    return min(shape.layers, max(1, (room - heads) // layer))


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
    parser.add_argument("--minutes", type=float, default=6.5, help="after which no other part is begun")
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
    return options


class Check:
    """One run of everything. `options` are the command line's; `found` grows part by part."""

    def __init__(self, options: argparse.Namespace, card: Card, closing: ExitStack) -> None:
        self._end = time.monotonic() + 60 * options.minutes
        self._closing = closing
        self.options, self.card = options, card
        self.found = Findings(parse_size(options.device_memory), options.sweeps)
        self.hardware: Hardware | None = None
        self.checkpoint = ""

    def left(self) -> float:
        """Seconds until no other part is begun."""
        return self._end - time.monotonic()

    def attempt(self, name: str, work: Callable[[], Kind]) -> Kind | None:
        """What `work` returns; None, and a line in what failed, where it fails or there is no time for it."""
        if self.left() <= 0:
            self.found.failed.append(f"{name}: no time was left")
            return None
        sys.stderr.write(f"{name} ({self.left():.0f} s left)\n")
        try:
            return work()
        except (
            Exception
        ) as error:  # whatever it is costs this part alone, is told, and is a requirement missed
            traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0]
            self.found.failed.append(f"{name}: {type(error).__name__}: {reason[:REASON]}")
            return None

    def run(self) -> None:
        """Everything, in the order of what is needed for what comes next."""
        tests = None if self.options.without_tests else GpuTests()
        if tests is not None:
            self._closing.callback(tests.end)
        self.checkpoint = self._made(self._shape())
        self.found.model_bytes = sum(map(os.path.getsize, self._files))
        if tests is not None:
            self.found.tests = tests.failed(self.left() / 2)
        self.attempt("yardsticks", self._yardsticks)
        self.attempt("from the drive", self._from_drive)
        self.attempt("from host memory", self._from_host)
        self.attempt("stress", self._stress)

    @property
    def _files(self) -> list[str]:
        return weight_files(self.checkpoint)

    def _shape(self) -> Shape:
        options = self.options
        wanted = Shape(options.hidden, options.intermediate, options.layers, options.vocabulary)
        room = int(ROOM * min(shutil.disk_usage(options.folder).free, free_memory()))
        options.layers = fitting_layers(wanted, room)
        return Shape(options.hidden, options.intermediate, options.layers, options.vocabulary)

    def _made(self, shape: Shape) -> str:
        """A model's checkpoint, which is removed at the end if it is made here."""
        folder = self.options.folder
        if not self.options.keep and not os.path.exists(model_folder(folder, shape)):
            self._closing.callback(shutil.rmtree, model_folder(folder, shape), ignore_errors=True)
        return make_model(folder, shape)

    def _yardsticks(self) -> None:
        """What card and drive do without zinfer."""
        options = self.options
        shape = Shape(options.hidden, options.intermediate, options.layers, options.vocabulary)
        self.hardware, self.found.peak_flops = card_hardware(
            self.card, shape, self._drive_rate(), options.seconds
        )

    def _from_drive(self) -> None:
        """Decode with the first layers of the model, most of which come from the drive each time."""
        options, card = self.options, self.card
        sizes = {0: parse_size(options.drive_device_memory), "cpu": parse_size(options.drive_host_memory)}
        with streaming(card, self.checkpoint, "nvme", sizes, num_hidden_layers=options.drive_layers) as model:
            self.found.from_drive = self._rounds(model, 1, Watch(card.used), self._drive_rate)

    def _from_host(self) -> None:
        """Decode and read prompts with the weights in host memory; what the card takes meanwhile."""
        options, card, found = self.options, self.card, self.found
        watch = Watch(card.used)
        sizes = {0: found.budget, "cpu": min(int(HOST_SHARE * found.model_bytes), free_memory())}
        with streaming(card, self.checkpoint, options.offload, sizes) as model:
            for batch in options.decode_batches:
                work = partial(self._rounds, model, batch, watch, self._copy_rate)
                rounds = self.attempt(f"decode, batch {batch}", work)
                if rounds:
                    planned = self.attempt(f"plan, batch {batch}", partial(self._bound, model, batch))
                    found.from_host.append(Decode(batch, rounds, *(planned or NO_PLAN)))
            self.attempt(
                "prefill",
                partial(
                    prefill,
                    card,
                    model,
                    found.prefills,
                    batches=options.batches,
                    prompt=options.prompt,
                    passes=PASSES,
                    watch=watch,
                    left=self.left,
                ),
            )
            found.memory = Memory(found.budget, watch.peak, card.listed_bytes())

    def _stress(self) -> None:
        """Sweeps of a small model whose recycled memory is poisoned, then a few under compute-sanitizer."""
        hidden = self.options.stress_hidden
        checkpoint = self._made(Shape(hidden, hidden * 11 // 4, STRESS_LAYERS, STRESS_VOCABULARY))
        self.found.stress = stress(self.card, checkpoint, self.options.sweeps, self.left)
        if not self.options.staged:
            self.found.sanitizer = sanitized(checkpoint, min(SANITIZER_SECONDS, self.left()))

    def _rounds(self, model: Any, batch: int, watch: Watch, yardstick: Callable[[], float]) -> list[Round]:
        options = self.options
        return decode(
            self.card,
            model,
            prompts(self.card, batch, DECODE_PROMPT, options.vocabulary),
            rounds=options.rounds,
            tokens=options.tokens,
            yardstick=yardstick,
            watch=watch,
        )

    def _copy_rate(self) -> float:
        return self.card.copy_rate(self.options.seconds)

    def _drive_rate(self) -> float:
        return drive_rate(self._files, self.options.seconds)

    def _bound(self, model: Any, batch: int) -> tuple[float, str]:
        """Seconds a token by the planner for the budgets that the run has, at the rates that were measured here."""
        if self.hardware is None:
            raise BenchmarkError("the card was not measured, so that nothing can be planned")
        report = model.zinfer.report()
        planned = zinfer.plan(
            self.checkpoint,
            hardware=self.hardware,
            max_memory={0: report.device.budget, "cpu": report.budget},
            offload=self.options.offload,
            batch=batch,
            prompt=DECODE_PROMPT,
            new_tokens=2 + self.options.rounds * (2 + self.options.tokens),
        )
        return planned.seconds_a_token, planned.bottleneck


def _drive(folder: str) -> Drive | None:
    try:
        return drive_of(folder)
    except (BenchmarkError, OSError):
        return None


def main(arguments: Sequence[str]) -> int:
    """Run everything that there is time for; 0 when every requirement is met."""
    options = _parse(arguments)
    load = os.getloadavg()[0]
    transformers.logging.set_verbosity_error()  # of the layers that are left out
    transformers.logging.disable_progress_bar()
    card: Card = StagedCard() if options.staged else CudaCard()
    os.makedirs(options.folder, exist_ok=True)
    with ExitStack() as closing:
        check = Check(options, card, closing)
        check.run()
    name = str(RESULTS / f"gpu-{slug(card.name)}.json")
    return conclude(_result(check, load), "benchmarks.gpu", arguments, options.json or name)


def _result(check: Check, load: float) -> Result:
    found, options = check.found, check.options
    introduction = (
        f"A Llama-shaped model of width {options.hidden} with {options.layers} layers, "
        f"{found.model_bytes / 1e9:.2f} GB in bf16, {found.model_bytes / found.budget:.2f} times the device's budget "
        f"of {options.device_memory}; its weights in host memory, or, with {options.drive_layers} layers, on the "
        f"drive. Medians and ranges over {options.rounds} rounds of {options.tokens} tokens, with plain copies, or "
        "reads of the same files, before and after each."
    )
    notes = "\n".join(f"- {line}" for line in remarks(found))
    texts = (introduction, decode_table(found), prefill_table(found), notes)
    plain = asdict(found)
    decoded = [{"from": "host", **part} for part in plain.pop("from_host")]
    return Result(
        name="gpu",
        drive=_drive(options.folder),
        settings=vars(options),
        rounds=[*decoded, {"from": "drive", "batch": 1, "rounds": plain.pop("from_drive")}],
        figures={**plain, "hardware": check.hardware.as_dict() if check.hardware else None},
        requirements=requirements(found),
        body="\n\n".join(text for text in texts if text),
        load_average=load,
        machine=check.card.facts(),
    )


if __name__ == "__main__":
    main_of(main)
