"""What is measured: settings, directions, and how long each may take. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from zinfer.aio.profile import MAX_BLOCK_BYTES, MAX_DEPTH, MAX_WORKERS, Backend
from zinfer.errors import OptionError

READ, WRITE = "read", "write"
DIRECTIONS = (READ, WRITE)
BLOCKS = (256 << 10, 1 << 20, 4 << 20)  # bytes
DEPTHS = (1, 4, 8, 32)
THREADS = (1, 2, 4, 8)
PAGE = 4096  # bytes; what O_DIRECT asks of a block
MAX_IN_FLIGHT = 512 << 20  # bytes of memory that one setting may take; a sweep leaves out what takes more
ROUNDS = 5
SECONDS = 50.0  # of measuring; a minute with what is around it
SHORTEST = 0.02  # seconds of one trial
MAX_WRITTEN = 16 << 30  # bytes that a sweep writes, so that it is no wear to speak of
LEAST_WRITTEN = 3  # times what is in flight: less would measure the queue filling and emptying


@dataclass(frozen=True)
class Setting:
    """How bytes are moved: `depth` operations of `block_bytes` at once; of "threads", by as many threads."""

    backend: Backend
    block_bytes: int
    depth: int

    @property
    def in_flight(self) -> int:
        """Bytes under way at once."""
        return self.block_bytes * self.depth

    @property
    def threads(self) -> int:
        """Threads that move bytes; the kernel's asynchronous backends need none."""
        return self.depth if self.backend == "threads" else 1


@dataclass(frozen=True)
class Plan:
    """What to measure: every setting in every direction, `rounds` times for about `seconds` each.

    `allowances`: the bytes that one trial of each setting may write.
    """

    settings: tuple[Setting, ...]
    directions: tuple[str, ...]
    rounds: int
    seconds: float
    allowances: Mapping[Setting, int]

    @property
    def trials(self) -> int:
        """Trials in all."""
        return len(self.settings) * len(self.directions) * self.rounds

    def order(self) -> Iterator[tuple[str, Setting]]:
        """(direction, setting): each round backwards after forwards, so that a drift hits all alike."""
        for number in range(self.rounds):
            for direction in self.directions:
                for setting in self.settings if number % 2 == 0 else reversed(self.settings):
                    yield direction, setting


def make_plan(
    *,
    backends: Sequence[Backend],
    directions: Sequence[str] = DIRECTIONS,
    size: int,
    blocks: Sequence[int] = BLOCKS,
    depths: Sequence[int] = DEPTHS,
    threads: Sequence[int] = THREADS,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Plan:
    """The grid of all combinations that a file of `size` bytes and the memory allow, within `seconds` in all.

    `depths` are for io_uring and libaio, `threads` for threads. All writes together are MAX_WRITTEN bytes at most.
    Raises OptionError for a value out of range, or when nothing is left.
    """
    for block in blocks:
        if block % PAGE or not PAGE <= block <= MAX_BLOCK_BYTES or block & (block - 1):
            raise OptionError(
                f"a block of {block} bytes: choose a power of two from {PAGE} bytes to {MAX_BLOCK_BYTES >> 30} GiB"
            )
    _check("depth", depths, MAX_DEPTH)
    _check("threads", threads, MAX_WORKERS)
    _check("rounds", [rounds], 1000)
    if not 0 < seconds <= 86400:
        raise OptionError(f"seconds is {seconds}; choose up to 86400")
    grid = dict.fromkeys(
        Setting(backend, block, count)
        for backend in backends
        for block, count in product(blocks, threads if backend == "threads" else depths)
    )
    settings = tuple(item for item in grid if item.in_flight <= MAX_IN_FLIGHT and item.block_bytes <= size)
    if not settings or not directions:
        raise OptionError(
            f"no setting is left to measure: a block may be no larger than the file ({size} bytes), and depth "
            f"times block no more than {MAX_IN_FLIGHT >> 20} MiB"
        )
    trials = len(settings) * len(directions) * rounds
    allowances = _allowances(settings, rounds) if WRITE in directions else {}
    return Plan(settings, tuple(directions), rounds, max(seconds / trials, SHORTEST), allowances)


def _allowances(settings: Sequence[Setting], rounds: int) -> dict[Setting, int]:
    """Equal shares of what a round may write, but for settings that need more to fill their queue."""
    left, rest = MAX_WRITTEN // rounds, sorted(settings, key=lambda item: -item.in_flight)
    allowances = {}
    while rest and (needed := LEAST_WRITTEN * rest[0].in_flight) > left // len(rest):
        allowances[rest.pop(0)] = needed
        left -= needed
    if left < 0:
        raise OptionError(
            f"writing with all these settings takes more than {MAX_WRITTEN >> 30} GiB; choose fewer, less depth, "
            "smaller blocks, fewer rounds, or --read"
        )
    return allowances | {setting: left // len(rest) for setting in rest}


def _check(name: str, values: Sequence[int], most: int) -> None:
    for value in values:
        if not 1 <= value <= most:
            raise OptionError(f"{name} is {value}; choose from 1 to {most}")
