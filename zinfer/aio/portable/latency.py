"""How long operations took: the histogram of csrc/aio/latency.h, with the same buckets."""

from __future__ import annotations

PART_BITS = 4
PARTS = 1 << PART_BITS  # buckets to each power of two of nanoseconds


class LatencyHistogram:
    """`add` is for one thread, the reactor's; any thread may read meanwhile."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, nanoseconds: int) -> None:
        """Count one operation."""
        bound = bound_of(nanoseconds)
        self._counts[bound] = self._counts.get(bound, 0) + 1

    def buckets(self) -> list[tuple[float, int]]:
        """`(upper bound in seconds, operations)`, shortest first."""
        return [(bound * 1e-9, count) for bound, count in sorted(self._counts.copy().items())]


def bound_of(nanoseconds: int) -> int:
    """The largest value in the bucket of `nanoseconds`, at most 1/PARTS above it."""
    shift = max(nanoseconds.bit_length() - 1 - PART_BITS, 0)
    return (((nanoseconds >> shift) + 1) << shift) - 1
