"""Sweeps: what belongs to which, on one thread and on several."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from zinfer.timeline.sweeps import Mark, SweepLog
from zinfer.timeline.tally import Tally


def mark(at, busy=0.0, transferred=0, asked=0, waited=0.0, hits=0, misses=0):
    return Mark(at, busy, transferred, asked, waited, hits, misses)


def test_before_the_first_sweep_nothing_is_known():
    log = SweepLog()
    log.begin(mark(0))
    assert (log.begun, log.first_seconds, log.sweeps()) == (1, None, ())
    steady = log.steady()
    assert (steady.sweep_seconds, steady.rate, steady.bubble_seconds) == (None, None, 0)


def test_the_time_between_two_sweeps_belongs_to_the_first():
    log = SweepLog()
    log.begin(mark(10))
    log.end(mark(12, transferred=90, asked=100, waited=0.5, hits=3, misses=1), host_bytes=7, device_bytes=0)
    assert log.sweeps()[0].seconds == 2
    log.begin(mark(12.5, transferred=120, asked=100, waited=0.5, hits=3, misses=1))
    (first,) = log.sweeps()
    assert (first.number, first.thread, first.begun, first.seconds) == (0, 0, 10, 2.5)
    assert (first.nvme_bytes, first.host_bytes, first.device_bytes) == (100, 7, 0)
    assert (first.wait_seconds, first.hits, first.misses) == (0.5, 3, 1)
    assert log.first_seconds == 2


def test_a_pause_of_the_callers_belongs_to_none():
    log = SweepLog()
    for start in (0, 5, 100):
        log.begin(mark(start))
        log.end(mark(start + 3), 0, 0)
    assert [sweep.seconds for sweep in log.sweeps()] == [5, 3, 3]


def test_the_first_sweep_is_left_out_of_the_medians_and_bubbles():
    log = SweepLog()
    for number, (start, end) in enumerate([(0, 10), (10, 12), (12, 13)]):
        log.begin(mark(start, 0.75 * start, 100 * start, asked=100 * number, waited=start / 4))
        log.end(mark(end, 0.75 * end, 100 * end, asked=100 * (number + 1), waited=end / 4), 0, 0)
    steady = log.steady()
    assert (steady.sweep_seconds, steady.sweep_bytes) == (1.5, 100)
    assert (steady.wall_seconds, steady.rate) == (3, 100)
    assert steady.bubble_seconds == steady.wait_seconds == pytest.approx(0.75)


def test_sweeps_that_read_nothing_have_no_bubbles():
    log = SweepLog()
    for start in (0, 1):
        log.begin(mark(start))
        log.end(mark(start + 1), 0, 0)
    assert log.steady().wall_seconds == 1
    assert log.steady().bubble_seconds == 0


def test_a_sweep_that_failed_is_counted_and_forgotten():
    log = SweepLog()
    log.begin(mark(0))
    log.begin(mark(5))
    log.end(mark(6), 0, 0)
    assert log.begun == 2
    assert [(sweep.number, sweep.seconds) for sweep in log.sweeps()] == [(1, 1)]
    log.end(mark(9), 0, 0)
    assert len(log.sweeps()) == 1, "an end without a begin"


def test_time_in_which_two_threads_sweep_counts_once():
    log = SweepLog()
    log.begin(mark(0))
    log.end(mark(1), 0, 0)
    log.begin(mark(10, busy=0, transferred=0))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(log.begin, mark(11, busy=0.5, transferred=100)).result()
        log.end(mark(14, busy=2, transferred=400), 0, 0)
        pool.submit(log.end, mark(15, busy=3, transferred=500), 0, 0).result()
    steady = log.steady()
    assert steady.wall_seconds == 5
    assert steady.bubble_seconds == 2
    assert steady.rate == 100
    assert [(sweep.thread, sweep.seconds) for sweep in log.sweeps()] == [(0, 1), (0, 4), (1, 4)]


def test_only_the_newest_are_remembered():
    log = SweepLog(remembered=3)
    for start in range(10):
        log.begin(mark(start))
        log.end(mark(start + 1), 0, 0)
    assert [sweep.number for sweep in log.sweeps()] == [7, 8, 9]
    assert log.begun == 10
    assert log.steady().wall_seconds == 3


def test_no_sweep_is_lost_between_many_threads():
    log = SweepLog()
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait(10)
        for start in range(500):
            log.begin(mark(start))
            log.end(mark(start + 1), 0, 0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert log.begun == 2000
    assert sorted(sweep.number for sweep in log.sweeps()) == list(range(2000))
    assert {sweep.thread for sweep in log.sweeps()} == {0, 1, 2, 3}


def test_each_thread_has_a_tally_of_its_own():
    tally = Tally()
    tally.asked += 5
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (tally.asked, tally.waited, tally.hits, tally.misses)).result() == (
            0,
            0,
            0,
            0,
        )
    assert tally.asked == 5
    assert Tally().asked == 0
