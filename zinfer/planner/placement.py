"""Which weights stay in memory and how large the window is: pure functions on plain data.

The drive carries W - R bytes a sweep, so R, the resident bytes, is what the budget buys; the window
needs only enough to keep the drive busy while operators compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zinfer.errors import BudgetError
from zinfer.planner.pipeline import steady_sweep

MIN_WINDOW = 64 << 20  # bytes; two blocks a queue slot, below which a deep queue cannot stay full
ROWS_WINDOW = (
    64 << 20
)  # bytes; a table of rows up to this size may be asked for whole (positions, relative biases)
GAP_BYTES = 160 << 20  # ~0.04 s of a 4-GB/s drive: it reads on while the head computes and a token is chosen
RESTART_BYTES = 8 << 20  # two blocks, 2-3 ms: the latency that a full queue hides
PAUSE_BYTES = 64 << 20  # ~0.015 s of such a drive: choosing a token, between two sweeps
CONTENTION = (
    0.1  # of the time to read a weight, which operators lose to the drive's share of the memory's bandwidth
)
AS_GOOD = 1.01  # times the shortest sweep on paper
ROUNDING = 1e-9  # of a sum of thousands of sizes, and far less than AS_GOOD tells apart
# Time to compute with a weight over the time to read it, as measured on a CPU at batch 1 and what each row adds. Drives
# differ, so that a larger share counts too; beyond the last, computing is all that takes time.
COMPUTE_SHARE, SHARE_OF_A_ROW = 0.15, 0.008
OTHER_SHARE, MOST_SHARE = 0.35, 0.5
MOST_WINDOW = 448 << 20  # bytes; more is given only to weights that need it


@dataclass(frozen=True)
class Footprint:
    """What one weight costs, in bytes.

    `resident`: kept for good. `window`: its region while streamed. `transient`: ordinary memory that
    making it takes besides (a replayed conversion's results), at most one weight at a time. `rows_only`: operators ask
    for rows of it alone. `sliced`: experts, which have a cache of their own: it is neither kept nor streamed.
    """

    resident: int
    window: int
    transient: int = 0
    rows_only: bool = False
    sliced: bool = False


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


def place(weights: Sequence[Footprint], available: int, rows: int = 1, *, through: int = 0) -> Placement:
    """The placement with the fastest sweep within `available` bytes; `weights` are in operator order.

    `rows`: sequences that each sweep computes. The more there are, the longer operators compute and the larger a window
    pays: what it takes from the residents is read while there is time.
    The window has `through` bytes at least, for others that pass. Raises BudgetError with the smallest number of bytes
    that works.
    """
    converted, floor = _window_floors(weights, through)
    transient = max((w.transient for w in weights), default=0)
    room = available - transient
    order, by_size = _streamable(weights)
    everyone = [i for i, w in enumerate(weights) if not w.sliced]
    for candidates, window in ((everyone, converted), (order, floor)):
        needed = sum(weights[i].resident for i in candidates)
        if needed + window <= room:
            return Placement(frozenset(candidates), needed, window, transient)
    options = []
    for kept in range(len(by_size)):
        if kept and weights[by_size[kept]].window == weights[by_size[kept - 1]].window:
            continue  # one more of the same size makes the window no smaller, only the spread uneven
        largest = max(floor, weights[by_size[kept]].window)
        for window in {
            largest,
            max(MIN_WINDOW, 2 * largest),
            *(
                min(w, max(largest, MOST_WINDOW))
                for w in (GAP_BYTES + largest, *(n * largest for n in (2, 3, 4, 6)))
            ),
        }:
            option = _with_largest_kept(weights, order, by_size[:kept], window, transient, room)
            if option is not None:
                options.append(option)
    if options:
        return _fastest(weights, order, options, rows)
    least = smallest(weights, through)
    raise BudgetError(f"{available} bytes for weights are too few, {least} would do", least)


def divided(weights: Sequence[Footprint], first: Placement, within: int, rows: int = 1) -> Placement:
    """`first` as it is when only `within` bytes are left of what it was made for: usually with fewer residents.

    Where its window cannot stream those that would have to leave, or is another than `rows` sequences want, another
    placement. Raises BudgetError with the fewest bytes that work.
    """
    if rows > 1:
        wanted = place(weights, within, rows)
        if wanted.window_bytes != first.window_bytes:
            return wanted
    stay = thinned(
        weights, first.residents, first.window_bytes, within - first.window_bytes - first.transient_bytes
    )
    if stay is None:
        return place(weights, within)
    return replace(first, residents=stay, resident_bytes=sum(weights[i].resident for i in stay))


def thinned(
    weights: Sequence[Footprint], residents: frozenset[int], window: int, limit: int
) -> frozenset[int] | None:
    """Those of `residents` that stay where only `limit` bytes are left for them, evenly spread.

    None where those that a window of `window` bytes cannot stream are more already.
    """
    bound = {i for i in residents if not streams_through(window, weights[i])}
    left = limit - sum(weights[i].resident for i in bound)
    if left < 0:
        return None
    rest = sorted(residents - bound)
    return frozenset(bound | spread([weights[i].resident for i in rest], left, rest))


def grown(
    weights: Sequence[Footprint], residents: frozenset[int], wanted: frozenset[int], limit: int
) -> frozenset[int]:
    """`residents` and as many of `wanted` as `limit` bytes for all of them allow, evenly spread."""
    left = limit - sum(weights[i].resident for i in residents)
    missing = sorted(wanted - residents)
    return residents | spread([weights[i].resident for i in missing], left, missing)


def streams_through(window: int, weight: Footprint) -> bool:
    """Whether a window of `window` bytes is enough for `weight`, of which rows may be all that is asked for."""
    return weight.window <= window or weight.sliced or (weight.rows_only and weight.window > ROWS_WINDOW)


def smallest(weights: Sequence[Footprint], through: int = 0) -> int:
    """The fewest `available` bytes with which `place` finds a placement."""
    converted, floor = _window_floors(weights, through)
    _, by_size = _streamable(weights)
    kept, options = 0, [sum(w.resident for w in weights if not w.sliced) + converted]
    for i in by_size:
        options.append(kept + max(floor, weights[i].window))
        kept += weights[i].resident
    options.append(kept + floor)
    return min(options) + max((w.transient for w in weights), default=0)


def all_resident(weights: Sequence[Footprint], through: int = 0) -> int:
    """The fewest `available` bytes with which every weight, embeddings included, is resident."""
    converted, _ = _window_floors(weights, through)
    return sum(w.resident for w in weights) + converted + max((w.transient for w in weights), default=0)


def _window_floors(weights: Sequence[Footprint], through: int) -> tuple[int, int]:
    """The least window with everything resident, and with only what operators ask for in full resident."""
    converted = max([through, *(w.window for w in weights if w.transient)])
    tables = (w.window for w in weights if w.rows_only and w.window <= ROWS_WINDOW)
    return converted, max(converted, max(tables, default=0))


def _streamable(weights: Sequence[Footprint]) -> tuple[list[int], list[int]]:
    """Indices of the weights that operators ask for in full, in operator order and by falling size."""
    order = [i for i, w in enumerate(weights) if not w.rows_only and not w.sliced]
    return order, sorted(order, key=lambda i: -weights[i].window)


def _fastest(
    weights: Sequence[Footprint], order: Sequence[int], options: Sequence[Placement], rows: int
) -> Placement:
    """The one with the widest window of those within AS_GOOD of the shortest sweep.

    A window is worth more than it looks on paper, where a drive is always as fast as the last time. The widest come
    first, and no more are tried than can change the answer: often one, where a sweep costs no more than its bytes.
    """
    sweeps = [_Sweep(weights, order, option, rows) for option in options]
    least = min(sweep.least for sweep in sweeps)
    tried: list[tuple[float, Placement]] = []  # from the widest window down
    for sweep, option in sorted(zip(sweeps, options, strict=True), key=lambda pair: -pair[1].window_bytes):
        best = min((cost for cost, _ in tried), default=math.inf)
        if sweep.least > AS_GOOD * best:
            continue
        tried.append((sweep.cost(), option))
        best = min(best, tried[-1][0])
        tried = [pair for pair in tried if pair[0] <= AS_GOOD * best]
        if tried[0][0] <= AS_GOOD * least:
            break
    return tried[0][1]


class _Sweep:
    """A sweep of `rows`, in bytes that the drive could have moved: the mean over shares, and CONTENTION."""

    def __init__(
        self, weights: Sequence[Footprint], order: Sequence[int], placement: Placement, rows: int
    ) -> None:
        self._sizes = [weights[i].window for i in order]
        self._streamed = [i not in placement.residents for i in order]
        self._window = placement.window_bytes
        self._moved = sum(size for size, moves in zip(self._sizes, self._streamed, strict=True) if moves)
        self._total = sum(self._sizes)
        # Of a small model, both in proportion: else they would be all that counts.
        self._pause = min(PAUSE_BYTES, self._total // 64)
        self._restart = min(RESTART_BYTES, max(self._sizes, default=0) // 8)
        share = min(COMPUTE_SHARE + SHARE_OF_A_ROW * (rows - 1), MOST_SHARE)
        self._shares = {share, max(share, OTHER_SHARE)}

    @property
    def least(self) -> float:
        """What cost() is at least: neither the drive nor the operators ever pause."""
        bounds = (max(self._moved, share * self._total + self._pause) for share in self._shares)
        return self._mean(bounds) * (1 - ROUNDING)

    def cost(self) -> float:
        """What it takes on paper."""
        return self._mean(
            steady_sweep(self._sizes, self._streamed, self._window, share, self._pause, self._restart)
            for share in self._shares
        )

    def _mean(self, sweeps: Iterable[float]) -> float:
        return sum(sweeps) / len(self._shares) + CONTENTION * self._moved


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
