"""What was to stay on a device, and found no memory there."""

from __future__ import annotations

import logging
import threading

from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")


class Refusals:
    """Weights that were to stay on the device `name`, but found no memory there. Any thread may call any method.

    refused, and streams --its memory is found after all--> stays, and counts as one that came back
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nbytes = 0
        self._weights: set[Weight] = set()
        self._back: set[Weight] = set()
        self._lock = threading.Lock()

    def add(self, weight: Weight, nbytes: int) -> int:
        """One more; how many bytes were refused by now. The first is logged, and the first after all came back."""
        with self._lock:
            self._nbytes += nbytes
            first = not self._weights
            self._weights.add(weight)
            self._back.discard(weight)
            if first:
                logger.warning("%s; the report counts what follows", self._text())
            else:
                logger.debug("%s has no memory for %r, which streams", self._name, weight.name)
            return self._nbytes

    def came_back(self, weight: Weight) -> None:
        """`weight` has memory on the device, to stay there."""
        with self._lock:
            if weight not in self._weights:
                return
            self._weights.remove(weight)
            self._back.add(weight)
            if not self._weights:
                logger.info("%s", self._text())

    @property
    def notes(self) -> list[str]:
        """What to report, if anything: one line."""
        with self._lock:
            return [self._text()] if self._weights or self._back else []

    def _text(self) -> str:
        if not self._weights:
            what = f"{_named(self._back)} had to stream, and can stay there again"
            return f"{self._name} was short of memory for a time: {what}"
        back = f"; {len(self._back)} more can stay there again" if self._back else ""
        what = f"{_named(self._weights)} had to stream instead of staying there"
        return f"{self._name} was short of memory: {what}{back}"


def _named(weights: set[Weight]) -> str:
    return repr(next(iter(weights)).name) if len(weights) == 1 else f"{len(weights)} weights"
