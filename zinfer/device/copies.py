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

LOOK_EVERY = 0.02  # seconds that a dropped read is held on to at most


class Copies:
    """Starts the copies of fetches, in the order in which they were added, as their reads land; frees what was copied.

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
        """Keep `sources` until `event`; the list is emptied then."""
        self._flying.put((event, sources))

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
        self._flying.put(None)
        if me is not freeing:
            freeing.join()

    def _run(self, work: Callable[[], None]) -> None:
        with self._current():
            work()

    def _start_copies(self) -> None:
        while (reference := self._fetches.get()) is not None:
            while not self._closing.is_set() and not self._started(reference):
                pass

    @staticmethod
    def _started(reference: weakref.ref[LiftedFetch]) -> bool:
        """Whether nothing is left to do for a fetch, which is held here alone; waits a little for its read."""
        fetch = reference()
        if fetch is None:
            return True
        try:
            if not fetch.landed(LOOK_EVERY):
                return False
            fetch.issue(urgent=False)
        except ZinferError:
            pass  # whoever asks for the weight will be told
        except Exception:
            logger.exception("a copy of %r could not be started", fetch.weight.name)
        return True

    def _free_sources(self) -> None:
        while (entry := self._flying.get()) is not None:
            event, sources = entry
            try:
                event.wait()
            except RuntimeError:
                logger.exception("a copy to the device failed")
            sources.clear()
            del entry
            if not self._closing.is_set():
                self._tell()

    def _tell(self) -> None:
        try:
            self._on_room()
        except ZinferError:
            pass  # a read ahead that cannot be made: whoever asks for the weight will be told
        except Exception:
            logger.exception("reading ahead failed")
