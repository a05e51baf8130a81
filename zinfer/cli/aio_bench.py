"""`aio_bench`: how fast a drive is, and with which setting."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from tqdm import tqdm

from zinfer import aio_bench
from zinfer._version import __version__
from zinfer.aio.profile import BACKENDS, Backend, Profile, save_profile
from zinfer.aio_bench import READ, WRITE, Measurement, Plan, Setting, Target, choose, make_plan
from zinfer.aio_bench import fio as fio_module
from zinfer.aio_bench import plot as plot_module
from zinfer.aio_bench.settings import BLOCKS, DEPTHS, DIRECTIONS, ROUNDS, SECONDS, THREADS
from zinfer.aio_bench.sweep import WINDOW_BYTES, into_window, sweep, usable_backends
from zinfer.aio_bench.table import compared_table, measured_table, size_text
from zinfer.aio_bench.target import by_drive, free_bytes
from zinfer.errors import OptionError, ZinferError
from zinfer.planner.memory import parse_size

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
written; with --file none is. Besides filling that file a sweep writes 16 GiB at most; --fio writes as fast as
the drive takes it for half a minute a backend (--read: not at all)."""

DEFAULT_SIZE = 2 << 30
SPARE_SHARE = 4  # the default file takes at most 1/4 of the free space
SMALLEST_SIZE = 16 << 20
SMALLEST_FOR_PROFILE = 256 << 20  # bytes a drive: a smaller file may lie in a cache, and leaves settings out


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
    """Everything that was measured, and what came of it; `failures` are of what was to be done with it.

    `window`: the best reads once more, into a window's worth of memory; None where they were not wanted, or failed.
    """

    targets: list[Target]
    direct: bool
    alignment: int
    refused: dict[str, str]
    measurements: list[Measurement]
    best: dict[str, Measurement] = field(default_factory=dict)
    window: Measurement | None = None
    comparisons: list[fio_module.Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(arguments: argparse.Namespace) -> int:
    """Carry out `aio_bench`; 1 when the sweep was done and something after it failed, else 0.

    Raises OptionError before anything is written or measured; StoreError, DriveError, BudgetError.
    """
    if arguments.plot:
        plot_module.require_matplotlib(arguments.plot)
    if arguments.fio:
        fio_module.require_fio()
    files, folders = arguments.file or [], [arguments.path or ".", *arguments.drives]
    _refuse_contradictions(arguments, folders)
    size = min(map(os.path.getsize, files)) if files else _size(arguments.size, folders)
    usable, refused = usable_backends(arguments.backend or BACKENDS)
    if arguments.backend and refused:
        raise OptionError("; ".join(refused.values()))
    plan = _plan(arguments, usable, size)
    with aio_bench.given_targets(files) if files else aio_bench.made_targets(folders, size) as targets:
        outcome = _measure(arguments, targets, plan, refused)
    if _to_be_saved(arguments, outcome):
        _attempt(outcome, "the profile was not kept", lambda: _save(outcome))
    if arguments.plot:
        _attempt(outcome, "not drawn", lambda: _draw(outcome, arguments.plot))
    sys.stdout.write(_as_json(outcome) if arguments.json else _as_text(outcome))
    for failure in outcome.failures:
        sys.stderr.write(f"aio_bench: error: {failure}\n")
    return 1 if outcome.failures else 0


def _attempt(outcome: Outcome, what: str, act: Callable[[], None]) -> None:
    """What was measured is told whatever becomes of this."""
    try:
        act()
    except (OSError, ZinferError) as error:
        outcome.failures.append(f"{what}: {error}")


def _refuse_contradictions(arguments: argparse.Namespace, folders: Sequence[str]) -> None:
    """Raises OptionError for options that would have no effect."""
    for name in ("path", "drives", "size", "write"):
        if arguments.file and getattr(arguments, name):
            option = "PATH" if name == "path" else f"--{name}"
            raise OptionError(f"{option} has no effect with --file, which is read as it is; leave it out")
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise OptionError("the same folder twice; --drives are further drives")
    if arguments.threads and "threads" not in (arguments.backend or BACKENDS):
        raise OptionError("--threads has no effect without the backend threads; leave it out")
    if arguments.depth and arguments.backend == ["threads"]:
        raise OptionError("--depth has no effect on the backend threads; choose --threads")
    if arguments.fio and (arguments.drives or len(arguments.file or []) > 1):
        raise OptionError("--fio reads and writes one file, as we do then: name one PATH or one FILE")
    if arguments.save and READ not in _directions(arguments):
        raise OptionError("--save has no effect: a profile is of reads, and none would be measured")
    if arguments.plot and not os.access(os.path.dirname(arguments.plot) or ".", os.W_OK):
        raise OptionError(f"--plot {arguments.plot}: no such folder, or it cannot be written to")


def _size(wanted: str | None, folders: Sequence[str]) -> int:
    """Bytes of the file to make."""
    if wanted is not None:
        size = parse_size(wanted)
    else:
        free = min(map(free_bytes, filter(os.path.isdir, folders)), default=DEFAULT_SIZE)
        size = max(min(DEFAULT_SIZE, free // SPARE_SHARE), SMALLEST_SIZE)
    if size < SMALLEST_SIZE:
        raise OptionError(f"--size {wanted}: at least {size_text(SMALLEST_SIZE)}")
    return size >> 20 << 20


def _plan(arguments: argparse.Namespace, usable: Sequence[Backend], size: int) -> Plan:
    return make_plan(
        backends=usable,
        directions=_directions(arguments),
        size=size,
        blocks=[parse_size(text) for text in arguments.block] if arguments.block else BLOCKS,
        depths=arguments.depth or DEPTHS,
        threads=arguments.threads or THREADS,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )


def _measure(
    arguments: argparse.Namespace, targets: list[Target], plan: Plan, refused: dict[str, str]
) -> Outcome:
    reader = targets[0].reader()
    reader.close()
    if not reader.direct:
        if arguments.save:
            raise OptionError(f"--save has no effect: a profile is of direct reads ({reader.direct_reason})")
        usable, refused = usable_backends(arguments.backend or BACKENDS, direct=False)
        plan = _plan(arguments, usable, min(target.size for target in targets))
    with _progress(plan.trials) as progress:
        measurements = sweep(targets, plan, progress)
    outcome = Outcome(targets, reader.direct, reader.alignment, refused, measurements)
    for direction in plan.directions:
        outcome.best[direction] = choose(item for item in measurements if item.direction == direction)
    if READ in outcome.best:
        _attempt(outcome, "reads into a window", lambda: _into_window(outcome, plan.seconds))
    if arguments.fio:
        _attempt(outcome, "fio", lambda: _compare(outcome))
    return outcome


def _into_window(outcome: Outcome, seconds: float) -> None:
    best = outcome.best[READ]
    outcome.window = into_window(outcome.targets, best.setting, seconds, best.rate)


def _compare(outcome: Outcome) -> None:
    """fio beside the best setting of each backend."""
    wanted = [
        (direction, setting)
        for direction in outcome.best
        for setting in _best_settings(outcome.measurements, direction)
    ]
    with _progress(len(wanted) * fio_module.ROUNDS) as progress:
        for direction, setting in wanted:
            outcome.comparisons += fio_module.compare(
                outcome.targets[0],
                direction,
                [setting],
                rounds=fio_module.ROUNDS,
                seconds=fio_module.SECONDS,
                progress=progress,
            )


def _draw(outcome: Outcome, path: str) -> None:
    names = " + ".join(dict.fromkeys(target.device.name for target in outcome.targets))
    plot_module.draw(outcome.measurements, f"{names}: {outcome.targets[0].folder}", path)
    outcome.notes.append(f"drawn to {path}")


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
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal."""
    with tqdm(total=total, unit="trial", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(text: str) -> None:
            bar.set_description(text)
            bar.update()

        yield advance


def _to_be_saved(arguments: argparse.Namespace, outcome: Outcome) -> bool:
    if arguments.save is not None or READ not in outcome.best:
        return bool(arguments.save)
    narrowed = [name for name in ("block", "depth", "threads", "backend") if getattr(arguments, name)]
    smallest = min(sum(target.size for target in group) for group in by_drive(outcome.targets))
    why = ""
    if narrowed:
        why = f"--{narrowed[0]} narrowed the sweep (--save keeps it all the same)"
    elif not outcome.direct:
        why = "the file is read through the page cache"
    elif smallest < SMALLEST_FOR_PROFILE:
        why = f"{size_text(smallest)} are too few to tell (--save keeps it all the same)"
    if why:
        outcome.notes.append(f"not kept as a profile: {why}")
    return not why


def _save(outcome: Outcome) -> None:
    """Keep the best read setting as the profile of each drive, with its part of the rate, into a window if known."""
    best, writes = outcome.window or outcome.best[READ], outcome.best.get(WRITE)
    for number, group in enumerate(by_drive(outcome.targets)):
        profile = Profile(
            best.setting.backend,
            best.setting.block_bytes,
            best.setting.depth,
            best.setting.threads,
            best.rate * best.shares[number],
            writes.rate * writes.shares[number] if writes else None,
            datetime.now().isoformat(timespec="seconds"),
        )
        device = group[0].device
        outcome.notes.append(f"kept as the profile of {device.name}: {save_profile(device, profile)}")


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
        if direction == READ and outcome.window is not None:
            window = outcome.window
            text += (
                f"\n  into {size_text(WINDOW_BYTES)} of memory, as zinfer reads ahead: {window.rate / 1e9:.2f} GB/s "
                f"({window.low / 1e9:.2f}-{window.high / 1e9:.2f})"
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
        "into_window": outcome.window.as_dict() if outcome.window is not None else None,
        "fio": [item.as_dict() for item in outcome.comparisons],
        "notes": outcome.notes,
        "failures": outcome.failures,
    }
    return json.dumps(document, indent=2) + "\n"


def _sizes(values: Sequence[int]) -> str:
    return " ".join(size_text(value).replace(" ", "") for value in values)


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))
