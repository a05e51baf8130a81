"""Cancelling, closing, destroying, forking and exiting with reads in flight."""

import errno
import gc
import os
import signal
import threading
import time
import weakref

import pytest

from zinfer.aio import Engine, File
from zinfer.errors import ClosedError, DriveError

from .conftest import DEADLINE, REAL, Memory, read, run_python

BLOCK = 64 << 10


@pytest.fixture
def file(words):
    return File(words[0])


def slow_engine(make_engine, seconds=0.3, **options):
    return make_engine("faults", faults=[("delay", seconds)] * 4, block_bytes=BLOCK, **options)


def test_cancel_drops_what_has_not_started(make_engine, file):
    engine, memory = slow_engine(make_engine, depth=1), Memory(20 * BLOCK)
    request = read(engine, file, 0, 20 * BLOCK, memory)
    time.sleep(0.05)
    request.cancel()
    request.cancel()
    for _ in range(2):
        with pytest.raises(DriveError) as caught:
            request.wait(DEADLINE)
    assert (caught.value.errno, caught.value.path) == (errno.ECANCELED, file.path)
    assert engine.stats["pieces"] <= 1 and engine.stats["errors"] == 0
    assert memory.untouched(BLOCK, 20 * BLOCK)


def test_cancel_of_a_queued_request_is_immediate(make_engine, file):
    engine, memory = slow_engine(make_engine, seconds=1.0, depth=1), Memory(2 * BLOCK)
    first = read(engine, file, 0, BLOCK, memory)
    queued = read(engine, file, 0, BLOCK, memory, start=BLOCK)
    queued.cancel()
    with pytest.raises(DriveError):
        queued.wait(0.5)
    assert not first.done
    assert first.wait(DEADLINE)


def test_cancel_after_completion_changes_nothing(make_engine, file):
    request = read(make_engine(), file, 0, 100, Memory(100))
    assert request.wait(DEADLINE)
    request.cancel()
    assert request.wait(DEADLINE)


def test_a_request_holds_its_keepalive_and_no_longer(make_engine, file):
    engine, memory = make_engine(), Memory(100)
    watch = weakref.ref(memory)
    request = read(engine, file, 0, 100, memory)
    del memory
    gc.collect()
    assert watch() is not None
    assert request.wait(DEADLINE)
    del request
    assert watch() is None


def test_a_keepalive_that_holds_its_request_is_collected(make_engine, file, implementation):
    engine, memory = slow_engine(make_engine), Memory(100)
    memory.request = read(engine, file, 0, 100, memory)
    watch = weakref.ref(memory)
    del memory
    gc.collect()
    if implementation == "portable":  # its engine holds the keepalive of what is in flight
        assert read(engine, file, 0, 100, Memory(100)).wait(DEADLINE)
        gc.collect()
    assert watch() is None
    engine.check_integrity()


def test_destroying_an_unfinished_request_waits_until_nothing_writes(make_engine, file):
    engine, memory = slow_engine(make_engine, depth=2), Memory(20 * BLOCK)
    request = engine.read([(file, 0, 20 * BLOCK, memory.address, False)])
    time.sleep(0.05)
    began = time.monotonic()
    del request
    assert time.monotonic() - began > 0.1
    memory.view[:] = 1
    time.sleep(0.4)
    assert (memory.view == 1).all()
    engine.check_integrity()


def test_other_threads_run_while_a_request_is_destroyed(make_engine, file):
    engine, memory = slow_engine(make_engine), Memory(BLOCK)
    request, ticks, stop = read(engine, file, 0, BLOCK, memory), [], threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    time.sleep(0.05)
    thread.start()
    del request
    stop.set()
    thread.join(DEADLINE)
    assert len(ticks) > 5


@pytest.mark.parametrize("backend", REAL)
def test_requests_dropped_at_once_leave_nothing_behind(make_engine, file, backend):
    engine, memory = make_engine(backend, depth=4, block_bytes=BLOCK), Memory(file.size)
    for turn in range(200):
        read(engine, file, 0, file.size - turn, memory, start=turn % 3)
    engine.check_integrity()
    assert read(engine, file, 0, file.size, memory).wait(DEADLINE)


def test_a_request_outlives_the_names_of_its_engine_and_file(words):
    memory = Memory(1000)
    request = Engine().read([(File(words[0]), 0, 1000, memory.address, False)], memory)
    assert request.wait(DEADLINE)
    assert memory.bytes_at(0, 1000) == words[1][:1000]


def test_a_file_closed_in_flight_is_read_to_the_end_and_then_closed(make_engine, words):
    engine, before = slow_engine(make_engine), len(os.listdir("/proc/self/fd"))
    file, memory = File(words[0]), Memory(10 * BLOCK)
    request = read(engine, file, 0, 10 * BLOCK, memory)
    file.close()
    with pytest.raises(ClosedError):
        read(engine, file, 0, 1, memory)
    assert request.wait(DEADLINE)
    assert memory.bytes_at(0, 10 * BLOCK) == words[1][: 10 * BLOCK]
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_finishes_what_was_accepted_and_refuses_more(make_engine, file, words):
    engine, memory = slow_engine(make_engine, seconds=0.1, depth=2), Memory(10 * BLOCK)
    request = read(engine, file, 0, 10 * BLOCK, memory)
    engine.close()
    engine.close()
    assert request.done and request.wait(0)
    assert memory.bytes_at(0, 10 * BLOCK) == words[1][: 10 * BLOCK]
    with pytest.raises(ClosedError, match="closed"):
        read(engine, file, 0, 1, memory)
    request.cancel()


@pytest.mark.parametrize("backend", REAL)
def test_engines_leave_no_descriptor_and_no_thread(backend, file):
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(10):
        engine = Engine(backend)
        assert read(engine, file, 3, 100, Memory(100)).wait(DEADLINE)
        del engine
    deadline = time.monotonic() + DEADLINE
    while (
        len(os.listdir("/proc/self/task")) != before[1]
    ):  # joined: the kernel takes a moment more to bury it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before[0]


SLOW_READ = """
import ctypes, sys, time
from zinfer.aio import Engine, File
file = File(sys.argv[1])
engine = Engine("faults", faults=[("delay", float(sys.argv[2]))] * 4, block_bytes=65536, depth=2)
buffer = ctypes.create_string_buffer(1 << 20)
request = engine.read([(file, 0, 1 << 20, ctypes.addressof(buffer), False)], buffer)
"""


def test_control_c_ends_a_wait_promptly(words):
    code = (
        SLOW_READ
        + """
print("waiting", flush=True)
try:
    request.wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
request.cancel()
other = ctypes.create_string_buffer(1 << 20)
assert Engine().read([(file, 0, 1 << 20, ctypes.addressof(other), False)], other).wait(10)
buffer = ctypes.create_string_buffer(1 << 20)
again = engine.read([(file, 0, 1 << 20, ctypes.addressof(buffer), False)], buffer)
assert again.wait(10) and buffer.raw == other.raw
engine.check_integrity()
engine.close()
"""
    )
    process = run_python(code, words[0], "2")
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - began < 1.5
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()


def test_an_exception_out_of_a_wait_leaves_the_request_as_it_was(make_engine, file, words):
    """What a signal's handler raises; a timeout by SIGALRM is the usual one."""
    engine, memory = slow_engine(make_engine, seconds=0.6), Memory(BLOCK)
    request = read(engine, file, 0, BLOCK, memory)

    def raise_it(*_):
        raise LookupError("the handler's")

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        began = time.monotonic()
        with pytest.raises(LookupError, match="the handler's"):
            request.wait(DEADLINE)
        assert time.monotonic() - began < 0.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not request.done
    assert request.wait(DEADLINE)
    assert memory.bytes_at(0, BLOCK) == words[1][:BLOCK]


EXITS = {
    "with the names alive": "",
    "without the names": "del engine, request",
    "by an exception": "sys.exit(0)",
    "with a cycle": "class C: pass\nc = C(); c.c = c, request, buffer; del request, engine, buffer",
    "with a waiting daemon thread": (
        "import threading\nthreading.Thread(target=request.wait, daemon=True).start(); time.sleep(0.1)"
    ),
    "with submitting daemon threads": (
        "import threading\n"
        "def work():\n    while True: engine.read([(file, 0, 9, ctypes.addressof(buffer), False)], buffer)\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.05)"
    ),
}


@pytest.mark.parametrize("ending", EXITS.values(), ids=EXITS.keys())
def test_the_interpreter_exits_in_flight_without_crash_or_hang(words, ending):
    process = run_python(SLOW_READ + ending + "\n", words[0], "0.5")
    try:
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "terminate" not in errors and "Fatal" not in errors


@pytest.mark.parametrize("backend", ["faults", *REAL])
def test_a_forked_child_is_refused_and_harms_nothing(words, backend):
    code = """
import ctypes, os, sys, signal
from zinfer.aio import Engine, File
from zinfer.errors import ClosedError
signal.alarm(15)
file = File(sys.argv[1])
options = {"faults": [("delay", 0.5)]} if sys.argv[2] == "faults" else {}
engine = Engine(sys.argv[2], **options)
buffer = ctypes.create_string_buffer(1 << 20)
extent = (file, 0, 1 << 20, ctypes.addressof(buffer), False)
request = engine.read([extent], buffer)
timing = request.timing
pid = os.fork()
if pid == 0:
    refused = 0
    assert timing.started is None or timing.started > 0
    del timing
    uses = [
        lambda: engine.read([extent]), lambda: request.wait(), lambda: request.cancel(), lambda: request.done,
        lambda: request.timing,
        lambda: engine.stats, lambda: engine.close(), lambda: engine.check_integrity(),
    ]
    for use in uses:
        try:
            use()
        except ClosedError as error:
            refused += "fork" in str(error)
    del request, engine
    own = Engine(sys.argv[2])
    assert own.read([extent], buffer).wait(5)
    sys.exit(0 if refused == len(uses) else 3)
assert os.waitpid(pid, 0)[1] == 0
assert request.wait(10)
assert buffer.raw == open(sys.argv[1], "rb").read(1 << 20)
engine.check_integrity()
"""
    process = run_python(code, words[0], backend)
    try:
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, errors
