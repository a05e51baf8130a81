"""The histogram of how long operations took."""

import contextlib

from zinfer.aio import File

from .conftest import ALIGNMENT, DEADLINE, Memory


def test_every_operation_is_counted_once(make_file, make_engine, backend):
    file = File(make_file(64 * ALIGNMENT), direct="auto")
    engine = make_engine(backend, block_bytes=4 * ALIGNMENT, depth=3)
    assert engine.latencies == []
    memory = Memory(64 * ALIGNMENT)
    request = engine.read([(file, 0, 64 * ALIGNMENT, memory.address, False)], memory)
    assert request.wait(DEADLINE)
    bounds = [seconds for seconds, _ in engine.latencies]
    assert sum(count for _, count in engine.latencies) == 16
    assert bounds == sorted(set(bounds))
    assert 0 <= bounds[0] <= bounds[-1] <= 17 / 16 * request.seconds


def test_a_late_operation_shows_as_one_in_the_last_bucket(make_file, make_engine):
    engine = make_engine("faults", faults=[("ok",), ("delay", 0.2)], block_bytes=ALIGNMENT)
    memory = Memory(2 * ALIGNMENT)
    file = File(make_file(64 * ALIGNMENT))
    assert engine.read([(file, 0, 2 * ALIGNMENT, memory.address, False)], memory).wait(DEADLINE)
    assert engine.latencies[-1][0] >= 0.2


def test_failed_operations_are_not_counted(make_file, make_engine):
    engine = make_engine("faults", faults=[("error", 5)], block_bytes=ALIGNMENT)
    memory = Memory(ALIGNMENT)
    request = engine.read([(File(make_file(64 * ALIGNMENT)), 0, ALIGNMENT, memory.address, False)], memory)
    with contextlib.suppress(OSError):
        request.wait(DEADLINE)
    assert engine.latencies == []
