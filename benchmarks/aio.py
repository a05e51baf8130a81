"""The I/O library beside fio and DeepNVMe's aio_handle: reads and writes of one file, in turns."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from benchmarks.aio_handle import AioHandle, HandleSetting
from benchmarks.drive import drive_of
from benchmarks.huge_pages import reserved
from benchmarks.neighbours import wait_until_quiet
from benchmarks.report import Requirement, Result, Spread, conclude, main_of, table
from zinfer.aio import Engine
from zinfer.aio.profile import Backend
from zinfer.aio_bench import READ, Setting, Target, made_targets
from zinfer.aio_bench.fio import Comparison, compare, require_fio
from zinfer.aio_bench.measurement import Trial
from zinfer.aio_bench.memory import hold, pool_of
from zinfer.aio_bench.settings import DIRECTIONS
from zinfer.aio_bench.table import size_text
from zinfer.planner.memory import parse_size

BACKENDS: tuple[Backend, ...] = ("io_uring", "libaio")
SETTINGS = [
    Setting(backend, block, depth) for backend in BACKENDS for block, depth in ((1 << 20, 8), (4 << 20, 8))
]
LEAST_RATIO = 0.97  # of fio's bandwidth
MOST_CPU = 1.3  # times fio's CPU seconds for the same bytes
AHEAD = 1.0
FIO_MEMORY = 256 << 20
WHOLE_BYTES = 256 << 20  # of one request beside aio_handle, which moves a tensor at a time


def move_whole(target: Target, direction: str, seconds: float) -> Trial:
    """What aio_handle is asked to do, by zinfer's engine as zinfer makes it: one long transfer after the other."""
    reader = target.reader() if direction == READ else None
    file = reader or target.writer
    assert file is not None
    parts = target.size // WHOLE_BYTES
    with pool_of(WHOLE_BYTES) as pool, closing(Engine(depth=8)) as engine:
        region = hold(pool, WHOLE_BYTES)
        move = engine.read if direction == READ else engine.write
        moved, started, cpu = 0, time.perf_counter(), time.process_time()
        while not moved or time.perf_counter() - started < seconds:
            offset = moved // WHOLE_BYTES % parts * WHOLE_BYTES
            move([(file, offset, WHOLE_BYTES, region.address, False)], region).wait()
            moved += WHOLE_BYTES
        trial = Trial(moved, time.perf_counter() - started, time.process_time() - cpu, {})
    if reader is not None:
        reader.close()
    return trial


def beside_aio_handle(
    handle: AioHandle, target: Target, direction: str, rounds: int, seconds: float
) -> tuple[HandleSetting, list[tuple[Trial, Trial]]]:
    """The peer's best setting, and (ours, its) of each round; who goes first changes."""
    setting = handle.best(target, direction, WHOLE_BYTES, seconds / 4)
    handle.use(target, setting, WHOLE_BYTES)
    pairs = []
    for number in range(rounds):
        if number % 2 == 0:
            ours = move_whole(target, direction, seconds)
            pairs.append((ours, handle.run(direction, seconds)))
        else:
            theirs = handle.run(direction, seconds)
            pairs.append((move_whole(target, direction, seconds), theirs))
    return setting, pairs


def fio_rows(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table of ours beside fio's."""
    header = ["", "GB/s", "fio, GB/s", "ratio, median (range)", "CPU s/GB", "fio's", "CPU ratio"]
    rows = [
        [
            _name(item),
            f"{item.ours / 1e9:.2f}",
            f"{item.fio / 1e9:.2f}",
            Spread.of(item.ratios).text(digits=3),
            f"{item.our_cpu:.4f}",
            f"{item.fio_cpu:.4f}",
            f"{item.cpu_ratio:.2f}",
        ]
        for item in comparisons
    ]
    return table(header, rows)


def handle_rows(directions: dict[str, tuple[HandleSetting, list[tuple[Trial, Trial]]]]) -> str:
    """A Markdown table of ours beside aio_handle's."""
    header = ["", "GB/s", "aio_handle, GB/s", "ratio, median (range)", "CPU s/GB", "its", "its setting"]
    rows = [
        [
            f"{direction}, {size_text(WHOLE_BYTES)} at a time",
            *(f"{statistics.median(pair[side].rate for pair in pairs) / 1e9:.2f}" for side in (0, 1)),
            Spread.of(ratios(pairs)).text(digits=3),
            *(f"{statistics.median(_cpu(pair[side]) for pair in pairs):.4f}" for side in (0, 1)),
            setting.text(),
        ]
        for direction, (setting, pairs) in directions.items()
    ]
    return table(header, rows)


def ratios(pairs: Sequence[tuple[Trial, Trial]]) -> list[float]:
    """Ours over theirs, of the rates, round by round."""
    return [ours.rate / theirs.rate for ours, theirs in pairs]


def _cpu(trial: Trial) -> float:
    return trial.cpu_seconds / trial.nbytes * 1e9


def _name(item: Comparison) -> str:
    setting = item.setting
    return f"{item.direction}, {setting.backend}, {size_text(setting.block_bytes)} x {setting.depth}"


def requirements(
    comparisons: Sequence[Comparison], handles: dict[str, tuple[HandleSetting, list[tuple[Trial, Trial]]]]
) -> list[Requirement]:
    """What the library has to reach."""
    required = []
    for item in comparisons:
        required.append(Requirement(f"{_name(item)}: bandwidth over fio's", item.ratio, LEAST_RATIO, True))
        required.append(Requirement(f"{_name(item)}: CPU a GB over fio's", item.cpu_ratio, MOST_CPU, False))
    for direction, (_, pairs) in handles.items():
        ratio = statistics.median(ratios(pairs))
        required.append(Requirement(f"{direction}: bandwidth over aio_handle's", ratio, AHEAD, True))
    return required


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aio", description="zinfer's I/O library beside fio and DeepNVMe."
    )
    parser.add_argument("--folder", required=True, help="on the drive to measure; gets a nameless file")
    parser.add_argument("--size", default="4GiB", help="of that file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument(
        "--deepspeed-python", metavar="FILE", help="a Python with deepspeed; without it, only fio"
    )
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a quiet machine")
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or parse_size(options.size) < WHOLE_BYTES:
        parser.error(
            f"--rounds is at least 1, --seconds more than 0, --size at least {size_text(WHOLE_BYTES)}"
        )
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when every requirement is met."""
    options = _parse(arguments)
    drive, load = drive_of(options.folder), os.getloadavg()[0]
    quiet = wait_until_quiet(drive, options.patience)
    peers = subprocess.run(
        [require_fio(), "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    comparisons: list[Comparison] = []
    handles: dict[str, tuple[HandleSetting, list[tuple[Trial, Trial]]]] = {}
    with made_targets([options.folder], parse_size(options.size)) as [target]:
        with reserved(FIO_MEMORY):
            for direction in DIRECTIONS:
                comparisons += compare(
                    target, direction, SETTINGS, rounds=options.rounds, seconds=options.seconds, progress=_say
                )
        if options.deepspeed_python:
            with AioHandle(options.deepspeed_python) as handle:
                peers += f", deepspeed {handle.version}"
                for direction in DIRECTIONS:
                    _say(f"{direction} beside aio_handle")
                    handles[direction] = beside_aio_handle(
                        handle, target, direction, options.rounds, options.seconds
                    )
    body = (
        f"One file of {options.size}, O_DIRECT, {options.rounds} rounds of {options.seconds:g} s, the tools in "
        f"turns. Beside fio: sequential, the same block and depth, into as much memory as fio uses, both on huge "
        f"pages. {peers}.{'' if quiet else ' The machine was NOT quiet.'}\n\n{fio_rows(comparisons)}"
    )
    if handles:
        body += (
            f"\n\nBeside DeepNVMe's `aio_handle` (libaio; the best of its settings that were tried), one transfer of "
            f"{size_text(WHOLE_BYTES)} after the other, each into memory of its own kind.\n\n{handle_rows(handles)}"
        )
    result = Result(
        name="aio",
        drive=drive,
        settings={**vars(options), "quiet": quiet},
        rounds=_rounds(comparisons, handles, options.rounds),
        figures={"fio": [item.as_dict() for item in comparisons]},
        requirements=requirements(comparisons, handles),
        body=body,
        load_average=load,
    )
    return conclude(result, "benchmarks.aio", arguments, options.json)


def _rounds(
    comparisons: Sequence[Comparison],
    handles: dict[str, tuple[HandleSetting, list[tuple[Trial, Trial]]]],
    count: int,
) -> list[dict[str, Any]]:
    return [
        {
            **{f"{_name(item)}: over fio": item.ratios[number] for item in comparisons},
            **{
                f"{direction}: over aio_handle": ratios(pairs)[number]
                for direction, (_, pairs) in handles.items()
            },
        }
        for number in range(count)
    ]


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main_of(main)
