"""Weights that had to leave a device, and their places in host memory."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, Literal

from zinfer.device.processor import Processor
from zinfer.errors import BudgetError
from zinfer.pinned import Pool
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")


class Moved:
    """A pool for each, within `spare` bytes. `kept`: memory that weights hold there; what goes is dropped from it.

    Who calls give_place() holds the coordinator's lock; any thread may ask. `page_lock` as for Pool.
    """

    def __init__(
        self, processor: Processor, spare: int, kept: dict[Weight, Any], page_lock: Literal["auto", "off"]
    ) -> None:
        self._processor = processor
        self._spare = Spare(spare)
        self._kept = kept
        self._page_lock: Literal["auto", "off"] = page_lock
        self._pools: dict[Weight, Pool] = {}

    @property
    def pools(self) -> list[Pool]:
        """Those that are mapped."""
        return [pool for pool in list(self._pools.values()) if pool.base_address]

    def pool(self, weight: Weight) -> Pool | None:
        """The place of `weight`; None where it has none here."""
        return self._pools.get(weight)

    def give_place(self, weight: Weight) -> Pool | None:
        """A place for `weight`; None where nothing is spare, or the machine refuses the memory."""
        nbytes = weight.layout.nbytes
        if not self._has_spare(nbytes):
            return None
        try:
            with self._processor.current():
                pool = self._pools[weight] = Pool(nbytes, page_lock=self._page_lock)
        except BudgetError as error:
            self._spare.give(nbytes)
            logger.warning("%r will stream from the drive: %s", weight.name, error)
            return None
        weakref.finalize(pool, self._spare.give, nbytes).atexit = False
        return pool

    def _has_spare(self, nbytes: int) -> bool:
        """Take `nbytes` of what is spare, from weights that are back on the device if need be; whether there were."""
        for weight in [None, *(weight for weight in self._pools if weight.wants_residence)]:
            if weight is not None:
                self._kept.pop(weight, None)
                del self._pools[weight]
            if self._spare.take(nbytes):
                return True
        return False

    def close(self) -> None:
        """Give the memory back as soon as nothing holds it. Idempotent."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class Spare:
    """Bytes of the host's budget that nothing has been planned for. Any thread may call any method."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._lock = threading.RLock()  # a finalizer may call give() inside a method here

    def take(self, nbytes: int) -> bool:
        """Take them, if they are there."""
        with self._lock:
            if nbytes > self._left:
                return False
            self._left -= nbytes
            return True

    def give(self, nbytes: int) -> None:
        """Give them back."""
        with self._lock:
            self._left += nbytes
