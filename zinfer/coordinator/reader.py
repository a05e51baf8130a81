"""One thread's place in the sweep and the reads it has started ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from zinfer.coordinator.trace import Trace
from zinfer.device.device import Fetching
from zinfer.weights.weight import Weight

MISSES_BEFORE_REBUILD = 2  # one unexpected operator is taken as an insertion, two as another path


class Reader:
    """Look-ahead of one thread. Every method is called under the coordinator's lock.

    `queue` holds the fetches started for the uses that `trace` predicts, nearest first; `held` is the
    last use, kept until the next so that an operator that uses a weight twice running reads it once.
    """

    def __init__(self, trace: Trace[Weight]) -> None:
        self._trace = trace
        self.queue: deque[Fetching] = deque()
        self._stale: deque[Fetching] = deque()  # set aside by a rebuild, until extend() has picked from it
        self.held: Fetching | None = None
        self._before: Weight | None = None
        self._last: Weight | None = None
        self._seen: set[Weight] | None = set()  # used in the first sweep; None once that is over
        self._misses = 0
        self.touched = 0.0  # time.monotonic() of the last use

    def advance(self, weight: Weight) -> Fetching | None:
        """Move on to `weight`; its fetch when it was read ahead, else None. Skipped reads are dropped."""
        expected = self._before, self._last
        known = self._last is not None and self._trace.saw(self._before, self._last)
        self._trace.observe(*expected, weight)
        self._before, self._last = self._last, weight
        if self._seen is not None:
            again = weight in self._seen and weight is not expected[1]
            self._seen.add(weight)
            if again:
                self._seen = None
        position = next((i for i, fetch in enumerate(self.queue) if fetch.weight is weight), None)
        if position is not None:
            for _ in range(position):
                self.queue.popleft()
            self._misses = 0
            return self.queue.popleft()
        if self.held is not None and self.held.weight is weight:
            return self.held  # used twice running
        self._misses += 1
        if known or self._misses >= MISSES_BEFORE_REBUILD:
            self._stale.extend(self.queue)
            self.queue.clear()
        return None

    def extend(
        self, start: Callable[[Weight], Fetching | None], limit_bytes: int, limit_count: int, first_bytes: int
    ) -> None:
        """Start reads for predicted uses until `limit_bytes` are ahead or `start` finds no room.

        In the first sweep at most `first_bytes`, or one weight, are for another: many want one only.
        Reads that a rebuild set aside are taken over where they are predicted again, then dropped.
        """
        if self._last is None:
            return
        ahead = self.ahead_bytes
        before, last = self._tail()
        seen = self._seen or ()
        beyond = sum(fetch.weight.layout.nbytes for fetch in self.queue if fetch.weight in seen)
        skipped = 0
        while ahead < limit_bytes and len(self.queue) < limit_count and skipped <= limit_count:
            following = self._trace.successor(before, last)
            if following is None:
                break
            before, last = last, following
            if following.resident is not None:
                skipped += 1
                continue
            if following in seen:
                if beyond and beyond + following.layout.nbytes > first_bytes:
                    break
                beyond += following.layout.nbytes
            fetch = start(following)
            if fetch is None:
                break
            self.queue.append(fetch)
            ahead += following.layout.nbytes
        self._stale.clear()

    def lift(self, lift: Callable[[Fetching], bool]) -> None:
        """Find room on the device for what is on its way, nearest first, until `lift` finds no more."""
        for fetch in self.queue:
            if not fetch.lifted and not lift(fetch):
                break

    @property
    def ahead_bytes(self) -> int:
        """Bytes of what is read ahead, or on its way."""
        return sum(fetch.weight.layout.nbytes for fetch in self.queue)

    def _tail(self) -> tuple[Weight | None, Weight]:
        assert self._last is not None
        if not self.queue:
            return self._before, self._last
        before = self.queue[-2].weight if len(self.queue) > 1 else self._last
        return before, self.queue[-1].weight

    def drop_farthest(self) -> bool:
        """Give up the read in the window of the use that lies farthest ahead; False when there is none."""
        if self._stale:
            self._stale.pop()
            return True
        for position in range(len(self.queue) - 1, -1, -1):
            if self.queue[position].takes_room:
                while len(self.queue) > position:
                    self.queue.pop()
                return True
        return False

    def expects(self, weight: Weight) -> bool:
        """Whether `weight`, just used, is likely to be used again at once; True while nothing is known."""
        if self._last is None or not self._trace.saw(self._before, self._last):
            return True
        return self._trace.successor(self._before, self._last) is weight

    def forget(self) -> None:
        """Drop every read ahead and the held use; the place in the sweep stays."""
        self.queue.clear()
        self._stale.clear()
        self.held = None
