"""The window on a device: one block, leased piece by piece, and used anew in the order of the device's own work."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import Any

import torch

from zinfer.device.processor import ALIGNMENT, Event, Processor
from zinfer.pinned.portable.runs import Runs
from zinfer.weights.layout import round_up

_watching: dict[int, weakref.ref[Any]] = {}  # the owners of what is leased, arenas that are gone included


class Lease:
    """Memory on the device for one weight: `bytes` over it, and what the next holder has to wait for.

        leased --copy--> filled --operators, on their streams--> ... --last view dies--> returned, `ends` recorded

    `after`: events that a copy into it waits for. `streams`: those whose operators were given it.
    """

    def __init__(self, nbytes: torch.Tensor, use: Use, after: list[Event]) -> None:
        self.bytes = nbytes
        self.after = after
        self._use = use

    def copied(self, event: Event) -> None:
        """A copy into it ends with `event`."""
        self._use.events.append(event)

    def used_on(self, stream: Any) -> None:
        """Operators on `stream` read it from now on."""
        if stream not in self._use.streams:
            self._use.streams.append(stream)


class Use:
    """What happens to a lease's memory; outlives the lease and holds nothing of it."""

    def __init__(self, start: int, nbytes: int, streams: list[Any]) -> None:
        self.start = start
        self.nbytes = nbytes
        self.events: list[Event] = []
        self.streams = streams


class Arena:
    """`capacity` bytes of a device in one block. Any thread may call any method.

    A lease returns when the last tensor on it dies, on whatever thread that happens, also inside a method here; the
    device may still work with it then, so that the next copy into any byte of it waits for what it had been given.
    `streams`, which may grow: those that operators use any lease on, where nobody will tell which.
    """

    def __init__(self, processor: Processor, capacity: int, streams: list[Any] | None = None) -> None:
        self.capacity = round_up(capacity, ALIGNMENT)
        self._processor = processor
        self._streams = streams
        self._block = processor.block(self.capacity) if capacity else None
        self._runs = Runs(self.capacity)
        self._lock = threading.RLock()
        self._returned: deque[tuple[Use, list[Event]]] = deque()  # by callbacks, which take no lock
        self._known: list[Any] = []  # the streams that the block was told of
        self._came = threading.Event()
        # Free, but the device may work with it still: at first, what had the memory before.
        self._pending: list[tuple[int, int, list[Event]]] = []
        if capacity:
            self._pending.append((0, self.capacity, [processor.fence(processor.stream())]))

    @property
    def in_use(self) -> int:
        """Bytes in leases."""
        with self._lock:
            self._collect()
            return self._runs.held_bytes

    def acquire(self, nbytes: int, timeout: float = 0.0) -> Lease | None:
        """A lease of `nbytes` bytes, or None when there is no room within `timeout` seconds."""
        wanted = round_up(max(nbytes, 1), ALIGNMENT)
        deadline = time.monotonic() + timeout
        while True:
            self._came.clear()
            with self._lock:
                self._collect()
                start = self._runs.take(wanted) if self._block is not None else None
                if start is not None:
                    return self._lease(start, wanted, nbytes)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._came.wait(left)

    def close(self) -> None:
        """Lease nothing any more; the memory goes back when the last tensor on it dies."""
        with self._lock:
            self._block = None

    def _lease(self, start: int, wanted: int, nbytes: int) -> Lease:
        end = start + wanted
        after = [event for a, b, events in self._pending if a < end and start < b for event in events]
        tensor, owner = self._processor.over(self._block, start, nbytes)
        use = Use(start, wanted, [] if self._streams is None else self._streams)
        # Not weakref.finalize: that would run at the interpreter's end too.
        watch = weakref.ref(owner, partial(_died, weakref.ref(self), self._processor, use, self._block))
        _watching[id(watch)] = watch
        return Lease(tensor, use, after)

    def _collect(self) -> None:
        while self._returned:
            use, events = self._returned.popleft()
            self._runs.give_back(use.start)
            self._pending.append((use.start, use.start + use.nbytes, events))
        live = [(a, b, [event for event in events if not event.done]) for a, b, events in self._pending]
        self._pending = [entry for entry in live if entry[2]]

    def _takes_back(self, use: Use, block: Any) -> bool:
        """Note that the last tensor on `use` has died; False after close().

        Takes no lock, so that close() may drop the block meanwhile: it knows by then which operators still read it.
        """
        for stream in use.streams:
            if stream not in self._known:
                self._processor.used(block, stream)
                self._known.append(stream)  # last: who finds it here may drop the block
        if self._block is None:
            return False
        events = [*use.events, *self._processor.retire(block, use.start, use.nbytes, use.streams)]
        self._returned.append((use, events))
        self._came.set()
        return True


def _died(
    arena: weakref.ref[Arena], processor: Processor, use: Use, block: Any, watch: weakref.ref[Any]
) -> None:
    _watching.pop(id(watch), None)
    owner = arena()
    if owner is None or not owner._takes_back(use, block):
        processor.let_go(block, use.start, use.nbytes, use.streams)
