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
from zinfer.wording import size_text

logger = logging.getLogger("zinfer")


class Moved:
    """A pool for each, within what is `spare`. `kept`: memory that weights hold there; what goes is dropped from it.

    Who calls give_place() holds the coordinator's lock; any thread may ask. `page_lock` as for Pool.
    """

    def __init__(
        self, processor: Processor, spare: Spare, kept: dict[Weight, Any], page_lock: Literal["auto", "off"]
    ) -> None:
        self._processor = processor
        self._spare = spare
        self._kept = kept
        self._page_lock: Literal["auto", "off"] = page_lock
        self._pools: dict[Weight, Pool] = {}
        self._without: dict[Weight, None] = {}  # those that found no place when they left, in that order
        self._told = False

    @property
    def pools(self) -> list[Pool]:
        """Those that are mapped."""
        return [pool for pool in list(self._pools.values()) if pool.base_address]

    @property
    def notes(self) -> list[str]:
        """What to report, if anything: one line, of the weights that have no place and are not back on the device."""
        without = [weight for weight in list(self._without) if not weight.wants_residence]
        if not without:
            return []
        nbytes = sum(weight.layout.nbytes for weight in without)
        placed = [weight for weight in list(self._pools) if not weight.wants_residence]
        wanted = nbytes + sum(weight.layout.nbytes for weight in placed)
        who = f"{len(without)} weights" if len(without) > 1 else f"{without[0].name!r}"
        return [
            f"{who}, {size_text(nbytes)}, that left {self._processor.name} for caches "
            f"{'stream' if len(without) > 1 else 'streams'} from the drive: raise max_memory['cpu'] by "
            f"{self._spare.more(wanted)} bytes"
        ]

    def pool(self, weight: Weight) -> Pool | None:
        """The place of `weight`; None where it has none here."""
        return self._pools.get(weight)

    def give_place(self, weight: Weight) -> Pool | None:
        """A place for `weight`; None, which `notes` tell of, where nothing is spare, or the machine refuses memory."""
        pool = self._new_place(weight)
        if pool is not None:
            self._without.pop(weight, None)
            return pool
        self._without[weight] = None
        if not self._told and (notes := self.notes):
            self._told = True
            logger.warning("%s; the report counts what follows", notes[0])
        return None

    def _new_place(self, weight: Weight) -> Pool | None:
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
                del self._pools[weight]  # first: see AttachedDevice._keep
                self._kept.pop(weight, None)
            if self._spare.take(nbytes):
                return True
        return False

    def close(self) -> None:
        """Give the memory back as soon as nothing holds it. Idempotent."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._without.clear()


class Spare:
    """Bytes of the host's budget that nothing has been planned for. Any thread may call any method.

    `nbytes`: how many; below 0 where even what has been planned for has not got all of it. `others`: of whatever more
    the budget had, one part in so many would be others'; 0: none.
    """

    def __init__(self, nbytes: int, others: int = 0) -> None:
        self.nbytes = max(nbytes, 0)
        self._missing = max(-nbytes, 0)
        self._others = others
        self._left = self.nbytes
        self._lock = threading.RLock()  # a finalizer may call give() inside a method here

    def more(self, wanted: int) -> int:
        """By how many bytes the host's budget has to rise for `wanted` bytes to be spare."""
        missing = max(wanted + self._missing - self.nbytes, 0)
        return -(-missing * self._others // (self._others - 1)) if self._others else missing

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
