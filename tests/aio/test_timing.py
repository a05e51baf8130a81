"""Requests tell when they really ran, on the clock of time.perf_counter, and what was moved for them."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref

import numpy
import pytest

from zinfer.aio import Engine, File
from zinfer.aio.joint import JointRequest
from zinfer.errors import DriveError

from .conftest import ALIGNMENT, DEADLINE, Memory, read


@pytest.fixture
def file(make_file) -> File:
    return File(make_file(64 * ALIGNMENT))


def test_a_read_starts_after_it_was_asked_for_and_ends_before_its_waiter_knows(file, make_engine, backend):
    engine = make_engine(backend, block_bytes=4 * ALIGNMENT)
    asked = time.perf_counter()
    request = read(engine, file, 0, 64 * ALIGNMENT, Memory(64 * ALIGNMENT))
    assert request.wait(DEADLINE)
    known = time.perf_counter()
    timing = request.timing
    assert timing.started is not None and timing.finished is not None
    assert asked <= timing.started <= timing.finished <= known
    assert timing.finished - timing.started <= request.seconds
    assert timing.transferred == 64 * ALIGNMENT


def test_what_is_not_known_yet_is_none(file, make_engine):
    engine = make_engine("faults", faults=[("delay", 0.3)], block_bytes=ALIGNMENT, depth=1)
    memory = Memory(2 * ALIGNMENT)
    first, second = (read(engine, file, 0, ALIGNMENT, memory, start) for start in (0, ALIGNMENT))
    queued = second.timing
    assert (queued.started, queued.finished, queued.transferred) == (None, None, None)
    assert second.wait(DEADLINE)
    assert first.timing.finished is not None and queued.started is not None and queued.finished is not None
    assert first.timing.finished - first.timing.started >= 0.3
    assert queued.started >= first.timing.started + 0.3, "it was queued meanwhile, and did not run"
    assert queued.transferred == ALIGNMENT


def test_the_first_of_several_operations_starts_it_and_the_last_ends_it(file, make_engine):
    engine = make_engine(
        "faults", faults=[("ok",), ("delay", 0.1), ("delay", 0.1)], block_bytes=ALIGNMENT, depth=1
    )
    request = read(engine, file, 0, 3 * ALIGNMENT, Memory(3 * ALIGNMENT))
    assert request.wait(DEADLINE)
    assert request.timing.finished - request.timing.started >= 0.2


def test_bytes_moved_again_count_again_and_all_requests_add_up_to_the_engines_figure(file, make_engine):
    engine = make_engine("faults", faults=[("short", 100), ("ok",)], block_bytes=8 * ALIGNMENT)
    memory = Memory(16 * ALIGNMENT)
    requests = [read(engine, file, at * ALIGNMENT, 8 * ALIGNMENT, memory, at * ALIGNMENT) for at in (0, 8)]
    for request in requests:
        assert request.wait(DEADLINE)
    moved = [request.timing.transferred for request in requests]
    assert sum(moved) == engine.stats["bytes_transferred"] == 16 * ALIGNMENT + 100


def test_a_failed_read_ends_too(file, make_engine):
    engine = make_engine("faults", faults=[("error", 5)], block_bytes=ALIGNMENT)
    request = read(engine, file, 0, ALIGNMENT, Memory(ALIGNMENT))
    with pytest.raises(DriveError):
        request.wait(DEADLINE)
    timing = request.timing
    assert timing.started <= timing.finished and timing.transferred == 0


def test_a_read_cancelled_in_the_queue_never_started(file, make_engine):
    engine = make_engine("faults", faults=[("delay", 0.2)], block_bytes=ALIGNMENT, depth=1)
    memory = Memory(2 * ALIGNMENT)
    first = read(engine, file, 0, ALIGNMENT, memory)
    second = read(engine, file, 0, ALIGNMENT, memory, ALIGNMENT)
    second.cancel()
    with contextlib.suppress(DriveError):
        second.wait(DEADLINE)
    assert first.wait(DEADLINE)
    assert second.timing.started is None
    assert second.timing.finished is not None and second.timing.transferred == 0


def test_the_timing_of_a_request_that_was_dropped_stays_and_keeps_no_memory(file, make_engine, backend):
    engine = make_engine(backend)
    memory = numpy.empty(2 * ALIGNMENT, dtype=numpy.uint8)
    memory_alive = weakref.ref(memory)
    at = -memory.ctypes.data % ALIGNMENT + memory.ctypes.data
    request = engine.read([(file, 0, ALIGNMENT, at, False)], memory)
    timing = request.timing
    del request, memory
    gc.collect()
    assert memory_alive() is None
    assert timing.finished is not None


def test_a_timing_outlives_its_engine(file):
    engine = Engine("threads")
    timing = read(engine, file, 0, ALIGNMENT, Memory(ALIGNMENT)).timing
    engine.close()
    del engine
    gc.collect()
    assert timing.finished is not None


def test_a_joint_request_runs_from_its_first_operation_to_the_end_of_its_last_part(file, make_engine):
    engines = [make_engine("faults", faults=[("delay", seconds)]) for seconds in (0.0, 0.2)]
    memory = Memory(2 * ALIGNMENT)
    parts = [
        read(engine, file, 0, ALIGNMENT, memory, number * ALIGNMENT) for number, engine in enumerate(engines)
    ]
    joint = JointRequest(parts)
    timing = joint.timing
    assert parts[0].wait(DEADLINE)
    assert (timing.finished, timing.transferred) == (None, None)
    assert joint.wait(DEADLINE)
    first, last = (part.timing for part in parts)
    assert timing.started == min(first.started, last.started)
    assert timing.finished == max(first.finished, last.finished)
    assert timing.transferred == 2 * ALIGNMENT


def test_a_joint_request_without_parts_never_ran():
    timing = JointRequest([]).timing
    assert (timing.started, timing.finished, timing.transferred) == (None, None, 0)
