"""Device, host and nvme: bytes are kept, more memory never costs time, and what stays lies evenly in the sweep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.machines import gpu
from tests.planner.test_placement import MIB, footprints, weight_lists
from zinfer.errors import BudgetError
from zinfer.planner.cost import PassWork, sweep
from zinfer.planner.placement import GAP_BYTES, Footprint, all_resident, place, smallest
from zinfer.planner.tiers import Tiers, beside_caches, place_on_cpu, place_on_tiers


def seconds(weights: list[Footprint], tiers: Tiers) -> float:
    asks = tuple((i, 1.0) for i, w in enumerate(weights) if not w.rows_only)
    sizes = [weight.window for weight in weights]
    return sweep(PassWork((), asks), sizes, gpu(), device=tiers.device, host=tiers.host).seconds


def memories(weights: list[Footprint]) -> st.SearchStrategy[int]:
    """Bytes with which either tier works, from the least to more than enough."""
    return st.integers(
        smallest(weights) + sum(w.transient for w in weights), all_resident(weights) + (1 << 30)
    )


def of_host(weights: list[Footprint]) -> st.SearchStrategy[int]:
    """Bytes with which the host works beside any device: what goes there passes through the host's window."""
    return memories(weights).map(lambda nbytes: nbytes + max((w.window for w in weights), default=0))


@settings(deadline=None)
@given(weight_lists, st.data())
def test_neither_tier_holds_more_than_its_budget(weights, data):
    device, host = data.draw(memories(weights)), data.draw(of_host(weights))
    tiers = place_on_tiers(weights, device, host)
    assert tiers.device_bytes + tiers.device_window <= device
    assert tiers.host_bytes + tiers.host_window + tiers.conversions <= host
    assert tiers.device_bytes == sum(weights[i].resident for i in tiers.device)
    assert tiers.host_bytes == sum(weights[i].window for i in tiers.host)  # what they are made from
    assert not tiers.device & tiers.host


@settings(deadline=None)
@given(weight_lists, st.data())
def test_more_host_memory_is_never_slower_but_for_a_wider_window(weights, data):
    device = data.draw(memories(weights))
    low, high = sorted(data.draw(st.tuples(of_host(weights), of_host(weights))))
    slack = (GAP_BYTES + 2 * max(w.window + w.resident for w in weights)) / gpu().drive_read
    more = seconds(weights, place_on_tiers(weights, device, high))
    assert more <= seconds(weights, place_on_tiers(weights, device, low)) + slack


@settings(deadline=None)
@given(weight_lists, st.data())
def test_what_goes_to_the_device_passes_through_the_hosts_window(weights, data):
    tiers = place_on_tiers(weights, data.draw(memories(weights)), data.draw(of_host(weights)))
    streamed = {i for i, w in enumerate(weights) if not w.rows_only} - tiers.host
    assert all(weights[i].window <= tiers.host_window for i in streamed | tiers.device)


@settings(deadline=None)
@given(weight_lists, st.data())
def test_what_caches_take_on_the_device_fewer_residents_leave_and_the_host_keeps_what_it_has(weights, data):
    device = data.draw(memories(weights))
    tiers = place_on_tiers(weights, device, data.draw(of_host(weights)))
    within = data.draw(st.integers(smallest(weights), device))
    left = beside_caches(weights, tiers, within)
    assert left.device_bytes + left.device_window + left.device_conversions <= within
    assert left.host == tiers.host - left.device
    assert (left.host_bytes, left.host_window) == (tiers.host_bytes, tiers.host_window)
    assert beside_caches(weights, tiers, device) == tiers
    spare = data.draw(st.integers(0, sum(w.window for w in weights)))
    kept = beside_caches(weights, tiers, within, spare)
    moved = kept.host - tiers.host
    assert kept.device == left.device and moved <= tiers.device - left.device
    assert kept.host_bytes - tiers.host_bytes == sum(weights[i].window for i in moved) <= spare
    gone = tiers.device - kept.device - kept.host
    assert all(weights[i].window > spare - kept.host_bytes + tiers.host_bytes for i in gone)


def test_every_step_of_more_memory_makes_the_sweep_of_equal_weights_shorter_or_leaves_it():
    weights = [Footprint(64 * MIB, 64 * MIB)] * 100
    by_host = [seconds(weights, place_on_tiers(weights, 1024 * MIB, gib << 30)) for gib in range(1, 8)]
    by_device = [seconds(weights, place_on_tiers(weights, gib << 30, 1024 * MIB)) for gib in range(1, 8)]
    for found in (by_host, by_device):
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0]


@settings(deadline=None)
@given(weight_lists, st.data())
def test_on_the_cpu_the_places_are_those_of_a_run(weights, data):
    available = data.draw(memories(weights))
    placed, tiers = place(weights, available), place_on_cpu(weights, available, available)
    assert (tiers.host, tiers.host_window) == (placed.residents, placed.window_bytes)
    assert not tiers.device and not tiers.device_window


@settings(deadline=None)
@given(weight_lists, st.data())
def test_what_caches_take_on_the_cpu_fewer_residents_leave(weights, data):
    available = data.draw(memories(weights))
    within = data.draw(st.integers(smallest(weights), available))
    tiers = place_on_cpu(weights, available, within)
    assert tiers.host_bytes + tiers.host_window + tiers.conversions <= within


@settings(deadline=None)
@given(st.lists(footprints(), min_size=2, max_size=8), st.data())
def test_too_little_on_a_tier_is_refused_with_what_would_do(weights, data):
    enough = data.draw(memories(weights))
    with pytest.raises(BudgetError, match="the device has") as refusal:
        place_on_tiers(weights, smallest(weights) - 1, enough)
    assert refusal.value.smallest == smallest(weights)
    assert place_on_tiers(weights, smallest(weights), enough)


def test_without_a_drive_the_host_has_to_hold_the_rest():
    weights = [Footprint(64 * MIB, 64 * MIB)] * 40
    assert place_on_tiers(weights, 1024 * MIB, 1024 * MIB).host
    with pytest.raises(BudgetError, match="the host has") as refusal:
        place_on_tiers(weights, 1024 * MIB, 1024 * MIB, drive=False)
    whole = place_on_tiers(weights, 1024 * MIB, refusal.value.smallest, drive=False)
    assert len(whole.device | whole.host) == 40


def test_no_weights_take_no_place():
    assert place_on_tiers([], 0, 0) == place_on_cpu([], 0, 0)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_both_tiers_lie_evenly_over_the_sweep(share):
    weights = [Footprint(16 * MIB, 16 * MIB)] * 400
    memory = int(all_resident(weights) * share)
    tiers = place_on_tiers(weights, memory, memory)
    for kept in (tiers.device, tiers.device | tiers.host):
        longest = gap = 0
        for i in range(2 * len(weights)):
            gap = 0 if i % len(weights) in kept else gap + 1
            longest = max(longest, gap)
        assert longest <= 3 * (len(weights) / len(kept)) + 1
