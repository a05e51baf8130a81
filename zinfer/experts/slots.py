"""Memory for experts: slots of one size, each free again when the last tensor on it has died."""

from __future__ import annotations

import heapq
import os
import threading
import weakref
from functools import partial
from typing import Any, Literal

from zinfer.pinned import Pool, Region
from zinfer.pinned.pages import give_back, populate
from zinfer.weights.layout import round_up

STEP_BYTES = 2 << 20  # made present at a time; other threads that map memory wait for it
LAST_IN_LINE = 19  # niceness: operators go first


class Slots:
    """At most `count` slots of `nbytes` in one mapping.

        absent --made present--> free --take()--> held --last view dies--> free
          ^                                                                 |
          +------------------------- shrink() ------------------------------+

    Fresh memory is slow at first use, seconds for gigabytes: a thread makes slots present, the lowest first, while the
    model runs, and until then few slots are used over and over; page-locked ones (`page_lock` as for Pool) are
    present at once, and for good. The lowest free one is taken, so that the highest can
    be given back. Any thread may call any method.
    """

    def __init__(
        self, count: int, nbytes: int, page_lock: Literal["auto", "off"] = "off", numa_node: int | None = None
    ) -> None:
        self.nbytes = round_up(nbytes)
        self.count = count
        self.pool = Pool(count * self.nbytes, page_lock=page_lock, numa_node=numa_node, touch_threads=0)
        self._block: Region | None = self.pool.acquire(count * self.nbytes)
        assert self._block is not None
        self._lock = threading.RLock()  # a tensor may die, and call back, inside a method here
        self._free: list[int] = []
        self._held: dict[int, weakref.ref[memoryview]] = {}
        self._absent = list(range(count))  # a heap, as the free ones are
        self._allowed = count
        self._closing = threading.Event()
        self._work = threading.Semaphore(0)
        if self.pool.page_locked:
            self._free, self._absent = self._absent, []
        else:
            self._make_present(heapq.heappop(self._absent))
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._closing, self._work), name="zinfer-touch", daemon=True
        )
        self._thread.start()
        self._work.release()

    @property
    def present(self) -> int:
        """Slots that can be used without waiting for memory."""
        with self._lock:
            return len(self._free) + len(self._held)

    def take(self) -> tuple[memoryview, int] | None:
        """A view of a free slot, which whatever is made over it keeps alive, and its address; None if there is none."""
        with self._lock:
            if not self._free or self._block is None:
                return None
            slot = heapq.heappop(self._free)
            view = memoryview(self._block)[slot * self.nbytes : (slot + 1) * self.nbytes]
            # Not weakref.finalize: that would run at the interpreter's end too.
            self._held[slot] = weakref.ref(view, partial(_died, weakref.ref(self), slot))
            return view, self._block.address + slot * self.nbytes

    def allow(self, count: int) -> None:
        """Have at most `count` slots present; those that are free beyond go back to the kernel, others as they die."""
        with self._lock:
            self._allowed = min(count, self.count)
            self._shrink()
            if self._absent and self._present_or_coming() < self._allowed:
                self._work.release()

    def close(self) -> None:
        """Give the memory back as soon as the last view dies. Idempotent."""
        self._closing.set()
        self._work.release()
        if self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._block = None
        self.pool.close()

    def _present_or_coming(self) -> int:
        return len(self._free) + len(self._held)

    def _shrink(self) -> None:
        block = self._block
        while block is not None and self._free and self._present_or_coming() > self._allowed:
            highest = max(self._free)
            self._free.remove(highest)
            heapq.heapify(self._free)
            if not self.pool.page_locked:
                give_back(block.address + highest * self.nbytes, self.nbytes)
            heapq.heappush(self._absent, highest)

    def _make_next_present(self) -> bool:
        """Whether there may be another one to make present."""
        with self._lock:
            if not self._absent or self._present_or_coming() >= self._allowed:
                return False
            slot = heapq.heappop(self._absent)
        self._make_present(slot)
        return True

    def _make_present(self, slot: int) -> None:
        block = self._block
        if block is None:
            return
        start = block.address + slot * self.nbytes
        for at in range(start, start + self.nbytes, STEP_BYTES):
            if self._closing.is_set() or not populate(at, min(STEP_BYTES, start + self.nbytes - at)):
                break  # its pages come when it is read, as on an old kernel all do
        with self._lock:
            heapq.heappush(self._free, slot)
            self._shrink()

    def _view_died(self, slot: int) -> None:
        with self._lock:
            del self._held[slot]
            heapq.heappush(self._free, slot)
            self._shrink()


def _died(owner: weakref.ref[Slots], slot: int, _: Any) -> None:
    slots = owner()
    if slots is not None:
        slots._view_died(slot)


def _run(owner: weakref.ref[Slots], closing: threading.Event, work: threading.Semaphore) -> None:
    """Make slots present, as long as somebody has the Slots."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST_IN_LINE)  # of this thread alone
    while not closing.is_set():
        slots = owner()
        if slots is None:
            return
        more = slots._make_next_present()
        del slots
        if not more:
            work.acquire(timeout=1.0)  # seconds: where nobody closes, it has to end with the Slots
