"""Cost as a model grows at one fixed budget: time must be linear in bytes, and memory must not grow.

    python -m benchmarks.growth --folder DIR --budget 640MiB --layers 12 24 48 96 --rounds 5

Synthesises models of one width under --folder where they are not there yet. Needs no root.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy
from transformers import LlamaConfig

from benchmarks import BenchmarkError
from benchmarks.bench import WINDOW_BYTES, Bench, Run, counting, tried_twice
from benchmarks.drive import drive_of
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of, table
from benchmarks.worker import Task, weight_files
from zinfer.planner.memory import parse_size
from zinfer.synth import synthesise

HEAD_SIZE = 64
KEY_VALUE_HEADS = 4  # few, so that the key-value cache, which does grow with depth, stays small
VOCABULARY = 512  # small, so that all bytes are layers
PROMPT = list(range(1, 17))
FIT_BOUND = 0.99
FLAT_BOUND = 0.02
FEWEST_SIZES = 3  # a line fits any two
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A checkpoint, its layers and its weights' bytes."""

    checkpoint: str
    layers: int
    nbytes: int


@dataclass(frozen=True)
class Fit:
    """A line through points, by least squares, and how much of their variance it explains."""

    slope: float
    offset: float
    r_squared: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        """The line through at least two different `x`."""
        slope, offset = (float(value) for value in numpy.polyfit(x, y, 1))
        left = sum((b - slope * a - offset) ** 2 for a, b in zip(x, y, strict=True))
        whole = sum((b - float(numpy.mean(y))) ** 2 for b in y)
        return cls(slope, offset, 1 - left / whole)

    def text(self) -> str:
        """The line in seconds and gigabytes."""
        return (
            f"{self.slope * GB:.4f} s a GB ({1 / self.slope / GB:.2f} GB/s) {self.offset:+.4f} s, "
            f"R^2 {self.r_squared:.5f}"
        )


def make_model(folder: str, hidden: int, layers: int) -> Model:
    """The Llama-shaped model of this size under `folder`, made once."""
    heads = hidden // HEAD_SIZE
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS if heads % KEY_VALUE_HEADS == 0 else heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="bfloat16",
    )
    checkpoint = synthesise(
        config, os.path.join(folder, f"llama-{hidden}x{layers}"), progress=sys.stderr.isatty()
    )
    return Model(checkpoint, layers, sum(os.path.getsize(path) for path in weight_files(checkpoint)))


def growth(by_size: Sequence[Sequence[float]]) -> float:
    """How far the medians of larger models lie from the smallest's, over it: the farthest."""
    medians = [median(values) for values in by_size]
    return max(abs(value / medians[0] - 1) for value in medians[1:])


def fits(models: Sequence[Model], points: Sequence[Sequence[Run]]) -> dict[str, Fit]:
    """Lines through the medians of seconds a token over the rounds."""
    seconds = [median(run.seconds_a_token for run in mine) for mine in points]
    read = [median(run.bytes_a_token for run in mine) for mine in points]
    return {
        "bytes read a token": Fit.of(read, seconds),
        "model bytes": Fit.of([model.nbytes for model in models], seconds),
    }


PEAKS: dict[str, Callable[[Run], float]] = {
    "peak anonymous memory": lambda run: run.usage.peak_anonymous,
    "peak resident memory (VmHWM)": lambda run: run.outcome.process_peak,
    "zinfer's account": lambda run: run.account,
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", required=True, help="where the models are, or are made (some 17 GB)")
    parser.add_argument(
        "--budget", default="640MiB", help="zinfer's max_memory; less than the smallest model"
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[12, 24, 48, 96])
    parser.add_argument("--hidden", type=int, default=2048, help="width; a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=7, help="all but the first two count")
    parser.add_argument(
        "--probe-seconds", type=float, default=0.5, help="how long each probe reads the drive"
    )
    parser.add_argument(
        "--probe-memory",
        default=str(WINDOW_BYTES),
        help="what the second probe reads into; default: a window",
    )
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--repeats", type=int, default=1, help="times a disturbed run is repeated at most")
    parser.add_argument(
        "--patience", type=float, default=5, help="seconds to wait, before each run, for a quiet machine"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.new_tokens < 3 or options.hidden % HEAD_SIZE:
        parser.error(f"--rounds is at least 1, --new-tokens 3 and --hidden a multiple of {HEAD_SIZE}")
    if options.probe_seconds <= 0:
        parser.error("--probe-seconds is more than 0")
    if len(set(options.layers)) < FEWEST_SIZES:
        parser.error("--layers takes at least three sizes: a line fits any two")
    return options


def _rows(models: Sequence[Model], points: Sequence[Sequence[Run]]) -> str:
    figures: list[tuple[str, Callable[[Run], float], float, int]] = [
        ("seconds a token", lambda run: run.seconds_a_token, 1, 4),
        ("read a token, GB", lambda run: run.bytes_a_token, GB, 3),
        ("GB/s while decoding", lambda run: run.bytes_a_token / run.seconds_a_token, GB, 2),
        ("drive in the pauses, GB/s", lambda run: fmean(run.outcome.memory_rates), GB, 2),
        *((f"{name}, GB", figure, GB, 4) for name, figure in PEAKS.items()),
    ]
    return table(
        ["median (range)", *(f"{model.layers} layers, {model.nbytes / GB:.2f} GB" for model in models)],
        [
            [name, *(Spread.of([figure(run) for run in mine]).text(scale, digits) for mine in points)]
            for name, figure, scale, digits in figures
        ],
    )


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when time is linear in bytes and memory flat."""
    options = _parse(arguments)
    budget, load = parse_size(options.budget), os.getloadavg()[0]
    models = [make_model(options.folder, options.hidden, layers) for layers in sorted(set(options.layers))]
    if models[0].nbytes < budget:
        raise BenchmarkError(
            f"the smallest model has {models[0].nbytes} bytes, the budget is {budget}: nothing would stream"
        )
    drive = drive_of(options.folder)
    bench = Bench(drive, True, options.patience, options.repeats, grouped=False)
    runs: list[list[Run]] = [[] for _ in models]
    rounds: list[dict[str, Any]] = []
    failed: list[str] = []
    for number in range(options.rounds):
        order = list(zip(models, runs, strict=True))
        rounds.append({})
        for model, mine in order if number % 2 == 0 else reversed(order):
            task = Task(
                "zinfer",
                model.checkpoint,
                PROMPT,
                options.new_tokens,
                cores(),
                max_memory=budget,
                probe_seconds=options.probe_seconds,
                probe_bytes=parse_size(options.probe_memory),
            )
            label = f"{model.layers} layers"
            run = tried_twice(partial(bench.run, task, None, label), f"{label}, round {number + 1}", failed)
            if run is not None:
                mine.append(run)
                rounds[-1][str(model.layers)] = asdict(run)
    models = [model for model, mine in zip(models, runs, strict=True) if mine]
    runs = [mine for mine in runs if mine]
    if len(models) < FEWEST_SIZES:
        raise BenchmarkError("too many runs failed:\n" + "\n".join(failed))
    found = [counting(mine, lambda run: run.disturbed) for mine in runs]
    lines = fits(models, found)
    peaks = {name: [[figure(run) for run in mine] for mine in found] for name, figure in PEAKS.items()}
    body = "\n\n".join(
        [
            f"Models of width {options.hidden}, x1 to x{models[-1].layers / models[0].layers:g}, batch 1, "
            f"{len(PROMPT)} prompt and {options.new_tokens} new tokens, max_memory {options.budget}, rounds: "
            f"{options.rounds}; discarded and repeated as disturbed: {len(bench.discarded)} runs.",
            _rows(models, found),
            "\n".join(f"- seconds a token over {name}: {line.text()}" for name, line in lines.items()),
            *[f"Failed twice: {text}." for text in failed],
        ]
    )
    result = Result(
        name="growth",
        drive=drive,
        settings={**vars(options), "model_bytes": [model.nbytes for model in models], "threads": cores()},
        rounds=rounds,
        figures={
            "fits": lines,
            "failed": failed,
            "seconds_a_token": [Spread.of([run.seconds_a_token for run in mine]) for mine in found],
            "peaks": {name: [Spread.of(side) for side in sides] for name, sides in peaks.items()},
        },
        requirements=[
            *(
                Requirement(f"R^2 of seconds a token over {name}", line.r_squared, FIT_BOUND, True)
                for name, line in lines.items()
            ),
            *(
                Requirement(f"growth of {name}, x1 to the largest", growth(sides), FLAT_BOUND, False)
                for name, sides in peaks.items()
            ),
            Requirement("runs that failed twice", len(failed), 0, False),
        ],
        body=body,
        load_average=load,
    )
    return conclude(result, "benchmarks.growth", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
