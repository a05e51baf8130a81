"""Which setting reads a drive, and how engines divide the bounce memory: a ceiling, whatever the drives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.aio.block_device import BlockDevice
from zinfer.aio.profile import Profile
from zinfer.aio.settings import LARGEST_SLOT, SMALLEST_SLOT, Settings, divide_bounce, settings_for
from zinfer.errors import BudgetError

DRIVE = BlockDevice("key", "nvme0n1")
PROFILE = Profile("libaio", 1 << 20, 32, 3, 3.3e9, None, "2026-11-20T21:00:00")


def test_a_profile_decides_where_there_is_one():
    array = BlockDevice("key", "md0", disks=4)
    assert settings_for(array, PROFILE) == Settings("libaio", 32, 1 << 20, 3)


@pytest.mark.parametrize(("disks", "depth"), [(1, 8), (2, 16), (4, 32), (32, 256), (100, 256)])
def test_without_one_depth_goes_with_the_disks_of_a_raid_set(disks, depth):
    found = settings_for(BlockDevice("key", "md0", disks=disks), None)
    assert (found.backend, found.depth, found.block_bytes) == ("auto", depth, 4 << 20)
    assert found.workers == min(64, 4 * disks)


def wanted(*depths):
    return [Settings("auto", depth, 4 << 20, 4) for depth in depths]


def test_one_drive_gets_all_of_it():
    assert divide_bounce(wanted(8), 8 << 20) == (wanted(8), 1 << 20)
    assert divide_bounce(wanted(8), 64 << 10) == (wanted(8), 8 << 10)


def test_a_deeper_setting_gets_smaller_slots():
    assert divide_bounce(wanted(64), 8 << 20) == (wanted(64), 128 << 10)
    assert divide_bounce(wanted(8, 8), 8 << 20) == (wanted(8, 8), 512 << 10)


def test_where_the_smallest_slots_are_too_many_depths_are_lowered():
    assert divide_bounce(wanted(8, 8), 64 << 10) == (wanted(4, 4), 8 << 10)
    assert divide_bounce(wanted(32, 8, 1), 128 << 10) == (wanted(11, 3, 1), 8 << 10)


def test_nothing_to_read_divides_too():
    assert divide_bounce([], 64 << 10)[0] == []


def test_more_drives_than_slots_are_refused_with_the_budget_that_works():
    with pytest.raises(BudgetError, match=rf"9 drives at once .* at least {9 * 32 * SMALLEST_SLOT} bytes"):
        divide_bounce(wanted(*[8] * 9), 64 << 10)


@given(
    st.lists(st.integers(1, 1024), min_size=1, max_size=8), st.integers(16, 23).map(lambda bits: 1 << bits)
)
def test_it_is_a_ceiling_and_keeps_every_drive_going(depths, budget):
    found, slot = divide_bounce(wanted(*depths), budget)
    assert sum(settings.depth for settings in found) * slot <= budget
    assert all(1 <= settings.depth <= depth for settings, depth in zip(found, depths, strict=True))
    assert SMALLEST_SLOT <= slot <= LARGEST_SLOT and slot & (slot - 1) == 0
    if sum(depths) * SMALLEST_SLOT <= budget:
        assert [settings.depth for settings in found] == depths
