"""Decode at budgets from a quarter of the model to all of it: measured time over the bound.

    python -m benchmarks.sweep --checkpoint DIR --rounds 5

Each cell (a budget at a batch) is a process of its own; cells, the model in memory and zinfer's own overhead take
turns within a round. Needs no root, but memory for the whole model.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import psutil

from benchmarks import BenchmarkError
from benchmarks.bench import IN_MEMORY_FACTOR, WINDOW_BYTES, Bench, Run, prompt_of, tried_twice
from benchmarks.bound import GB, Cell, Overhead, Point, byte_rows, cell_rows, counted, requirements
from benchmarks.drive import Drive, drive_of
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of
from benchmarks.turns import Turns, take_turns
from benchmarks.worker import UNCOUNTED, Task, weight_files
from zinfer.hardware_probe import this_machine
from zinfer.planner.hardware import Hardware
from zinfer.planner.memory import parse_size

SETTLING = 2  # tokens: one reads what is to stay, the next what lay in the window before it had its place


def measured_now(checkpoint: str) -> Hardware:
    """This machine as the planner knows it, measured anew: what is kept may be of another day."""
    return this_machine(weight_files(checkpoint), refresh=True)


def predicted(
    hardware: Hardware, checkpoint: str, budget: int, batch: int, prompt: int, new_tokens: int
) -> float:
    """Seconds a token that zinfer's planner expects on `hardware`, before anything runs."""
    import zinfer

    plan = zinfer.plan(
        checkpoint,
        hardware=hardware,
        max_memory={"cpu": budget},
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
    )
    return plan.seconds_a_token


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a safetensors checkpoint")
    parser.add_argument(
        "--percent",
        nargs="+",
        type=float,
        default=[25, 50, 75, 100],
        help="budgets, in percent of the model's bytes",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--counted", nargs="+", type=int, default=[4, 3], help="tokens that count, for each of --batches"
    )
    parser.add_argument("--prompt-tokens", type=int, default=4, help="of each sequence")
    parser.add_argument("--pairs", type=int, default=20, help="of tokens with zinfer and without, in turns")
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
    if min(options.rounds, options.prompt_tokens, options.pairs, *options.counted, *options.batches) < 1:
        parser.error("--rounds, --prompt-tokens, --pairs, --counted and --batches are at least 1")
    if min(options.percent) <= 0 or options.probe_seconds <= 0:
        parser.error("--percent and --probe-seconds are more than 0")
    if len(options.counted) != len(options.batches):
        parser.error("--counted takes as many numbers as --batches")
    return options


def new_tokens(options: argparse.Namespace, batch: int) -> int:
    """Tokens that each sequence of a batch of this size gets."""
    return int(options.counted[options.batches.index(batch)]) + UNCOUNTED + SETTLING


@dataclass
class Sweep:
    """All runs so far, and how to make one more round of them. `options` are the command line's.

    `points` and `references` have the rounds in which a run, or its second attempt, did not fail; `failed` those in
    which it did, and `rounds` what the results file has of each.
    """

    options: argparse.Namespace
    checkpoint: str
    cells: list[Cell]
    bench: Bench
    points: dict[Cell, list[Point]] = field(init=False)
    references: dict[int, list[Run]] = field(init=False)
    overheads: list[Overhead] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.points = {cell: [] for cell in self.cells}
        self.references = {cell.batch: [] for cell in self.cells}

    def round(self, number: int) -> None:
        """Run everything once, in an order that turns round from round to round."""
        cells: dict[Cell, Run] = {}
        memory: dict[int, Run] = {}
        turns: list[Overhead] = []
        jobs: list[Callable[[], None]] = []

        def attempt(label: str, work: Callable[[], Any], keep: Callable[[Any], object]) -> None:
            result = tried_twice(work, f"{label}, round {number + 1}", self.failed)
            if result is not None:
                keep(result)

        for batch in self.references:
            label = f"in memory, batch {batch}"
            jobs.append(
                partial(attempt, label, partial(self._run_in_memory, batch), partial(_put, memory, batch))
            )
            jobs += [
                partial(attempt, cell.label, partial(self._run, cell), partial(_put, cells, cell))
                for cell in self.cells
                if cell.batch == batch
            ]
        jobs.append(partial(attempt, "with zinfer and without", self._take_turns, turns.append))
        for job in jobs if number % 2 == 0 else reversed(jobs):
            job()
        for batch, run in memory.items():
            self.references[batch].append(run)
        for cell, run in cells.items():
            if cell.batch in memory:
                self.points[cell].append(Point(cell, run, memory[cell.batch]))
        self.overheads += turns
        self.rounds.append(
            {
                "cells": {cell.label: asdict(cells[cell]) for cell in self.cells if cell in cells},
                "in_memory": {batch: asdict(memory[batch]) for batch in self.references if batch in memory},
                "overhead": asdict(turns[0]) if turns else None,
            }
        )

    @property
    def tokens_equal(self) -> bool:
        """Whether all runs of a batch, the model in memory included, computed the same tokens."""
        by_batch = {
            batch: {tuple(run.outcome.tokens) for run in mine} for batch, mine in self.references.items()
        }
        for cell, mine in self.points.items():
            by_batch[cell.batch] |= {tuple(point.run.outcome.tokens) for point in mine}
        return all(len(found) <= 1 for found in by_batch.values()) and all(
            each.tokens_equal for each in self.overheads
        )

    def _run(self, cell: Cell) -> Run:
        task = replace(
            self._task("zinfer", cell.batch),
            max_memory=cell.budget,
            probe_seconds=self.options.probe_seconds,
            probe_bytes=parse_size(self.options.probe_memory),
        )
        return self.bench.run(task, None, cell.label)

    def _run_in_memory(self, batch: int) -> Run:
        return self.bench.run(self._task("memory", batch), None, f"in memory, batch {batch}")

    def _take_turns(self) -> Overhead:
        prompt = prompt_of(self.options.prompt_tokens)
        turns = take_turns(Turns(self.checkpoint, prompt, self.options.pairs, cores()))
        sys.stderr.write(f"all resident, with zinfer / without: {turns.ratio:.4f}\n")
        return turns

    def _task(self, tool: str, batch: int) -> Task:
        return Task(
            tool,
            self.checkpoint,
            prompt_of(self.options.prompt_tokens),
            new_tokens(self.options, batch),
            cores(),
            batch=batch,
            probe_seconds=0,
            settling=SETTLING,
        )


def _put(table: dict[Any, Run], key: Any, run: Run) -> None:
    table[key] = run


def main(arguments: Sequence[str]) -> int:
    """Run the sweep over the budgets; 0 when every requirement is met."""
    options = _parse(arguments)
    checkpoint = os.path.abspath(options.checkpoint)
    drive, load = drive_of(checkpoint), os.getloadavg()[0]
    model_bytes = sum(os.path.getsize(path) for path in weight_files(checkpoint))
    needed = int(IN_MEMORY_FACTOR * model_bytes)
    if psutil.virtual_memory().available < needed:
        raise BenchmarkError(
            f"{model_bytes} bytes of weights need {needed} bytes of free memory for the reference in memory: take a "
            "smaller model"
        )
    cells = [
        Cell(percent, int(model_bytes * percent / 100), batch)
        for batch in options.batches
        for percent in options.percent
    ]
    machine = measured_now(checkpoint)
    expected = {
        cell: predicted(
            machine,
            checkpoint,
            cell.budget,
            cell.batch,
            options.prompt_tokens,
            new_tokens(options, cell.batch),
        )
        for cell in cells
    }
    bench = Bench(drive, True, options.patience, options.repeats, grouped=False)
    sweep = Sweep(options, checkpoint, cells, bench)
    for number in range(options.rounds):
        sweep.round(number)
    sweep.points = {cell: mine for cell, mine in sweep.points.items() if mine}
    if not sweep.points or not sweep.overheads:
        raise BenchmarkError("too many runs failed:\n" + "\n".join(sweep.failed))
    result = _result(sweep, machine, expected, model_bytes, drive, load)
    return conclude(result, "benchmarks.sweep", arguments, options.json)


def _result(
    sweep: Sweep,
    machine: Hardware,
    expected: dict[Cell, float],
    model_bytes: int,
    drive: Drive,
    load: float,
) -> Result:
    options, points = sweep.options, sweep.points
    overhead = Spread.of([each.ratio for each in sweep.overheads])
    introduction = (
        f"{model_bytes / GB:.2f} GB of weights, {options.prompt_tokens} prompt tokens, then "
        + ", ".join(f"{n} (batch {b})" for n, b in zip(options.counted, options.batches, strict=True))
        + f" that count, rounds: {options.rounds}, threads: {cores()}; medians and ranges over the rounds. W: bytes "
        "that a decoding sweep needs, R: of these resident. The drive is measured before and after the counted "
        f"tokens, by plain direct reads into {parse_size(options.probe_memory) >> 20} MiB (the bound's rate) and into "
        f"8 MiB, which a large cache can hold. "
        f"The tokens of each batch are {'equal' if sweep.tokens_equal else 'NOT equal'}; discarded and "
        f"repeated as disturbed: {len(sweep.bench.discarded)} runs."
    )
    turns = (
        f"All weights in memory, {options.pairs} tokens with zinfer and without in turns, on the same tensors: "
        f"{overhead.text(1, 4)} times the time without."
    )
    return Result(
        name="sweep",
        drive=drive,
        settings={
            **vars(options),
            "model_bytes": model_bytes,
            "threads": cores(),
            "prompt": prompt_of(options.prompt_tokens),
        },
        rounds=sweep.rounds,
        figures={
            "hardware": machine.as_dict(),
            "failed": sweep.failed,
            "cells": {
                cell.label: {
                    "seconds_a_token": Spread.of([point.seconds for point in counted(mine)]),
                    "bound": Spread.of([point.bound for point in counted(mine)]),
                    "over_bound": Spread.of([point.over_bound for point in counted(mine)]),
                    "predicted": expected[cell],
                }
                for cell, mine in points.items()
            },
            "overhead": overhead,
            "tokens_equal": sweep.tokens_equal,
            "discarded": [asdict(run) for run in sweep.bench.discarded],
        },
        requirements=[
            *requirements(points, sweep.overheads, expected, sweep.tokens_equal),
            Requirement("runs that failed twice", len(sweep.failed), 0, False),
        ],
        body="\n\n".join(
            [
                introduction,
                cell_rows(points, expected),
                byte_rows(points),
                turns,
                *[f"Failed twice: {text}." for text in sweep.failed],
            ]
        ),
        load_average=load,
    )


if __name__ == "__main__":
    main_of(main)
