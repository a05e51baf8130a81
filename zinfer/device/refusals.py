"""What was to stay on a device, and found no memory there."""

from __future__ import annotations

import logging
import threading

from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")


class Refusals:
    """Weights that were to stay on the device `name`, but found no memory there. Any thread may call any method."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nbytes = 0
        self._weights: set[Weight] = set()
        self._note: str | None = None
        self._lock = threading.Lock()

    def add(self, weight: Weight, nbytes: int, notes: list[str]) -> int:
        """One more; how many bytes were refused by now. The first is logged, all have one line among `notes`."""
        with self._lock:
            self._nbytes += nbytes
            self._weights.add(weight)
            before, count = self._note, len(self._weights)
            what = f"{weight.name!r} had" if count == 1 else f"{count} weights had"
            self._note = f"{self._name} was short of memory: {what} to stream instead of staying there"
            if before is None:
                logger.warning("%s; the report counts what follows", self._note)
                notes.append(self._note)
            else:
                logger.debug("%s has no memory for %r, which streams", self._name, weight.name)
                notes[notes.index(before)] = self._note
            return self._nbytes
