"""`aio_bench`: how fast a drive is, and with which setting."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from tqdm import tqdm

from zinfer import aio_bench
from zinfer._version import __version__
from zinfer.aio.profile import BACKENDS, Profile, save_profile
from zinfer.aio_bench import READ, WRITE, Measurement, Plan, Setting, Target, choose, make_plan
from zinfer.aio_bench import fio as fio_module
from zinfer.aio_bench import plot as plot_module
from zinfer.aio_bench.settings import BLOCKS, DEPTHS, DIRECTIONS, ROUNDS, SECONDS, THREADS
from zinfer.aio_bench.sweep import sweep, usable_backends
from zinfer.aio_bench.table import compared_table, measured_table, size_text
from zinfer.errors import OptionError
from zinfer.plan.memory import parse_size

NAME = "aio_bench"
DESCRIPTION = """\
Measure a drive: sweep block size, depth, backend and threads for about a minute, print GB/s (median and
range over the rounds), CPU seconds for each GB, latency of a block, and the best setting, and keep that as
the drive's profile, which zinfer uses from then on."""
EPILOG = """\
examples:
  aio_bench /mnt/nvme
  aio_bench /mnt/nvme --read --block 1MiB 4MiB --depth 4 8 16 --backend io_uring --plot sweep.png
  aio_bench /nvme0 --drives /nvme1 /nvme2        # all at once; GB/s are of them together
  aio_bench --file model.safetensors             # reads that file, writes nothing
  aio_bench /mnt/nvme --fio                      # and fio beside it, same file and settings, in turns

PATH gets a nameless file of random bytes, gone when the command ends, however it ends. No other file is
written; with --file none is. Writes of a sweep come to at most 8 times --size."""

DEFAULT_SIZE = 2 << 30
SPARE_SHARE = 4  # the default file takes at most 1/4 of the free space
SMALLEST_SIZE = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="folder on the drive to measure; default: here"
    )
    parser.add_argument("--drives", metavar="PATH", nargs="+", default=[], help="folders on further drives")
    parser.add_argument("--file", metavar="FILE", nargs="+", help="read these files, and make and write none")
    parser.add_argument("--read", action="store_true", help="only reads, unless --write is there too")
    parser.add_argument("--write", action="store_true", help="only writes, unless --read is there too")
    parser.add_argument("--size", help="of the file that is made; default: 2GiB, or 1/4 of what is free")
    parser.add_argument("--block", metavar="SIZE", nargs="+", help=f"default: {_sizes(BLOCKS)}")
    parser.add_argument("--depth", metavar="N", nargs="+", type=int, help=f"default: {_numbers(DEPTHS)}")
    parser.add_argument(
        "--threads",
        metavar="N",
        nargs="+",
        type=int,
        help=f"of the threads backend; default: {_numbers(THREADS)}",
    )
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: those that work here")
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=ROUNDS, help=f"trials of a setting; default: {ROUNDS}"
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=SECONDS, help=f"of the sweep; default: {SECONDS:.0f}"
    )
    parser.add_argument(
        "--fio", action="store_true", help="afterwards, the best setting of each backend against fio"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the sweep to a .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument(
        "--save",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the best setting as the drive's profile; default: after a sweep that no option narrowed",
    )


@dataclass
class Outcome:
    """Everything that was measured, and what came of it."""

    targets: list[Target]
    direct: bool
    alignment: int
    refused: dict[str, str]
    measurements: list[Measurement]
    best: dict[str, Measurement] = field(default_factory=dict)
    comparisons: list[fio_module.Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(arguments: argparse.Namespace) -> int:
    """Carry out `aio_bench`; returns 0. Raises OptionError, StoreError, DriveError, BudgetError."""
    if arguments.plot:
        plot_module.require_matplotlib(arguments.plot)
    if arguments.fio:
        fio_module.require_fio()
    with _targets(arguments) as targets:
        outcome = _measure(arguments, targets)
    if _to_be_saved(arguments, outcome):
        outcome.notes += _save(outcome)
    if arguments.plot:
        names = " + ".join(target.device.name for target in outcome.targets)
        plot_module.draw(outcome.measurements, f"{names}: {targets[0].folder}", arguments.plot)
        outcome.notes.append(f"drawn to {arguments.plot}")
    sys.stdout.write(_as_json(outcome) if arguments.json else _as_text(outcome))
    return 0


def _targets(arguments: argparse.Namespace) -> AbstractContextManager[list[Target]]:
    """The files to measure. Raises OptionError for options that contradict each other."""
    if not arguments.file:
        folders = [arguments.path or ".", *arguments.drives]
        if len({os.path.realpath(folder) for folder in folders}) < len(folders):
            raise OptionError("the same folder twice; --drives are further drives")
        return aio_bench.made_targets(folders, _size(arguments.size, folders))
    for name in ("path", "drives", "size", "write"):
        if getattr(arguments, name):
            option = "PATH" if name == "path" else f"--{name}"
            raise OptionError(f"{option} has no effect with --file, which is read as it is; leave it out")
    return aio_bench.given_targets(arguments.file)


def _size(wanted: str | None, folders: Sequence[str]) -> int:
    if wanted is not None:
        size = parse_size(wanted)
    else:
        spaces = [os.statvfs(folder) for folder in folders if os.path.isdir(folder)]
        free = min((space.f_bavail * space.f_frsize for space in spaces), default=DEFAULT_SIZE)
        size = max(min(DEFAULT_SIZE, free // SPARE_SHARE), SMALLEST_SIZE)
    if size < SMALLEST_SIZE:
        raise OptionError(f"--size {wanted}: at least {size_text(SMALLEST_SIZE)}")
    return size >> 20 << 20


def _measure(arguments: argparse.Namespace, targets: list[Target]) -> Outcome:
    reader = targets[0].reader()
    reader.close()
    if arguments.save and (READ not in _directions(arguments) or not reader.direct):
        raise OptionError("--save has no effect: a profile is of direct reads, and none would be measured")
    usable, refused = usable_backends(arguments.backend or BACKENDS, direct=reader.direct)
    if arguments.backend and refused:
        raise OptionError("; ".join(refused.values()))
    plan = make_plan(
        backends=usable,
        directions=_directions(arguments),
        size=min(target.size for target in targets),
        blocks=[parse_size(text) for text in arguments.block] if arguments.block else BLOCKS,
        depths=arguments.depth or DEPTHS,
        threads=arguments.threads or THREADS,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    with _progress(plan) as progress:
        measurements = sweep(targets, plan, progress)
    outcome = Outcome(targets, reader.direct, reader.alignment, refused, measurements)
    for direction in plan.directions:
        outcome.best[direction] = choose(item for item in measurements if item.direction == direction)
        if arguments.fio:
            outcome.comparisons += fio_module.compare(
                targets[0], direction, _best_settings(measurements, direction), rounds=fio_module.ROUNDS
            )
    return outcome


def _directions(arguments: argparse.Namespace) -> Sequence[str]:
    chosen = [name for name in DIRECTIONS if getattr(arguments, name)]
    return chosen or ((READ,) if arguments.file else DIRECTIONS)


def _best_settings(measurements: Sequence[Measurement], direction: str) -> list[Setting]:
    """The best setting of each backend."""
    found = []
    for backend in BACKENDS:
        of_backend = [
            item for item in measurements if (item.direction, item.setting.backend) == (direction, backend)
        ]
        if of_backend:
            found.append(choose(of_backend).setting)
    return found


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal."""
    with tqdm(total=plan.trials, unit="trial", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(text: str) -> None:
            bar.set_description(text)
            bar.update()

        yield advance


def _to_be_saved(arguments: argparse.Namespace, outcome: Outcome) -> bool:
    if arguments.save is not None:
        return bool(arguments.save)
    narrowed = [name for name in ("block", "depth", "threads", "backend") if getattr(arguments, name)]
    if narrowed:
        outcome.notes.append(
            f"not kept as a profile: --{narrowed[0]} narrowed the sweep (--save keeps it all the same)"
        )
    return not narrowed and READ in outcome.best and outcome.direct


def _save(outcome: Outcome) -> list[str]:
    """Keep the best read setting as the profile of each drive."""
    best, share = outcome.best[READ], len(outcome.targets)
    writes = outcome.best.get(WRITE)
    profile = Profile(
        best.setting.backend,
        best.setting.block_bytes,
        best.setting.depth,
        best.setting.threads,
        best.rate / share,
        writes.rate / share if writes else None,
        datetime.now().isoformat(timespec="seconds"),
    )
    devices = {target.device.key: target.device for target in outcome.targets}
    return [
        f"kept as the profile of {device.name}: {save_profile(device, profile)}"
        for device in devices.values()
    ]


def _as_text(outcome: Outcome) -> str:
    lines = []
    for target in outcome.targets:
        what = "made for this, gone now" if target.writer else "yours, only read"
        lines.append(f"drive     {target.device.name} ({target.device.key}), {target.device.disks} disk(s)")
        lines.append(f"file      {size_text(target.size)} in {target.folder}, {what}")
    way = (
        f"O_DIRECT, alignment {outcome.alignment} bytes"
        if outcome.direct
        else "the page cache: no O_DIRECT here"
    )
    lines.append(f"through   {way}")
    lines += [f"not used  {name}: {reason}" for name, reason in outcome.refused.items()]
    text = "\n".join(lines) + "\n"
    for direction, best in outcome.best.items():
        measured = [item for item in outcome.measurements if item.direction == direction]
        text += f"\n{direction}s, median over the rounds (lowest-highest)\n{measured_table(measured, best)}"
    for direction in outcome.best:
        compared = [item for item in outcome.comparisons if item.direction == direction]
        if compared:
            text += (
                f"\n{direction}s beside fio, same file, block, depth and engine\n{compared_table(compared)}"
            )
            if not all(item.huge_pages for item in compared):
                text += (
                    "fio's buffers were on 4-KiB pages, ours on huge pages, so this flatters us; for a fair ratio, as "
                    "root: sysctl vm.nr_hugepages=128\n"
                )
    for direction, best in outcome.best.items():
        setting = best.setting
        text += (
            f"\nbest for {direction}s: {setting.backend}, blocks of {size_text(setting.block_bytes)}, "
            f"{'threads' if setting.backend == 'threads' else 'depth'} {setting.depth}: {best.rate / 1e9:.2f} GB/s"
        )
    return text + "\n" + "".join(f"{note}\n" for note in outcome.notes)


def _as_json(outcome: Outcome) -> str:
    document = {
        "zinfer": __version__,
        "targets": [
            {
                "folder": target.folder,
                "device": target.device.name,
                "key": target.device.key,
                "disks": target.device.disks,
                "bytes": target.size,
                "made": target.writer is not None,
            }
            for target in outcome.targets
        ],
        "direct": outcome.direct,
        "alignment": outcome.alignment,
        "refused": outcome.refused,
        "measurements": [item.as_dict() for item in outcome.measurements],
        "best": {direction: item.as_dict() for direction, item in outcome.best.items()},
        "fio": [item.as_dict() for item in outcome.comparisons],
        "notes": outcome.notes,
    }
    return json.dumps(document, indent=2) + "\n"


def _sizes(values: Sequence[int]) -> str:
    return " ".join(size_text(value).replace(" ", "") for value in values)


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))
