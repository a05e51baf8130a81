"""Host memory for key-value caches: pinned pools, added step by step, and what copies still need of them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from zinfer.device.page_locks import PageLocks
from zinfer.device.processor import Event
from zinfer.errors import BudgetError, ClosedError
from zinfer.pinned import Pool

STEP_SHARE = 4  # a new pool is this part of what there is, ...
LARGEST_STEP = 256 << 20  # ... at most so many bytes: one slab of a pool, whose edges a copy must not span
LARGEST_BLOCK = 64 << 20  # bytes that are asked for at once
MEMORY = "memory for key-value caches"  # what the report calls it
PAGE = 4096  # bytes that a pool rounds up to


class Space:
    """At most `limit` bytes of host memory for the caches of one model. Any thread may call any method.

    Regions return when the last view of them dies, and not before the copies they were held for have ended. `current`
    is that of the processor which copies, `page_locks` is told of each pool.
    """

    def __init__(
        self,
        limit: int,
        *,
        page_lock: Literal["auto", "off"],
        current: Callable[[], AbstractContextManager[Any]],
        page_locks: PageLocks,
    ) -> None:
        self.limit = limit
        self._page_locks = page_locks
        self._current = current
        self._page_lock: Literal["auto", "off"] = page_lock
        self._pools: list[Pool] = []
        self._flying: deque[tuple[Event, list[Any]]] = deque()
        self._lock = threading.RLock()
        self._closed = False
        # Nobody may be given memory that a copy still writes, also where the model is dropped without close().
        weakref.finalize(self, _drain, self._flying).atexit = False

    @property
    def capacity(self) -> int:
        """Bytes of the pools."""
        with self._lock:
            return sum(pool.capacity for pool in self._pools)

    @property
    def in_use(self) -> int:
        """Bytes that caches, and copies to and from them, hold."""
        with self._lock:
            self._collect()
            return sum(pool.in_use for pool in self._pools)

    def take(self, nbytes: int) -> Any | None:
        """A region of `nbytes` bytes, at most LARGEST_BLOCK; None where the limit leaves no room for it.

        Raises ClosedError after close(), and BudgetError where the machine refuses the memory.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("this cache belongs to a model that was closed")
            self._collect()
            for pool in self._pools:
                region = pool.acquire(nbytes) if nbytes <= pool.largest_free else None
                if region is not None:
                    return region
            added = self._grow(-(-nbytes // PAGE) * PAGE)
            return None if added is None else added.acquire(nbytes)

    def hold(self, event: Event, regions: list[Any]) -> None:
        """Keep `regions` until `event`."""
        with self._lock:
            self._collect()
            self._flying.append((event, regions))

    def settle(self) -> None:
        """Wait for all copies: what nothing else holds is free then."""
        with self._lock:
            _drain(self._flying)

    def close(self) -> None:
        """Wait for all copies, then give the memory back as soon as the last view of it dies. Idempotent."""
        with self._lock:
            self._closed = True
            _drain(self._flying)
            for pool in self._pools:
                pool.close()
            self._pools.clear()

    def _collect(self) -> None:
        while self._flying and self._flying[0][0].done:
            self._flying.popleft()

    def _grow(self, nbytes: int) -> Pool | None:
        have = sum(pool.capacity for pool in self._pools)
        if have + nbytes > self.limit:
            for pool in [
                pool for pool in self._pools if not pool.in_use
            ]:  # too small, or they would have served
                self._pools.remove(pool)
                pool.close()
            have = sum(pool.capacity for pool in self._pools)
        room = self.limit - have
        if nbytes > room:
            return None
        step = max(nbytes, min(have // STEP_SHARE, LARGEST_STEP, room) // PAGE * PAGE)
        with self._current():
            pool = Pool(step, page_lock=self._page_lock)
        self._pools.append(pool)
        self._page_locks.check([pool], MEMORY)
        return pool


def refuse_growth(space: Space, nbytes: int) -> BudgetError:
    """What to raise where `space` has no room for `nbytes` bytes more."""
    return BudgetError(
        f"key-value caches have {space.limit} bytes of host memory, {space.in_use} of them in use, and {nbytes} more "
        "are needed: raise max_memory['cpu'], drop caches that are not needed any more, or make batch or context "
        "smaller"
    )


def _drain(flying: deque[tuple[Event, list[Any]]]) -> None:
    while flying:
        flying[0][0].wait()
        flying.popleft()
