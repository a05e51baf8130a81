"""Run a command in a memory cgroup of its own, page cache counted, and tell what it used.

    python -m benchmarks.cgroup --limit 3GiB --drive PATH -- COMMAND ...

Needs root and a writable cgroup hierarchy (v1 or v2).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import Drive, drive_of
from benchmarks.report import main_of
from zinfer.planner.memory import parse_size

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REMOVAL_SECONDS = 10.0
_numbers = itertools.count()


@dataclass(frozen=True)
class Usage:
    """What a command used. Sizes in bytes; `read` and `written` are the whole drive's.

    What only a group counts is None for a command without one.
    """

    exit_code: int
    limit: int | None
    max_usage: int | None
    limit_hits: int | None
    oom_kills: int | None
    peak_anonymous: int
    read: int
    written: int
    seconds: float
    tail: str


class MemoryGroup:
    """A cgroup directory; made by `memory_group` only, which also removes it."""

    def __init__(self, folder: Path, unified: bool) -> None:
        self.folder = folder
        self._unified = unified
        self._highest = 0

    def limit(self, count: int) -> None:
        """Cap memory, page cache included, at `count` bytes; swap gives no way round it."""
        if self._unified:
            self._write("memory.max", count)
            swap = "memory.swap.max", 0
        else:
            self._write("memory.limit_in_bytes", count)
            swap = "memory.memsw.limit_in_bytes", count
        if (self.folder / swap[0]).exists():
            self._write(*swap)

    def anonymous(self) -> int:
        """Anonymous memory in the group now, in bytes."""
        if self._unified:
            self._highest = max(self._highest, self._number("memory.current"))
        return self._field("memory.stat", "anon" if self._unified else "total_rss")

    @property
    def max_usage(self) -> int:
        """The most the group held, page cache included; sampled where a v2 kernel keeps no peak."""
        if not self._unified:
            return self._number("memory.max_usage_in_bytes")
        return self._number("memory.peak") if (self.folder / "memory.peak").exists() else self._highest

    @property
    def limit_hits(self) -> int:
        """How often the group ran into its limit (and memory was reclaimed)."""
        return self._field("memory.events", "max") if self._unified else self._number("memory.failcnt")

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel killed at the limit."""
        return self._field("memory.events" if self._unified else "memory.oom_control", "oom_kill")

    def remove(self) -> None:
        """Kill what is left in the group, give its page cache back and remove it."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while self.folder.exists():
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                if not self._unified:
                    self._write("memory.force_empty", 0)
                self.folder.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchmarkError(
                        f"{self.folder} cannot be removed: {error}; remove it by hand"
                    ) from error
                time.sleep(0.1)

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def _field(self, name: str, field: str) -> int:
        lines = (self.folder / name).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == field), 0)


@contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup]:
    """A fresh group limited to `limit` bytes (None: unlimited), removed again whatever happens.

    Raises BenchmarkError where this process may not make one.
    """
    root, unified = _hierarchy()
    folder = root / f"zinfer-benchmark-{os.getpid()}-{next(_numbers)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise BenchmarkError(
            f"no memory cgroup can be made under {root} ({error.strerror}): run as root"
        ) from error
    group = MemoryGroup(folder, unified)
    try:
        if limit is not None:
            group.limit(limit)
        yield group
    finally:
        group.remove()


def drop_page_cache() -> None:
    """Write dirty pages back and forget the clean ones. Raises BenchmarkError where that is not permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError as error:
        raise BenchmarkError(
            f"{DROP_CACHES}: {error.strerror}; run as root, or keep the page cache"
        ) from error


def run_limited(
    command: Sequence[str],
    limit: int | None,
    drive: Drive,
    *,
    keep_page_cache: bool = False,
    meanwhile: Callable[[], None] | None = None,
    seconds: float | None = None,
) -> Usage:
    """Run `command` in a group of its own that may hold `limit` bytes, from a cold page cache.

    `meanwhile` is called ten times a second; after `seconds` the command is killed.
    """
    with memory_group(limit) as group:
        if not keep_page_cache:
            drop_page_cache()
        join = ["sh", "-c", f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"', "sh", *command]
        usage = run_free(join, drive, lambda _: group.anonymous(), meanwhile=meanwhile, seconds=seconds)
        return replace(
            usage,
            limit=limit,
            max_usage=group.max_usage,
            limit_hits=group.limit_hits,
            oom_kills=group.oom_kills,
        )


def run_free(
    command: Sequence[str],
    drive: Drive,
    anonymous: Callable[[int], int] = anonymous_bytes,
    *,
    meanwhile: Callable[[], None] | None = None,
    seconds: float | None = None,
) -> Usage:
    """Run `command` without a group, which takes no root; `anonymous` tells the memory of a process id.

    `meanwhile` and `seconds` as in run_limited.
    """
    before = drive.traffic()

    def sample(pid: int) -> int:
        if meanwhile:
            meanwhile()
        return anonymous(pid)

    ended = run_sampled(command, sample, seconds=seconds)
    moved = drive.traffic() - before
    return Usage(
        exit_code=ended.exit_code,
        limit=None,
        max_usage=None,
        limit_hits=None,
        oom_kills=None,
        peak_anonymous=ended.peak,
        read=moved.read,
        written=moved.written,
        seconds=ended.seconds,
        tail=ended.tail,
    )


def _hierarchy() -> tuple[Path, bool]:
    """The root of the hierarchy with the memory controller, and whether it is v2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, point, filesystem, options, *_ in mounts:
        if filesystem == "cgroup" and "memory" in options.split(","):
            return Path(point), False
    for _, point, filesystem, *_ in mounts:
        if filesystem == "cgroup2" and "memory" in (Path(point) / "cgroup.controllers").read_text().split():
            active = Path(point) / "cgroup.subtree_control"
            if "memory" not in active.read_text().split():
                try:
                    active.write_text("+memory")
                except OSError as error:
                    raise BenchmarkError(f"{active}: {error.strerror}: run as root") from error
            return Path(point), True
    raise BenchmarkError("no cgroup hierarchy with the memory controller is mounted here")


def main(arguments: Sequence[str]) -> int:
    """Run one command and print its usage as JSON; exit code of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cgroup", description=__doc__.splitlines()[0])
    parser.add_argument("--limit", help="bytes, or for example 3GiB; default: none", default=None)
    parser.add_argument("--drive", help="a path on the drive whose traffic counts", default=".")
    parser.add_argument("--keep-page-cache", action="store_true", help="start with the page cache as it is")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    limit = parse_size(options.limit) if options.limit else None
    usage = run_limited(
        options.command, limit, drive_of(options.drive), keep_page_cache=options.keep_page_cache
    )
    sys.stdout.write(json.dumps(asdict(usage), indent=1) + "\n")
    return usage.exit_code


if __name__ == "__main__":
    main_of(main)
