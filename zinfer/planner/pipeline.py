"""A sweep as it runs: the drive fills a window, operators empty it. Pure, and in bytes that the drive could have moved.

    read of a weight:  after the one before, and once the weights in the window leave it room in one piece
    operator:          after the one before, and after its weight's read; its room comes free when it ends

The window is a ring, as the pool is in first-in first-out use: what does not fit before its end begins at its start.

Sweeps follow each other, so that the drive reads for the next while the last operators of one compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

SWEEPS = 2  # the second begins with a window that the first has filled


def steady_sweep(
    sizes: Sequence[int],
    streamed: Sequence[bool],
    window: int,
    share: float,
    pause: int = 0,
    restart: int = 0,
) -> float:
    """What a sweep takes once it has run for a while.

    `sizes`: bytes of the weights in operator order, `streamed`: which of them are read each time, through `window`
    bytes. `share`: time to compute with a weight over the time to read it. `pause`: between two sweeps. `restart`: what
    a drive that had to wait for room loses besides, until its queue is full again.
    """
    now = drive = before = 0.0
    held: deque[tuple[int, int, float]] = deque()  # from, to, and when its operator ends
    cursor = 0
    for _ in range(SWEEPS):
        before = now
        for size, from_drive in zip(sizes, streamed, strict=True):
            if from_drive:
                start = cursor if cursor + size <= window else 0
                cursor = start + size
                while held and any(begin < cursor and start < end for begin, end, _ in held):
                    at = held.popleft()[2]
                    drive = drive if at <= drive else at + restart
                drive += size
                now = max(now, drive)
            now += share * size
            if from_drive:
                held.append((start, cursor, now))
        now += pause
    return now - before
