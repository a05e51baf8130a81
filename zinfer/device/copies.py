"""Threads that move weights on from host memory while the main thread computes, waits or does something else."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from zinfer.device.processor import Event
from zinfer.errors import ZinferError

if TYPE_CHECKING:
    from zinfer.device.lifted import LiftedFetch

logger = logging.getLogger("zinfer")

# Of torch, its device and the system. Whoever asks for the weight meets them again.
FAULTS = (RuntimeError, OSError, MemoryError)

LOOK_EVERY = 0.002  # seconds that what came later waits at most for a read that has not landed


class Copies:
    """Starts the copies of fetches as their reads land, of several the one that was added first; frees what was copied.

    One thread waits for reads, another for copies. Neither keeps a fetch that everybody else has dropped.
    `on_room` is called, on the second, when host memory came free. Both run within `current`: see Processor. Any thread
    may call any method.
    """

    def __init__(
        self, on_room: Callable[[], object], current: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._on_room = on_room
        self._current = current
        self._fetches: queue.SimpleQueue[weakref.ref[LiftedFetch] | None] = queue.SimpleQueue()
        self._flying: queue.SimpleQueue[tuple[Event, list[Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._ended = False  # nobody takes from `_flying` what is put there now
        self._lock = threading.RLock()  # a finalizer may close
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for work, name in ((self._start_copies, "zinfer-copy"), (self._free_sources, "zinfer-copied"))
        ]
        for thread in self._threads:
            thread.start()

    def add(self, fetch: LiftedFetch) -> None:
        """Copy `fetch`, which has room on the device, as soon as it has landed."""
        self._fetches.put(weakref.ref(fetch))

    def started(self, event: Event, sources: list[Any]) -> None:
        """Keep `sources` until `event`; the list is emptied then. Waits for it where the threads have ended."""
        with self._lock:
            if not self._ended:
                self._flying.put((event, sources))
                return
        _free(event, sources)

    def close(self) -> None:
        """End the threads once all copies that were started have ended. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        me = threading.current_thread()  # a device may die on either of them
        starting, freeing = self._threads
        self._fetches.put(None)
        if me is not starting:
            starting.join()
        with self._lock:
            self._ended = True
            self._flying.put(None)
        if me is not freeing:
            freeing.join()

    def _run(self, work: Callable[[], None]) -> None:
        with self._current():
            work()

    def _start_copies(self) -> None:
        waiting: list[weakref.ref[LiftedFetch]] = []  # the oldest first
        while self._take_in(waiting):
            late = [reference for reference in waiting if not self._started(reference, 0.0)]
            if late and len(late) == len(waiting) and self._started(late[0], LOOK_EVERY):
                del late[0]
            waiting = late

    def _take_in(self, waiting: list[weakref.ref[LiftedFetch]]) -> bool:
        """Append what was added; wait for something where nothing is `waiting`. False once this closes."""
        while True:
            try:
                reference = self._fetches.get(block=not waiting)
            except queue.Empty:
                return not self._closing.is_set()
            if reference is None or self._closing.is_set():
                return False
            waiting.append(reference)

    @staticmethod
    def _started(reference: weakref.ref[LiftedFetch], timeout: float) -> bool:
        """Whether nothing is left to do for a fetch, which is held here alone; waits `timeout` seconds for its read."""
        fetch = reference()
        if fetch is None:
            return True
        try:
            if not fetch.landed(timeout):
                return False
            fetch.issue(urgent=False)
        except ZinferError:
            pass  # whoever asks for the weight will be told
        except FAULTS:
            logger.exception("a copy of %r could not be started", fetch.weight.name)
        return True

    def _free_sources(self) -> None:
        while (entry := self._flying.get()) is not None:
            _free(*entry)
            del entry
            if not self._closing.is_set():
                self._tell()

    def _tell(self) -> None:
        try:
            self._on_room()
        except ZinferError:
            pass  # a read ahead that cannot be made: whoever asks for the weight will be told
        except FAULTS:
            logger.exception("reading ahead failed")


def _free(event: Event, sources: list[Any]) -> None:
    """Wait for `event`, then empty `sources`."""
    try:
        event.wait()
    except RuntimeError:
        logger.exception("a copy to the device failed")
    sources.clear()
