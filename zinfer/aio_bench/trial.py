"""Measure one setting once: keep its engines full for a while and count what they move."""

from __future__ import annotations

import os
import select
import time
from collections import Counter, deque
from collections.abc import Sequence

from zinfer.aio import Engine, File, Request
from zinfer.aio_bench.measurement import Trial
from zinfer.aio_bench.memory import hold
from zinfer.aio_bench.settings import READ, Setting
from zinfer.aio_bench.target import Target
from zinfer.errors import DriveError
from zinfer.pinned import Pool, Region

BATCH_BYTES = 256 << 20  # of one request, at most: the less often Python is asked, the less it costs
BATCHES = 4  # at least, in a trial
PREPARED = 1 << 14  # blocks of a file, up to which all requests are made ready before the clock starts
STALLED = 60.0  # seconds without one finished batch: the drive has gone


class Stream:
    """One target's share of a trial: its engine, its file, and requests enough to keep `depth` blocks moving.

    The memory is `depth` blocks, used round and round, exactly what fio would use: more of it would sit less in
    the processor's cache and be slower. A block may so land where another one is still landing: what is measured
    is the way there, not the bytes.
    """

    def __init__(self, target: Target, setting: Setting, direction: str, region: Region, batch: int) -> None:
        self._reading = direction == READ
        self._block, self._region = setting.block_bytes, region
        self._slots = setting.depth
        blocks = target.size // setting.block_bytes
        self._batch = min(max(1, batch // setting.block_bytes), blocks)
        self._batches = blocks // self._batch
        self._next = 0
        self._extents: dict[int, list[tuple[File, int, int, int, bool]]] = {}
        self._queue: deque[Request] = deque()
        self._spare = 1 + -(-setting.depth // self._batch)  # one more than what the depth takes
        writer = target.writer
        self._file: File | None = None
        self.engine = Engine(
            setting.backend,
            depth=setting.depth,
            block_bytes=setting.block_bytes,
            workers=setting.threads,
            bounce_slot_bytes=1 << 20,
        )
        try:
            if self._reading:
                self._file = self._moved = target.reader()
            elif writer is not None:
                self._moved = writer
            else:
                raise ValueError(f"{target.path} is only to be read")
        except BaseException:
            self.engine.close()
            raise
        for number in range(self._batches if blocks <= PREPARED else 0):
            self._prepare(number)

    def _prepare(self, number: int) -> list[tuple[File, int, int, int, bool]]:
        """The extents of a batch, made once."""
        extents = [
            (
                self._moved,
                block * self._block,
                self._block,
                self._region.address + block % self._slots * self._block,
                False,
            )
            for block in range(number * self._batch, (number + 1) * self._batch)
        ]
        self._extents[number] = extents
        return extents

    def fill(self) -> None:
        """Submit until the queue is full."""
        while len(self._queue) < self._spare:
            self._queue.append(self._submit())

    def collect(self) -> int:
        """Bytes of the requests at the head of the queue that are done. Raises DriveError when one failed."""
        moved = 0
        while self._queue and self._queue[0].done:
            request = self._queue.popleft()
            request.wait()
            moved += request.nbytes
        return moved

    def close(self) -> None:
        """Drop what is queued, drain what is in flight."""
        for request in self._queue:
            request.cancel()
        self.engine.close()
        self._queue.clear()
        if self._file is not None:
            self._file.close()

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
) -> Trial:
    """Move bytes of all `targets` at once for about `seconds`, or `most_bytes` of each if that is sooner.

    `pool` has `setting.in_flight` free bytes for each target. `expected_rate`, in bytes a second, sets how much
    is asked for at a time. Raises DriveError; OptionError
    when the backend does not work here.
    """
    share = expected_rate / len(targets)
    batch = int(min(BATCH_BYTES, share * seconds / BATCHES, most_bytes or BATCH_BYTES))
    streams: list[Stream] = []
    try:
        for target in targets:
            region = hold(pool, setting.in_flight)
            streams.append(Stream(target, setting, direction, region, batch))
        return _measure(streams, seconds, most_bytes and most_bytes * len(targets))
    finally:
        for stream in streams:
            stream.close()


def _measure(streams: Sequence[Stream], seconds: float, most_bytes: int | None) -> Trial:
    poll = select.poll()
    for stream in streams:
        poll.register(stream.engine.eventfd, select.POLLIN)
        stream.fill()
    _wait(poll, streams)  # the first batch pays for waking up
    started, cpu = time.perf_counter(), time.process_time()
    moved, now = 0, started
    while not moved or (now - started < seconds and (most_bytes is None or moved < most_bytes)):
        moved += _wait(poll, streams)
        now = time.perf_counter()
    cpu = time.process_time() - cpu
    latencies: Counter[float] = Counter()
    for stream in streams:
        latencies.update(dict(stream.engine.latencies))
    return Trial(moved, now - started, cpu, latencies)


def _wait(poll: select.poll, streams: Sequence[Stream]) -> int:
    """Wait until at least one request is done; put others in the place of all that are; the bytes they moved."""
    while True:
        moved = 0
        for stream in streams:
            if count := stream.collect():
                moved += count
                stream.fill()
        if moved:
            return moved
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
