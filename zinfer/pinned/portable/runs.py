"""Which bytes of the pool are held: next-fit bookkeeping, as in csrc/pinned/runs. No memory is touched."""

from __future__ import annotations

from bisect import bisect_right, insort


class Runs:
    """Free and held runs that tile `capacity` bytes; free neighbours are always joined. Whoever calls has the lock."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free = {0: capacity}  # offset -> bytes
        self._starts = [0]  # the keys of _free, sorted
        self._held: dict[int, int] = {}
        self._cursor = 0  # where the last run taken ended: the search begins there
        self.free_bytes = capacity

    @property
    def held_bytes(self) -> int:
        """Bytes in held runs."""
        return self._capacity - self.free_bytes

    @property
    def held_runs(self) -> int:
        """How many runs are held."""
        return len(self._held)

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run."""
        return max(self._free.values(), default=0)

    def take(self, nbytes: int) -> int | None:
        """The offset of a run of `nbytes` that is held from now on, or None when no free run is as long."""
        offset = self._find_next_fit(nbytes)
        if offset is None:
            return None
        rest = self._free.pop(offset) - nbytes
        self._starts.remove(offset)
        if rest:
            self._add_free(offset + nbytes, rest)
        self._held[offset] = nbytes
        self.free_bytes -= nbytes
        self._cursor = offset + nbytes
        return offset

    def give_back(self, offset: int) -> None:
        """The run at `offset` is free from now on."""
        nbytes = self._held.pop(offset)
        self.free_bytes += nbytes
        after = self._free.pop(offset + nbytes, 0)
        if after:
            self._starts.remove(offset + nbytes)
        index = bisect_right(self._starts, offset)
        if index:
            before = self._starts[index - 1]
            if before + self._free[before] == offset:
                self._free[before] += nbytes + after
                return
        self._add_free(offset, nbytes + after)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and held runs tile the pool, coalesced, and the counts agree."""
        at, previous_free = 0, False
        for offset, nbytes, free in sorted(
            [(o, n, True) for o, n in self._free.items()] + [(o, n, False) for o, n in self._held.items()]
        ):
            if offset != at:
                what = "overlapping runs" if offset < at else "bytes in no run"
                raise RuntimeError(f"pinned pool: {what} at offset {min(offset, at)}")
            if nbytes <= 0:
                raise RuntimeError(f"pinned pool: an empty run at offset {offset}")
            if free and previous_free:
                raise RuntimeError(f"pinned pool: two free runs that touch at offset {offset}")
            at, previous_free = offset + nbytes, free
        if at != self._capacity:
            raise RuntimeError(f"pinned pool: the last run does not end where the pool does at offset {at}")
        if sum(self._free.values()) != self.free_bytes or sorted(self._free) != self._starts:
            raise RuntimeError(f"pinned pool: the count of free bytes is wrong at offset {self.free_bytes}")

    def _find_next_fit(self, nbytes: int) -> int | None:
        first = bisect_right(self._starts, self._cursor)
        if first:  # a run that begins before the cursor and reaches past it is used from its start
            before = self._starts[first - 1]
            if before + self._free[before] > self._cursor:
                first -= 1
        for offset in self._starts[first:] + self._starts[:first]:
            if self._free[offset] >= nbytes:
                return offset
        return None

    def _add_free(self, offset: int, nbytes: int) -> None:
        self._free[offset] = nbytes
        insort(self._starts, offset)
