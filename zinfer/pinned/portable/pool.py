"""The pinned pool: one mapping, handed out in regions that return by themselves."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Iterator

from zinfer.errors import BudgetError, ClosedError, OptionError
from zinfer.pinned.portable.numa import online_nodes
from zinfer.pinned.portable.region import Region, Run, region_over
from zinfer.pinned.portable.runs import Runs
from zinfer.pinned.portable.slab import HUGE_PAGE_BYTES, PAGE_BYTES, Slab

COUNTS = ("acquires", "releases", "refusals", "waits")
REASONS = {
    "auto": "page-locking needs zinfer's compiled modules, which are not in use",
    "off": 'page_lock="off"',
}
NUMA_REASON = "placing memory on a NUMA node needs zinfer's compiled modules, which are not in use"
LARGEST_SLAB = 1 << 30
MOST_THREADS = 8
_SLICE = 0.1  # seconds between looks at what has returned, and at signals


class Pool:
    """One private anonymous mapping of `capacity` bytes, mapped and touched once; see zinfer.pinned.

    Any thread may call anything. The memory outlives every region. In a forked child `close` does nothing and
    everything but `capacity` raises `zinfer.errors.ClosedError`.

    A region may die at any point of any thread, with the pool's lock in that thread's own hands too: the cycle
    collector chooses. So what returns is put on a queue, which whoever has the lock empties.
    """

    def __init__(
        self,
        capacity: int,
        *,
        page_lock: str = "auto",
        huge_pages: bool = True,
        touch_threads: int | None = None,
        numa_node: int | None = None,
        slab_bytes: int = LARGEST_SLAB,
    ) -> None:
        """Map and touch `capacity` bytes, rounded up to a multiple of 4096.

        `page_lock`: "auto" goes without and says so in `page_lock_reason`; "on" raises; "off" does not try.
        `huge_pages`: ask for 2-MiB pages (from 2 MiB of capacity on), else refuse them.
        `touch_threads`: threads that make the pages present, the caller one of them; None for one a CPU, at most 8;
            0: pages come when they are first used.
        `numa_node`: without effect but for `numa_reason`: placing memory on a node needs the compiled modules.
        `slab_bytes`: as in the compiled pool; without a page lock, slabs have no edges that matter.

        Raises `zinfer.errors.OptionError` (a ValueError) for an argument out of range and
        `zinfer.errors.BudgetError` when the memory, or a page lock under "on", cannot be had.
        """
        self._slab: Slab | None = None
        nbytes = operator.index(capacity)
        if nbytes < 1:
            raise OptionError(f"capacity must be at least 1 byte, not {nbytes}")
        if touch_threads is None:
            touch_threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
        if touch_threads < 0:
            raise OptionError(f"touch_threads must be at least 0, not {touch_threads}")
        if page_lock not in ("auto", "on", "off"):
            raise OptionError(f'page_lock must be "auto", "on" or "off", not "{page_lock}"')
        if not 0 < slab_bytes <= LARGEST_SLAB or slab_bytes % HUGE_PAGE_BYTES:
            raise OptionError(
                f"slab_bytes must be a multiple of {HUGE_PAGE_BYTES}, at most {LARGEST_SLAB}, not {slab_bytes}"
            )
        online = online_nodes()
        if numa_node is not None and numa_node not in online:
            names = ", ".join(map(str, online))
            raise OptionError(f"numa_node is {numa_node}, but the nodes online are: {names}")
        self._slab_bytes = slab_bytes
        self._numa_reason = "" if numa_node is None else NUMA_REASON
        self._capacity = _up_to_page(nbytes)
        if page_lock == "on":
            raise BudgetError(
                f'cannot page-lock {self._capacity} bytes: {REASONS["auto"]}; use page_lock="auto" to go without, '
                "or install g++ and install zinfer again"
            )
        self._owner = os.getpid()
        self._reason = REASONS[page_lock]
        self._runs = Runs(self._capacity)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._peak = 0
        self._closed = False
        self._returned: deque[int] = deque()  # offsets of runs whose last view has died
        self._changed = threading.Condition(threading.Lock())
        slab = Slab(self._capacity, huge_pages)
        self._slab = slab
        slab.touch(touch_threads)

    def __del__(self) -> None:
        if self._slab is not None:  # no region is out: each holds its pool
            self._slab.unmap()

    def acquire(self, nbytes: int, timeout: float = 0.0) -> Region | None:
        """A contiguous region of `nbytes` bytes rounded up to a multiple of 4096, or None when none is free.

        Waits up to `timeout` seconds (`math.inf` allowed) for regions to return. Waiters are not queued: a small
        request may overtake a large one. Placed next-fit, so that first-in first-out use makes a ring buffer.

        Raises ValueError (`nbytes` < 1, `timeout` negative or NaN), `zinfer.errors.BudgetError` (more than
        `capacity`) and `zinfer.errors.ClosedError` (closed before or during the wait, or in a forked child).
        """
        if not timeout >= 0:
            raise ValueError("timeout must be 0 or more seconds")
        deadline = time.monotonic() + timeout
        with self._locked():
            wanted = self._checked(nbytes)
            waited = False
            while (region := self._take(wanted)) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._counts["refusals"] += 1
                    return None
                self._counts["waits"] += not waited
                waited = True
                self._changed.wait(min(left, _SLICE))
                self._take_returned()
            return region

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and held runs tile the pool, coalesced, and the counts agree."""
        with self._locked():
            self._runs.check_integrity()
            if self._counts["acquires"] - self._counts["releases"] != self._runs.held_runs:
                raise RuntimeError("pinned pool: the count of regions is wrong")

    def close(self) -> None:
        """Refuse further `acquire`; unmap now, or when the last region out has died. Idempotent."""
        if os.getpid() != self._owner:
            return
        with self._locked():
            self._closed = True
            self._unmap_if_done()
            self._changed.notify_all()

    @property
    def capacity(self) -> int:
        """Bytes of the pool."""
        return self._capacity

    @property
    def base_address(self) -> int:
        """Address of the pool's first byte; 0 once unmapped."""
        with self._locked():
            return self._slab.address if self._slab is not None else 0

    @property
    def slab_bytes(self) -> int:
        """As given."""
        return self._slab_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes in no region."""
        with self._locked():
            return self._runs.free_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run: the largest `acquire` that would succeed now."""
        with self._locked():
            return self._runs.largest_free

    @property
    def in_use(self) -> int:
        """Bytes in regions."""
        with self._locked():
            return self._runs.held_bytes

    @property
    def peak_in_use(self) -> int:
        """The highest `in_use` so far."""
        with self._locked():
            return self._peak

    @property
    def page_locked(self) -> bool:
        """Whether the memory is registered with the CUDA runtime now: never."""
        self._refuse_if_forked()
        return False

    @property
    def locked_bytes(self) -> int:
        """Bytes that are registered with the CUDA runtime: none."""
        self._refuse_if_forked()
        return 0

    @property
    def page_lock_reason(self) -> str:
        """Why the memory is not page-locked."""
        with self._locked():
            return self._reason if self._slab is not None else "the pool is closed"

    @property
    def numa_reason(self) -> str:
        """Why the memory is not bound to `numa_node`; empty when none was given."""
        with self._locked():
            return self._numa_reason if self._slab is not None else "the pool is closed"

    @property
    def huge_bytes(self) -> int | None:
        """Bytes on huge pages now, counted in /proc/self/smaps at each call; 0 once unmapped, None where unreadable."""
        self._refuse_if_forked()
        slab = self._slab
        try:
            return slab.huge_bytes() if slab is not None else 0
        except OSError:
            return None

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start, and the regions out now; see zinfer.pinned."""
        with self._locked():
            return {**self._counts, "peak_in_use": self._peak, "regions": self._runs.held_runs}

    def _refuse_if_forked(self) -> None:
        if os.getpid() != self._owner:
            raise ClosedError(
                "the pinned pool belongs to the parent process: make a new one in a forked child"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._refuse_if_forked()  # before the lock, which may have been copied locked
        try:
            with self._changed:
                self._take_returned()
                yield
        finally:
            self._settle()

    def _give_back(self, offset: int) -> None:
        """Called where the last view of a run dies; in a forked child the pool is somebody else's."""
        if os.getpid() == self._owner:
            self._returned.append(offset)
            self._settle()

    def _settle(self) -> None:
        """Empty the queue, unless somebody has the lock: then it is his to empty, once he has let go of it."""
        while self._returned and self._changed.acquire(blocking=False):
            try:
                self._take_returned()
            finally:
                self._changed.release()

    def _take_returned(self) -> None:
        if not self._returned:
            return
        while self._returned:
            self._runs.give_back(self._returned.popleft())
            self._counts["releases"] += 1
        self._unmap_if_done()
        self._changed.notify_all()

    def _unmap_if_done(self) -> None:
        if self._closed and not self._runs.held_runs and self._slab is not None:
            self._slab.unmap()
            self._slab = None

    def _checked(self, nbytes: int) -> int:
        wanted = operator.index(nbytes)
        if wanted < 1:
            raise ValueError(f"nbytes must be at least 1, not {wanted}")
        wanted = _up_to_page(wanted)
        if wanted > self._capacity:
            raise BudgetError(
                f"a region of {wanted} bytes cannot fit a pinned pool of {self._capacity} bytes; raise the host memory "
                'budget (max_memory["cpu"])'
            )
        return wanted

    def _take(self, nbytes: int) -> Region | None:
        if self._closed or self._slab is None:
            raise ClosedError("the pinned pool is closed")
        offset = self._runs.take(nbytes)
        if offset is None:
            return None
        self._counts["acquires"] += 1
        self._peak = max(self._peak, self._runs.held_bytes)
        return region_over(Run(self._slab.address + offset, nbytes, offset, self._give_back))


def _up_to_page(nbytes: int) -> int:
    return (nbytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
