"""Lanes, unions and totals of what was recorded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.timeline.scenes import timeline
from zinfer.timeline.events import (
    READS,
    SWEEPS,
    Span,
    Timeline,
    lanes,
    overlap,
    rates,
    swept,
    totals,
    union,
)

INTERVALS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair))), max_size=40
)


@given(INTERVALS)
def test_no_two_intervals_of_a_lane_overlap_and_no_lane_is_wasted(intervals):
    intervals = sorted(intervals)
    chosen = lanes(intervals)
    for lane in set(chosen):
        mine = [interval for interval, number in zip(intervals, chosen, strict=True) if number == lane]
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(mine))
    most = max((sum(a <= at < b for a, b in intervals) for at in range(251)), default=0)
    assert len(set(chosen)) <= max(most, 1) + sum(a == b for a, b in intervals)


@given(INTERVALS, INTERVALS)
def test_unions_and_overlaps_count_every_moment_once(first, second):
    def covered(intervals):
        return {at for a, b in intervals for at in range(a, b)}

    one, other = union(first), union(second)
    assert sum(b - a for a, b in one) == len(covered(first))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(one))
    assert overlap(one, other) == len(covered(first) & covered(second))


def test_a_union_closes_gaps_that_cannot_be_seen():
    assert union([(0, 1), (1.5, 2), (4, 5)], gap=0.5) == [(0, 2), (4, 5)]


def test_a_sweep_lasts_until_the_next_unless_the_caller_paused():
    def run(*spans):
        return swept(Timeline("M", tuple(Span(SWEEPS, "0", *span) for span in spans)))

    assert run((0, 2), (2.5, 4)) == [(0, 4)]
    assert run((0, 2), (5, 6)) == [(0, 2), (5, 6)], "longer than a second and than the sweep"
    assert run((0, 10), (15, 16)) == [(0, 16)], "longer than a second only"
    assert run((0, 1), (0.5, 3, 1)) == [(0, 3)], "two threads"


def test_totals_of_a_timeline():
    sums = totals(timeline())
    assert (sums.sweeps, sums.seconds, sums.bytes_read) == (2, 3.0, 4600)
    assert sums.busy_seconds == pytest.approx(
        1.5 + 0.5
    )  # 1.0-2.5, and 3.5-4.0 of the read that outlasts the sweep
    assert sums.bubble_seconds == pytest.approx(1.0)
    assert sums.wait_seconds == 1.0


def test_where_nothing_streams_there_are_no_bubbles():
    spans = (Span(READS, "small", 0, 0.1, nbytes=1, kind="load"), Span(SWEEPS, "0", 1, 5))
    sums = totals(Timeline("M", spans))
    assert (sums.seconds, sums.busy_seconds, sums.bubble_seconds) == (4, 0, 0)


def test_an_empty_timeline_has_totals_of_nothing():
    sums = totals(Timeline("M", ()))
    assert (sums.sweeps, sums.seconds, sums.bubble_seconds, sums.bytes_read) == (0, 0, 0, 0)


def test_the_rate_spreads_each_read_over_its_time_and_loses_no_byte():
    reads = [
        Span(READS, "a", 0, 4, nbytes=400),
        Span(READS, "b", 1.5, 2.5, nbytes=100),
        Span(READS, "c", 3, 3, nbytes=7),
    ]
    found = rates(reads, 0, 4, 4)
    assert found == pytest.approx([100, 150, 150, 107])


def test_the_rate_of_no_time_is_nothing():
    assert rates([Span(READS, "a", 1, 1, nbytes=5)], 1, 1, 3) == [0, 0, 0]
