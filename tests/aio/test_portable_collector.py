"""The cycle collector may destroy anything on any thread at any point: nothing hangs, nothing is torn."""

import gc
import threading
import time
import weakref

import pytest

from zinfer.aio import portable
from zinfer.aio.portable.threads import start_thread

from . import scripted
from .conftest import Memory, run_python

DEADLINE = 120.0

# Every few allocations a collection, on users' threads, reactors and workers alike, with unfinished requests,
# files and engines in the garbage.
CHURN = """
import faulthandler, gc, random, sys, threading, time
import numpy
from zinfer.aio.portable import Engine, File
from zinfer.pinned.portable import Pool

faulthandler.dump_traceback_later(100, exit=True)
gc.set_threshold(3, 2, 2)
path, scratch = sys.argv[1:]
contents = open(path, "rb").read()
failures = []

class Node:
    pass

def churn(seed):
    choose = random.Random(seed)
    pool = Pool(1 << 20, page_lock="off", huge_pages=False)
    engine = Engine(choose.choice(["auto", "threads"]), depth=choose.randint(1, 4), block_bytes=65536)
    files = [File(path), File(path, direct="off")]
    for turn in range(60):
        length = choose.randint(1, 300_000)
        offset = choose.randint(0, len(contents) - length)
        while (region := pool.acquire(length + 8192, timeout=0.05)) is None:
            gc.collect()  # the rest is in garbage that is old by now, or drains
        start = choose.choice([offset % 4096, choose.randint(0, 4095)])
        request = engine.read([(choose.choice(files), offset, length, region.address + start, False)], region)
        kind = choose.randrange(5)
        if kind < 2:
            assert request.wait(60)
            assert bytes(region[start : start + length]) == contents[offset : offset + length]
        elif kind == 2:
            node = Node()
            node.cycle = node, request, region
        elif kind == 3:
            file = File(f"{scratch}/{seed}-{turn}", "w", direct=choose.choice(["auto", "off"]))
            writes = [engine.write([(file, i * 1000, 1000, region.address + 7, False)], region) for i in range(5)]
            if turn % 2:
                file.close()
            node = Node()
            node.cycle = node, writes, file
        else:
            node = Node()
            node.cycle = node, engine, request
            engine = Engine(choose.choice(["auto", "threads"]), depth=3, block_bytes=16384)
        node = request = region = writes = file = None
    engine.close()
    deadline = time.monotonic() + 60
    while pool.in_use:  # another thread may be collecting, and what was dropped may still drain
        assert time.monotonic() < deadline, pool.in_use
        time.sleep(0.01)
        gc.collect()
    pool.check_integrity()

def guarded(seed):
    try:
        churn(seed)
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
gc.collect()
assert threading.active_count() == 1, threading.enumerate()
"""


def test_requests_files_and_engines_die_in_cycles_while_others_work(words, tmp_path):
    process = run_python(CHURN, words[0], str(tmp_path))
    try:
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, errors


class HeldBackend(scripted.ScriptedBackend):
    """Completes nothing until it is told to."""

    def __init__(self, bell):
        super().__init__((), bell)
        self.let_go = threading.Event()

    def take_due(self):
        return super().take_due() if self.let_go.is_set() else []


def test_a_request_that_dies_on_an_engines_own_thread_drains_without_it(words, monkeypatch):
    backends = []

    def make_held(wanted, bell, fallbacks):
        backends.append(HeldBackend(bell))
        return backends[0]

    monkeypatch.setattr(scripted.engine, "make_backend", make_held)
    engine, file, memory = portable.Engine(), portable.File(words[0]), Memory(4096)
    memory.request = engine.read([(file, 0, 4096, memory.address, False)], memory)
    watch, requests = weakref.ref(memory), [memory.request]
    memory.request = memory = None
    for _ in range(2000):  # what was never submitted would have nothing to wait for
        if backends[0].pending:
            break
        time.sleep(0.01)
    collecting = start_thread("zinfer-test", requests.clear)  # what waits for the engine there waits for ever
    collecting.join(20)
    assert not collecting.is_alive()
    gc.collect()
    assert watch() is not None  # the engine holds it until nothing writes to it any more
    backends[0].let_go.set()
    engine.close()
    gc.collect()
    assert watch() is None
    engine.check_integrity()


@pytest.mark.parametrize("times", [1, 3])
def test_a_bell_rung_after_it_was_closed_touches_no_descriptor(times, tmp_path):
    from zinfer.aio.portable.threads import Bell

    bell = Bell()
    number = bell.fd
    bell.close()
    with open(tmp_path / "file", "wb+") as other:
        assert other.fileno() == number or number >= 0
        for _ in range(times):
            thread = threading.Thread(target=bell.ring)
            thread.start()
            thread.join(DEADLINE)
        other.seek(0)
        assert other.read() == b""
