"""Measure a drive with plain direct reads: the yardstick that the engine is held against.

Deliberately not the engine: threads that call preadv with O_DIRECT into huge pages, nothing else.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from zinfer.errors import DriveError
from zinfer.pinned import Pool

BLOCK_BYTES = 4 << 20
THREADS = 2  # two 4-MiB readers keep a virtio or NVMe drive at its full speed


@dataclass(frozen=True)
class DriveRate:
    """`nbytes` read in `seconds`; `direct` tells whether the page cache was bypassed."""

    nbytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth in bytes a second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


def measure_read_rate(
    paths: Sequence[str], seconds: float = 1.0, buffer_bytes: int = THREADS * BLOCK_BYTES
) -> DriveRate:
    """Read `paths` front to back, again if they end, for about `seconds`, and tell how fast it went.

    Takes `buffer_bytes` of memory (8 MiB; rounded up to a block for each reader), of which every block is read into
    in turn: a few MiB stay in the processor's cache, and the drive can look faster than memory takes what it reads.
    Files shorter than a block are skipped. Raises DriveError when no path can be read, or nothing in `paths` is a
    block long.
    """
    blocks = [
        (path, index * BLOCK_BYTES) for path in paths for index in range(os.stat(path).st_size // BLOCK_BYTES)
    ]
    if not blocks:
        raise DriveError(
            f"{', '.join(paths)}: no file of {BLOCK_BYTES} bytes to measure the drive with",
            paths[0],
            0,
            BLOCK_BYTES,
            0,
            "probe",
        )
    descriptors, direct = _open_all(sorted({path for path, _ in blocks}))
    each = max(1, -(-buffer_bytes // (THREADS * BLOCK_BYTES)))  # blocks of a reader
    pool = Pool(THREADS * each * BLOCK_BYTES, page_lock="off")
    lock, total = threading.Lock(), [0]
    failures: list[DriveError] = []
    taken = (pool.acquire(each * BLOCK_BYTES) for _ in range(THREADS))
    regions = [region for region in taken if region is not None]
    cursor = itertools.count()
    started = time.perf_counter()
    deadline = started + seconds

    def reader() -> None:
        memory = memoryview(regions.pop())
        views = itertools.cycle([memory[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(each)])
        while time.perf_counter() < deadline and not failures:
            with lock:
                path, offset = blocks[next(cursor) % len(blocks)]
            try:
                count = os.preadv(descriptors[path], [next(views)], offset)
            except OSError as error:
                failures.append(
                    DriveError(
                        f"{path}: {error.strerror}", path, offset, BLOCK_BYTES, error.errno or 0, "probe"
                    )
                )
                return
            with lock:
                total[0] += count

    threads = [threading.Thread(target=reader) for _ in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - started
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        pool.close()
    if failures:
        raise failures[0]
    return DriveRate(total[0], elapsed, direct)


def _open_all(paths: Sequence[str]) -> tuple[dict[str, int], bool]:
    """Descriptors with O_DIRECT where the filesystem takes it, and whether all of them have it."""
    descriptors, direct = {}, True
    for path in paths:
        try:
            descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            direct = False
            try:
                descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DriveError(
                    f"{path}: {error.strerror}", path, 0, 0, error.errno or 0, "probe"
                ) from error
    return descriptors, direct
