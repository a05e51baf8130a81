"""A sweep on paper: between its bounds, and what a window is worth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zinfer.planner.pipeline import steady_sweep

weights = st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=30)
shares = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])


def sweep(pairs, window, share, pause=0):
    return steady_sweep([size for size, _ in pairs], [moves for _, moves in pairs], window, share, pause)


@given(weights, shares, st.integers(0, 50), st.integers(100, 1000))
def test_it_lasts_as_long_as_the_drive_and_the_operators_at_least_and_their_sum_at_most(
    pairs, share, pause, window
):
    drive = sum(size for size, moves in pairs if moves)
    compute = share * sum(size for size, _ in pairs) + pause
    found = sweep(pairs, window, share, pause)
    assert max(drive, compute) - 1e-6 <= found <= drive + compute + 1e-6


@given(weights, shares, st.integers(0, 50))
def test_a_window_for_everything_reaches_the_bound(pairs, share, pause):
    drive = sum(size for size, moves in pairs if moves)
    compute = share * sum(size for size, _ in pairs) + pause
    assert sweep(pairs, 10**6, share, pause) <= max(drive, compute) + 1e-6


def test_a_window_of_one_weight_lets_nothing_overlap_but_the_pause():
    assert sweep([(10, True)] * 5, 10, 0.5, pause=3) == 5 * 15


def test_a_window_of_two_hides_the_faster_side():
    assert sweep([(10, True)] * 8, 20, 0.5) == 80
    assert sweep([(10, True)] * 8, 20, 2.0) == 160


def test_a_group_that_follows_closely_needs_a_window_of_its_size():
    group = [(10, True)] * 4 + [(60, False)]  # 40 to read while the large one computes for 60 x 0.6
    assert sweep(group * 4, 10, 0.6) > sweep(group * 4, 20, 0.6) > sweep(group * 4, 40, 0.6)
