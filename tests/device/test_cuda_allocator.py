"""What a block takes of a GPU, by the rules of torch's caching allocator."""

from __future__ import annotations

import pytest

from zinfer.device.cuda import LARGE, PARTLY_FILLED, SEGMENT, SMALL, STEP, allocated_by_torch

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (0, 512),
        (1, 512),
        (513, 1024),
        (600 << 10, -(-2 * MIB // 3)),  # three in one of 2 MiB
        (MIB, MIB),
        (4 * MIB, 4 * MIB),
        (6 * MIB, -(-20 * MIB // 3)),  # three in a segment of 20 MiB
        (8 * MIB, 10 * MIB),
        (10 * MIB - 1, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (129 * MIB, 130 * MIB),
    ],
)
def test_a_block_takes_its_share_of_a_segment(asked, taken):
    assert allocated_by_torch(asked) == taken


class Allocator:
    """Torch's, as its source has it: the smallest hole that is large enough, else a new segment."""

    def __init__(self) -> None:
        self.reserved = 0
        self.holes: dict[bool, list[int]] = {True: [], False: []}

    def take(self, nbytes: int) -> None:
        """Allocate a block for good."""
        size = max(512, -(-nbytes // 512) * 512)
        holes = self.holes[size <= SMALL]
        fitting = min((hole for hole in holes if hole >= size), default=None)
        if fitting is None:
            fitting = 2 * MIB if size <= SMALL else SEGMENT if size < LARGE else -(-size // STEP) * STEP
            self.reserved += fitting
        else:
            holes.remove(fitting)
        left = fitting - size
        if left >= 512 if size <= SMALL else left > SMALL:
            holes.append(left)


@pytest.mark.parametrize(
    "nbytes", [300_000, MIB + 1, 3 * MIB, 7 * MIB, 9 * MIB, 10 * MIB, 11 * MIB, 33 * MIB]
)
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_blocks_of_a_size_take_no_more_than_is_counted_but_for_segments_that_are_not_full(nbytes, count):
    allocator = Allocator()
    for _ in range(count):
        allocator.take(nbytes)
    counted = count * allocated_by_torch(nbytes)
    assert counted - SEGMENT <= allocator.reserved <= counted + PARTLY_FILLED


def test_the_blocks_of_a_transformer_take_no_more_than_is_counted():
    layer = [32 * MIB, 8 * MIB, 8 * MIB, 32 * MIB, 86 * MIB, 86 * MIB, 86 * MIB, 8192, 8192]
    allocator = Allocator()
    for _ in range(20):
        for nbytes in layer:
            allocator.take(nbytes)
    assert allocator.reserved <= 20 * sum(map(allocated_by_torch, layer)) + PARTLY_FILLED
