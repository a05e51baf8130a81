"""Which weights stay in memory and how large the window is: pure functions on plain data.

The drive carries W - R bytes a sweep, so R, the resident bytes, is what the budget buys; the window
needs only enough to keep the drive busy while operators compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zinfer.errors import BudgetError

MIN_WINDOW = 64 << 20  # bytes; two blocks a queue slot, below which a deep queue cannot stay full
ROWS_WINDOW = (
    64 << 20
)  # bytes; a table of rows up to this size may be asked for whole (positions, relative biases)
MAX_WINDOW = 448 << 20  # bytes; ~0.14 s of a 3.3-GB/s drive, more than any operator's jitter


@dataclass(frozen=True)
class Footprint:
    """What one weight costs, in bytes.

    `resident`: kept for good. `window`: its region while streamed. `transient`: ordinary memory that
    making it takes besides (a replayed conversion's results), at most one weight at a time.
    """

    resident: int
    window: int
    transient: int = 0
    rows_only: bool = False


@dataclass(frozen=True)
class Placement:
    """Indices of the resident weights, and bytes for the residents, the window and conversions."""

    residents: frozenset[int]
    resident_bytes: int
    window_bytes: int
    transient_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, in bytes."""
        return self.resident_bytes + self.window_bytes + self.transient_bytes


def place(weights: Sequence[Footprint], available: int) -> Placement:
    """The placement with most resident bytes within `available` bytes; `weights` are in operator order.

    Raises BudgetError with the smallest number of bytes that works.
    """
    converted, floor = _window_floors(weights)
    transient = max((w.transient for w in weights), default=0)
    room = available - transient
    order, by_size = _streamable(weights)
    for candidates, window in ((range(len(weights)), converted), (order, floor)):
        needed = sum(weights[i].resident for i in candidates)
        if needed + window <= room:
            return Placement(frozenset(candidates), needed, window, transient)
    # A window of full size first; two of the largest weight let one be read while the other computes;
    # one alone still works.
    for window_for in (
        lambda largest: max(_wanted_window(room), 2 * largest),
        lambda largest: 2 * largest,
        int,
    ):
        options = []
        for kept in range(len(by_size)):
            if kept and weights[by_size[kept]].window == weights[by_size[kept - 1]].window:
                continue  # one more of the same size makes the window no smaller, only the spread uneven
            window = window_for(max(floor, weights[by_size[kept]].window))
            option = _with_largest_kept(weights, order, by_size[:kept], window, transient, room)
            if option is not None:
                options.append(option)
        if options:
            return max(options, key=lambda option: option.resident_bytes)
    raise BudgetError(f"{available} bytes for weights are too few, {smallest(weights)} would do")


def smallest(weights: Sequence[Footprint]) -> int:
    """The fewest `available` bytes with which `place` finds a placement."""
    converted, floor = _window_floors(weights)
    _, by_size = _streamable(weights)
    kept, options = 0, [sum(w.resident for w in weights) + converted]
    for i in by_size:
        options.append(kept + max(floor, weights[i].window))
        kept += weights[i].resident
    options.append(kept + floor)
    return min(options) + max((w.transient for w in weights), default=0)


def all_resident(weights: Sequence[Footprint]) -> int:
    """The fewest `available` bytes with which every weight, embeddings included, is resident."""
    converted = max((w.window for w in weights if w.transient), default=0)
    return sum(w.resident for w in weights) + converted + max((w.transient for w in weights), default=0)


def _window_floors(weights: Sequence[Footprint]) -> tuple[int, int]:
    """The least window with everything resident, and with only what operators ask for in full resident."""
    converted = max((w.window for w in weights if w.transient), default=0)
    tables = (w.window for w in weights if w.rows_only and w.window <= ROWS_WINDOW)
    return converted, max(converted, max(tables, default=0))


def _streamable(weights: Sequence[Footprint]) -> tuple[list[int], list[int]]:
    """Indices of the weights that operators ask for in full, in operator order and by falling size."""
    order = [i for i, w in enumerate(weights) if not w.rows_only]
    return order, sorted(order, key=lambda i: -weights[i].window)


def _wanted_window(room: int) -> int:
    return max(MIN_WINDOW, min(MAX_WINDOW, room // 5))


def _with_largest_kept(
    weights: Sequence[Footprint],
    order: Sequence[int],
    largest: Sequence[int],
    window: int,
    transient: int,
    room: int,
) -> Placement | None:
    """Keep the `largest` weights, so that the window only has to hold smaller ones, and fill up evenly."""
    kept = set(largest)
    fixed = sum(weights[i].resident for i in kept)
    if fixed + window > room:
        return None
    rest = [i for i in order if i not in kept]
    chosen = kept | spread([weights[i].resident for i in rest], room - fixed - window, rest)
    return Placement(frozenset(chosen), sum(weights[i].resident for i in chosen), window, transient)


def spread(sizes: Sequence[int], budget: int, labels: Sequence[int]) -> set[int]:
    """Labels of a subset of at most `budget` bytes, spread evenly over the sequence (error diffusion)."""
    total = sum(sizes)
    if budget <= 0 or not total:
        return set()
    share = min(1.0, budget / total)
    chosen: set[int] = set()
    credit, left = 0.0, budget
    for size, label in zip(sizes, labels, strict=True):
        credit += size * share
        if credit >= size and size <= left:
            chosen.add(label)
            credit -= size
            left -= size
    for size, label in sorted(zip(sizes, labels, strict=True), reverse=True):
        if label not in chosen and size <= left:
            chosen.add(label)
            left -= size
    return chosen
