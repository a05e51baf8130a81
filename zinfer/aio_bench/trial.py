"""Measure one setting once: keep its engines full for a while and count what they move."""

from __future__ import annotations

import bisect
import os
import select
import time
from collections import Counter, deque
from collections.abc import Sequence

from zinfer.aio import Engine, File, Request
from zinfer.aio_bench.measurement import Trial
from zinfer.aio_bench.memory import hold
from zinfer.aio_bench.settings import READ, Setting
from zinfer.aio_bench.target import Target, by_drive
from zinfer.errors import DriveError
from zinfer.pinned import Pool, Region

BATCH_BYTES = 256 << 20  # of one request, at most: the less often Python is asked, the less it costs
BATCHES = 4  # at least, in a trial
PREPARED = 1 << 14  # blocks of a file, up to which all requests are made ready before the clock starts
STALLED = 60.0  # seconds without one finished batch: the drive has gone


class Stream:
    """One drive's share of a trial: its engine, its files, and requests enough to keep `depth` blocks moving.

    It submits no more than `allowance` bytes, if that is given.

    `region` is used round and round, block by block. With `depth` blocks, it is exactly what fio would use: more of it
    sits less in the processor's cache, and is slower. A block may so land where another one is still landing: what is
    measured is the way there, not the bytes.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        setting: Setting,
        direction: str,
        region: Region,
        batch: int,
        allowance: int | None,
    ) -> None:
        self._reading = direction == READ
        self._allowance = allowance
        self.moved = 0  # bytes of the requests that were collected
        self._block, self._region = setting.block_bytes, region
        self._slots = region.nbytes // setting.block_bytes
        # Blocks are counted through all files: file number n has those from _firsts[n] on.
        counts = [target.size // setting.block_bytes for target in targets]
        self._firsts = [sum(counts[:number]) for number in range(len(counts))]
        blocks = sum(counts)
        self._batch = min(max(1, batch // setting.block_bytes), blocks)
        self._batches = blocks // self._batch
        self._next = 0
        self._extents: dict[int, list[tuple[File, int, int, int, bool]]] = {}
        self._queue: deque[Request] = deque()
        self._spare = 1 + -(-setting.depth // self._batch)  # one more than what the depth takes
        self._files: list[File] = []
        self.engine = Engine(
            setting.backend,
            depth=setting.depth,
            block_bytes=setting.block_bytes,
            workers=setting.threads,
            bounce_slot_bytes=1 << 20,
        )
        try:
            for target in targets:
                if self._reading:
                    self._files.append(target.reader())
                elif target.writer is not None:
                    self._files.append(target.writer)
                else:
                    raise ValueError(f"{target.path} is only to be read")
        except BaseException:
            self.close()
            raise
        for number in range(self._batches if blocks <= PREPARED else 0):
            self._prepare(number)

    def _prepare(self, number: int) -> list[tuple[File, int, int, int, bool]]:
        """The extents of a batch, made once."""
        extents = [self._extent(block) for block in range(number * self._batch, (number + 1) * self._batch)]
        self._extents[number] = extents
        return extents

    def _extent(self, block: int) -> tuple[File, int, int, int, bool]:
        number = bisect.bisect_right(self._firsts, block) - 1
        offset = (block - self._firsts[number]) * self._block
        address = self._region.address + block % self._slots * self._block
        return self._files[number], offset, self._block, address, False

    def fill(self) -> bool:
        """Submit until the queue is full; False when the allowance ends that before."""
        nbytes = self._batch * self._block
        while len(self._queue) < self._spare:
            if self._allowance is not None:
                if self._allowance < nbytes:
                    return False
                self._allowance -= nbytes
            self._queue.append(self._submit())
        return True

    def collect(self) -> int:
        """Bytes of the requests at the head of the queue that are done. Raises DriveError when one failed."""
        before = self.moved
        while self._queue and self._queue[0].done:
            request = self._queue.popleft()
            request.wait()
            self.moved += request.nbytes
        return self.moved - before

    def close(self) -> None:
        """Drop what is queued, drain what is in flight."""
        for request in self._queue:
            request.cancel()
        self.engine.close()
        self._queue.clear()
        for file in self._files if self._reading else ():
            file.close()

    def _submit(self) -> Request:
        extents = self._extents.get(self._next) or self._prepare(self._next)
        self._next = (self._next + 1) % self._batches
        move = self.engine.read if self._reading else self.engine.write
        return move(extents, self._region)


def run_trial(
    targets: Sequence[Target],
    setting: Setting,
    direction: str,
    *,
    pool: Pool,
    seconds: float,
    expected_rate: float,
    most_bytes: int | None = None,
    memory_bytes: int = 0,
) -> Trial:
    """Move bytes of all `targets` at once for about `seconds`, and no more than `most_bytes` if that is given.

    Those on one drive share a queue, and go to `setting.in_flight` bytes of `pool`, or to `memory_bytes` if that is
    more, so many for each drive. `expected_rate`, in bytes a second, sets how much is asked for at a time. Raises
    DriveError; OptionError when the backend does not work here.
    """
    drives = by_drive(targets)
    allowance = None if most_bytes is None else most_bytes // len(drives)
    batch = int(min(BATCH_BYTES, expected_rate / len(drives) * seconds / BATCHES))
    if allowance is not None:
        batch = min(batch, (allowance - setting.in_flight) // BATCHES)
    streams: list[Stream] = []
    try:
        for group in drives:
            region = hold(pool, max(setting.in_flight, memory_bytes))
            streams.append(Stream(group, setting, direction, region, batch, allowance))
        return _measure(streams, seconds)
    finally:
        for stream in streams:
            stream.close()


def _measure(streams: Sequence[Stream], seconds: float) -> Trial:
    poll = select.poll()
    for stream in streams:
        poll.register(stream.engine.eventfd, select.POLLIN)
        stream.fill()
    full = _wait(poll, streams)  # the first batch pays for waking up
    before = [stream.moved for stream in streams]
    started, cpu = time.perf_counter(), time.process_time()
    moved, now = 0, started
    while not moved or (full and now - started < seconds):
        full = _wait(poll, streams)
        moved = sum(stream.moved for stream in streams) - sum(before)
        now = time.perf_counter()
    cpu = time.process_time() - cpu
    each = tuple(stream.moved - earlier for stream, earlier in zip(streams, before, strict=True))
    latencies: Counter[float] = Counter()
    for stream in streams:
        latencies.update(dict(stream.engine.latencies))
    return Trial(moved, now - started, cpu, latencies, each)


def _wait(poll: select.poll, streams: Sequence[Stream]) -> bool:
    """Wait until at least one request is done; put others in the place of all that are: False where none may come."""
    while True:
        finished = [stream for stream in streams if stream.collect()]
        if finished:
            return all([stream.fill() for stream in finished])
        ready = poll.poll(STALLED * 1000)
        if not ready:
            raise DriveError("no block moved for a minute: has the drive gone?", "", 0, 0, 0, "aio_bench")
        for descriptor, _ in ready:
            _drain(descriptor)


def _drain(descriptor: int) -> None:
    try:
        os.eventfd_read(descriptor)
    except BlockingIOError:
        return  # counted by an earlier look
