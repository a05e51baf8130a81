"""How each drive is read, and what bounce memory its engine gets: pure functions on plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zinfer.aio.block_device import BlockDevice
from zinfer.aio.profile import Profile
from zinfer.errors import BudgetError

BLOCK_BYTES = 4 << 20
DEPTH = (
    8  # reads in flight on one disk: enough for its full speed, few enough that an urgent one waits ~10 ms
)
MAX_DEPTH = 256
WORKERS = 4  # of the threads backend, for one disk
MAX_WORKERS = 64
SMALLEST_SLOT = 8192  # bytes: a page of bytes anywhere spans two
LARGEST_SLOT = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What one engine is made with, in the terms of `zinfer.aio.Engine`."""

    backend: str
    depth: int
    block_bytes: int
    workers: int


def settings_for(device: BlockDevice, profile: Profile | None) -> Settings:
    """The setting for `device`: what `profile` found best, else a depth that keeps each of its disks busy."""
    if profile is not None:
        return Settings(profile.backend, profile.depth, profile.block_bytes, profile.workers)
    return Settings(
        "auto",
        min(MAX_DEPTH, DEPTH * device.disks),
        BLOCK_BYTES,
        min(MAX_WORKERS, WORKERS * device.disks),
    )


def divide_bounce(wanted: Sequence[Settings], bounce_bytes: int) -> tuple[list[Settings], int]:
    """`wanted` and the bytes of one bounce slot, such that a slot for each read in flight fits `bounce_bytes`.

    The slot is a power of two and the same for all. Where even the smallest is too much, depths are lowered, all
    by the same factor. Raises BudgetError where that leaves an engine without a read.
    """
    room = bounce_bytes // SMALLEST_SLOT
    if room < len(wanted):
        raise BudgetError(
            f"reading {len(wanted)} drives at once takes {len(wanted) * SMALLEST_SLOT} bytes of buffers, the budget "
            f"has {bounce_bytes}; give max_memory['cpu'] at least {32 * len(wanted) * SMALLEST_SLOT} bytes"
        )
    depth = sum(settings.depth for settings in wanted)
    if depth > room:
        spare = room - len(wanted)  # what is left once each has one read
        wanted = [
            replace(settings, depth=1 + (settings.depth - 1) * spare // (depth - len(wanted)))
            for settings in wanted
        ]
        depth = sum(settings.depth for settings in wanted)
    share = min(LARGEST_SLOT, bounce_bytes // max(depth, 1))
    return list(wanted), 1 << (share.bit_length() - 1)
