"""The memory of the weights that stay: a fixed place for each, made present in the background."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from zinfer.errors import ClosedError
from zinfer.pinned import Pool, Region
from zinfer.pinned.pages import HUGE_PAGE_BYTES, give_back, populate
from zinfer.weights.weight import Weight
from zinfer.wording import size_text

logger = logging.getLogger("zinfer")

STEP_BYTES = 2 << 20  # made present at a time; other threads that map memory wait for it
MOST_THREADS = 4
LAST_IN_LINE = 19  # niceness: operators go first


class Residents:
    """One mapping with a fixed place for each of `weights`, so that keeping one can never fail for want of room.

    Fresh memory is slow at first use, seconds for gigabytes, and the first sweep needs none of it: a thread makes
    the places present one by one, in the order of `weights`, while the model already runs. Before its turn a weight
    can be read through the window.

        absent --populate--> present --take()--> held --last tensor on it dies--> present
                     ^                             |
                     +------- absent <--release()--+   (once the last tensor on it has died)

    `wanted` are those that are to be resident now; the places of the others are left absent. `at_once`: all places
    are present when the constructor returns, which the log tells of, as it takes seconds for gigabytes. `page_lock` as
    for Pool, which makes pages present to lock them. Any thread may call any method.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        wanted: Sequence[Weight],
        numa_node: int | None,
        *,
        at_once: bool,
        page_lock: Literal["auto", "off"] = "off",
    ) -> None:
        self._places: dict[Weight, int] = {}
        total = 0
        for weight in weights:
            self._places[weight] = total
            total += weight.layout.nbytes
        self._order = list(self._places)
        self._lock = threading.RLock()  # a tensor may die, and call back, inside a method here
        self._held: dict[Weight, int] = dict.fromkeys(self._places, 0)  # views of its place that are out
        self._watching: dict[int, weakref.ref[memoryview]] = {}
        self._released: set[Weight] = set(self._places) - set(wanted)
        self._present = set(self._places) if at_once else set()
        self._closing = threading.Event()
        self._absent = iter(self._places.items())  # what the populating threads have still to do
        self._populating: list[threading.Thread] = []
        self.pool: Pool | None = None
        self._block: Region | None = None
        if not total:
            return
        started = time.perf_counter()
        if at_once:
            logger.info("making %s of host memory present for weights", size_text(total))
        self.pool = Pool(
            total, page_lock=page_lock, numa_node=numa_node, touch_threads=None if at_once else 0
        )
        if at_once:
            locked = " and page-locked" if self.pool.page_locked else ""
            seconds = time.perf_counter() - started
            logger.info("%s of host memory are present%s after %.1f s", size_text(total), locked, seconds)
        self._block = self.pool.acquire(total)
        assert self._block is not None
        if not at_once:
            self._start_populating(self._block.address, last_in_line=True)

    def hurry(self) -> None:
        """Make the rest present with a thread that does not stand back: the first token is out."""
        with self._lock:
            if (
                self._block is not None
                and len(self._populating) == 1
                and len(self._present) < len(self._places)
            ):
                self._start_populating(self._block.address, last_in_line=False)

    def _start_populating(self, address: int, *, last_in_line: bool) -> None:
        thread = threading.Thread(
            target=self._populate, args=(address, last_in_line), name="zinfer-touch", daemon=True
        )
        thread.start()
        self._populating.append(thread)

    def _populate(self, address: int, last_in_line: bool) -> None:
        if last_in_line:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST_IN_LINE)  # of this thread alone
        while not self._closing.is_set():
            with self._lock:
                weight, place = next(self._absent, (None, 0))
            if weight is None:
                return
            end = place + weight.layout.nbytes
            for at in range(place, end, STEP_BYTES):
                if self._closing.is_set():
                    return
                if weight in self._released or not populate(address + at, min(STEP_BYTES, end - at)):
                    break  # its pages come when it is read, as on an old kernel all do
            with self._lock:
                self._present.add(weight)
                self._give_back_if_free(weight)

    def has(self, weight: Weight) -> bool:
        """Whether `weight` has a place."""
        return weight in self._places

    def present(self, weight: Weight) -> bool:
        """Whether `weight` has a place that need not be waited for."""
        return weight in self._present

    def ready(self, weight: Weight) -> bool:
        """Whether its place is present, and nothing lies there that somebody may still look at."""
        return weight in self._present and not self._held[weight]

    def take(self, weight: Weight) -> tuple[Any, int]:
        """A view of the place of `weight`, which whatever is made over it keeps alive, and its address."""
        with self._lock:
            if self._block is None:
                raise ClosedError("the device was closed")
            place, nbytes = self._places[weight], weight.layout.nbytes
            view = memoryview(self._block)[place : place + nbytes]
            self._released.discard(weight)
            self._held[weight] += 1
            # Not weakref.finalize: that would run at the interpreter's end too.
            watch = weakref.ref(view, partial(_died, weakref.ref(self), weight))
            self._watching[id(watch)] = watch
            return view, self._block.address + place

    def release(self, weight: Weight) -> None:
        """Give the pages of `weight` back to the kernel as soon as no tensor is on them."""
        with self._lock:
            self._released.add(weight)
            self._give_back_if_free(weight)

    def close(self) -> None:
        """Give all memory back as soon as the last tensor on it dies. Idempotent."""
        with self._lock:
            self._closing.set()
            self._block = None
        for thread in self._populating:  # they know the addresses
            thread.join()
        if self.pool is not None:
            self.pool.close()

    def _view_died(self, weight: Weight, watch: weakref.ref[memoryview]) -> None:
        with self._lock:
            del self._watching[id(watch)]
            self._held[weight] -= 1
            self._give_back_if_free(weight)

    def _give_back_if_free(self, weight: Weight) -> None:
        """Give the pages back, those at its edges too where the neighbours are gone as well."""
        if self._block is None or not self._free(weight):
            return
        index = self._order.index(weight)
        first = last = index
        while first > 0 and self._free(self._order[first - 1]):
            first -= 1
        while last + 1 < len(self._order) and self._free(self._order[last + 1]):
            last += 1
        start = self._places[self._order[first]]
        end = self._places[self._order[last]] + self._order[last].layout.nbytes
        # No more than its own pages and those that it shares with a neighbour: the rest is given back already.
        own = self._places[weight], self._places[weight] + weight.layout.nbytes
        start, end = max(start, own[0] - HUGE_PAGE_BYTES), min(end, own[1] + HUGE_PAGE_BYTES)
        give_back(self._block.address + start, end - start)

    def _free(self, weight: Weight) -> bool:
        return weight in self._released and not self._held[weight]


def _died(owner: weakref.ref[Residents], weight: Weight, watch: weakref.ref[memoryview]) -> None:
    residents = owner()
    if residents is not None:
        residents._view_died(weight, watch)
