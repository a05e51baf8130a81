"""The recorder: what belongs to which thread, what is kept, and for how long."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.timeline.scenes import FakeTiming
from zinfer.timeline.events import COMPUTE, COPIES, READS, SWEEPS, WAITS
from zinfer.timeline.recorder import Recorder


def spans(recorder, row):
    return recorder.timeline("M").row(row)


def names(recorder, row):
    return [span.name for span in spans(recorder, row)]


def test_compute_lasts_from_a_weight_to_the_next_request_of_the_same_thread():
    recorder = Recorder()
    began = time.perf_counter()
    for name in "ab":
        recorder.asked()
        recorder.got(name, 0)
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:  # another thread's request ends nothing
        pool.submit(recorder.asked).result()
    assert names(recorder, COMPUTE) == ["a"]
    recorder.asked()
    recorder.asked()
    first, second = spans(recorder, COMPUTE)
    assert 0.01 <= first.end - first.start <= time.perf_counter() - began
    assert first.end <= second.start
    assert second.name == "b"


def test_the_end_of_a_sweep_ends_what_was_computed():
    recorder = Recorder()
    recorder.begin_sweep()
    recorder.got("a", 0)
    recorder.end_sweep()
    time.sleep(0.01)
    recorder.begin_sweep()
    recorder.end_sweep()
    (compute,), sweeps = spans(recorder, COMPUTE), spans(recorder, SWEEPS)
    assert [sweep.name for sweep in sweeps] == ["0", "1"]
    assert sweeps[0].start <= compute.start <= compute.end <= sweeps[0].end <= sweeps[1].start - 0.01


def test_an_operator_that_an_error_left_is_not_drawn_until_the_next_sweep():
    recorder = Recorder()
    recorder.begin_sweep()
    recorder.got("a", 0)
    recorder.begin_sweep()
    recorder.end_sweep()
    assert spans(recorder, COMPUTE) == []
    assert names(recorder, SWEEPS) == ["0"]


def test_the_end_of_a_sweep_that_never_began_is_ignored():
    recorder = Recorder()
    recorder.end_sweep()
    assert recorder.timeline("M").spans == ()


def test_threads_are_told_apart_and_numbered():
    recorder = Recorder()
    barrier = threading.Barrier(3)

    def work(name):
        for _ in range(200):
            recorder.begin_sweep()
            for number in range(3):
                recorder.asked()
                recorder.got(f"{name}{number}", number)
            recorder.end_sweep()
        barrier.wait(10)  # all three live at once: no number is used twice

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, "xyz"))
    compute = spans(recorder, COMPUTE)
    assert len(compute) == 3 * 200 * 3
    assert len({(span.thread, span.name[0]) for span in compute}) == 3
    assert {span.thread for span in compute} == {0, 1, 2}
    assert len(set(names(recorder, SWEEPS))) == 600
    for thread in range(3):
        mine = [span for span in compute if span.thread == thread]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_a_read_is_told_of_once_when_it_has_ended():
    recorder = Recorder()
    slow, quick = FakeTiming(), FakeTiming()
    recorder.read("slow", "prefetch", slow)
    recorder.read("quick", "demand", quick)
    assert spans(recorder, READS) == []
    now = time.perf_counter()
    quick.started, quick.finished, quick.transferred = now, now + 1, 70
    (read,) = spans(recorder, READS)
    assert (read.name, read.kind, read.nbytes, read.end - read.start) == (
        "quick",
        "demand",
        70,
        pytest.approx(1),
    )
    slow.started, slow.finished, slow.transferred = now, now + 2, 30
    recorder.read("third", "rows", FakeTiming())
    assert names(recorder, READS) == ["quick", "slow"]
    assert names(recorder, READS) == ["quick", "slow"], "asking twice tells nothing twice"


def test_a_read_dropped_before_it_started_was_none():
    recorder = Recorder()
    recorder.read("a", "prefetch", FakeTiming(started=None, finished=1.0, transferred=0))
    assert spans(recorder, READS) == []


def test_it_keeps_the_newest_events_and_counts_the_others():
    recorder = Recorder(limit=10)
    for number in range(25):
        recorder.waited(str(number), number, number + 1)
        recorder.got("a", number)
    found = recorder.timeline("M")
    assert [span.name for span in found.row(WAITS)] == [str(number) for number in range(15, 25)]
    assert found.dropped == 15
    assert [used for _, used in found.window] == list(range(15, 25))


def test_reads_that_ended_do_not_pile_up():
    recorder = Recorder(limit=10)
    timings = [FakeTiming(1.0, 2.0, 5) for _ in range(100)]
    alive = [weakref.ref(timing) for timing in timings]
    for timing in timings:
        recorder.read("a", "demand", timing)
    timings.clear()
    del timing
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 1


def test_copies_to_a_device_have_a_row_of_their_own():
    recorder = Recorder()
    recorder.copying("a", FakeTiming(1.0, 2.0, 100))
    (copy,) = spans(recorder, COPIES)
    assert (copy.name, copy.nbytes, copy.end - copy.start) == ("a", 100, 1.0)


def test_a_copy_whose_times_nobody_keeps_is_not_waited_for():
    recorder = Recorder()
    for _ in range(3):
        recorder.copying("a", FakeTiming(timed=False))
    recorder.read("b", "demand", FakeTiming(1.0, 2.0, 100))
    recorder.read("b", "demand", FakeTiming(2.0, 3.0, 100))
    assert len(recorder._running) == 1, "what comes after it is kept for good"
    assert spans(recorder, COPIES) == []


def test_an_event_costs_a_few_microseconds():
    recorder, timing = Recorder(), FakeTiming(1.0, 2.0, 5)

    def cost():
        began = time.perf_counter()
        for _ in range(1000):  # what one use of a streamed weight comes to at most
            recorder.read("a", "demand", timing)
            recorder.asked()
            recorder.waited("a", 1.0, 2.0)
            recorder.got("a", 1)
        return (time.perf_counter() - began) / 1000

    assert min(cost() for _ in range(10)) < 30e-6, (
        "2 % of 1.5 ms; a weight worth streaming takes longer to read"
    )
