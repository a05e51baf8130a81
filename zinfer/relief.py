"""Memory that runs out in the middle of a pass: some is given back, logged and reported."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

from zinfer.errors import OutOfMemoryError
from zinfer.residency import Given, Residency
from zinfer.streaming import Streaming
from zinfer.weights.shortage import ShortageError, asked_bytes, in_short
from zinfer.wording import size_text

logger = logging.getLogger("zinfer")


class Relief:
    """What one model does when torch, or a device, finds no memory. Any thread may call any method, holding no lock.

        an operator with a streamed weight: relieve(), and it runs once more; again: exhausted() is raised
        anything else in a pass: the pass cannot go on, and ended() is raised

    What may have memory to give: residents and the window, where weights stream from the drive; garbage in cycles, and
    blocks that torch keeps. `residency`: None where all weights are to stay.
    """

    def __init__(self, streaming: Streaming, residency: Residency | None) -> None:
        self._streaming = streaming
        self._residency = residency
        self._lock = threading.Lock()
        self._count = 0
        self._last = ""
        streaming.coordinator.reliever = weakref.ref(self)

    @property
    def count(self) -> int:
        """How often memory ran out."""
        return self._count

    @property
    def notes(self) -> tuple[str, ...]:
        """What to report, if anything."""
        with self._lock:
            if not self._count:
                return ()
            times = "once" if self._count == 1 else f"{self._count} times"
            return (f"memory ran out {times}, last in {self._last}; {self._division()}",)

    def relieve(self, what: str, words: str) -> None:
        """Memory ran out, as `words` say, in an operator that takes the weight `what`: give some back."""
        self._give_back(f"an operator with {what!r}", words, ended=False)

    def exhausted(self, what: str, words: str) -> ShortageError:
        """What to raise where it ran out again: no more than this is tried. More is given back for the next call."""
        return self._error(f"an operator with {what!r}, which was run twice", words, ended=False)

    def ended(self, error: BaseException) -> ShortageError:
        """What to raise, from `error`, where it ended a pass. Memory is given back for the next call."""
        return self._error("a pass", str(error), ended=True)

    def _error(self, where: str, words: str, *, ended: bool) -> ShortageError:
        given = self._give_back(where, words, ended=ended)
        account, lost = self._streaming.account, 0
        if self._residency is not None:
            lost = self._residency.lost_bytes
        lower = (
            f", or lower {account.option} to {account.given(account.ceiling - lost)}"
            if 0 < lost < account.ceiling
            else ""
        )
        return ShortageError(
            f"memory ran out on {self._name} in {where}: {in_short(words)}. {_told(given)} so that the next call has "
            f"more room: {self._division()}. Make batch or context smaller, end what else uses that memory{lower}"
        )

    def _give_back(self, where: str, words: str, *, ended: bool) -> Given:
        coordinator = self._streaming.coordinator
        coordinator.drop_ahead()
        gc.collect()  # caches may sit in reference cycles
        given = Given(0, 0)
        if self._residency is not None:
            try:
                given = self._residency.relieve(asked_bytes(words), ended=ended)
            except OutOfMemoryError as error:
                logger.warning("no window could be had: %s", in_short(str(error)))
        coordinator.device.reclaim()
        with self._lock:
            self._count += 1
            self._last = f"{where} ({in_short(words)})"
        logger.warning(
            "memory ran out on %s in %s (%s). %s: %s",
            self._name,
            where,
            in_short(words),
            _told(given),
            self._division(),
        )
        return given

    @property
    def _name(self) -> str:
        return self._streaming.coordinator.device.name

    def _division(self) -> str:
        """What weights have now."""
        account = self._streaming.account
        text = f"the window is {size_text(account.window)} now, residents {size_text(account.residents)}"
        lost = 0 if self._residency is None else self._residency.lost_bytes
        return text + (f", and {size_text(lost)} of the budget stay unused" if lost else "")


def _told(given: Given) -> str:
    if not given.window and not given.residents:
        return "What was read ahead was dropped"
    return f"{size_text(given.residents)} of residents and {size_text(given.window)} of the window were given back"
