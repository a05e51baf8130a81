"""Reads against os.pread, on every backend, direct and buffered."""

import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zinfer.aio import Engine, File
from zinfer.errors import ClosedError, DriveError, OptionError

from .conftest import ALIGNMENT, BACKENDS, DEADLINE, Memory, read, skip_refused, word_bytes

SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT, 5 * ALIGNMENT + 9, 70 * ALIGNMENT + 5]
GUARD = 2 * ALIGNMENT

wild = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@wild
@given(data=st.data())
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_any_extents_read_what_pread_reads_and_nothing_else(backend, direct, make_file, data):
    size = data.draw(st.sampled_from(SIZES), "size")
    file = File(make_file(size), direct=direct)
    skip_refused(backend, file)
    descriptor = os.open(file.path, os.O_RDONLY)
    block = data.draw(st.sampled_from([ALIGNMENT, 3 * ALIGNMENT, 4 * ALIGNMENT, 1 << 20]), "block")
    depth = data.draw(st.sampled_from([1, 2, 3, 16, 200]), "depth")
    slot = data.draw(st.sampled_from([8192, 1 << 20]), "slot")
    engine = Engine(backend, block_bytes=block, depth=depth, bounce_slot_bytes=slot)
    memories, extents, checks = [], [], []
    for _ in range(data.draw(st.integers(1, 4), "extents")):
        offset = data.draw(st.integers(0, size), "offset")
        length = data.draw(st.integers(0, size - offset), "length")
        slack = data.draw(st.booleans(), "slack")
        congruent = data.draw(st.booleans(), "congruent")
        start = GUARD + (offset % ALIGNMENT if congruent else data.draw(st.integers(0, ALIGNMENT), "start"))
        memory = Memory(start + length + GUARD)
        memories.append(memory)
        extents.append((file, offset, length, memory.address + start, slack))
        checks.append((memory, start, offset, length, slack))
    request = engine.read(extents, memories)
    assert request.wait(DEADLINE)
    assert request.done and request.nbytes == sum(extent[2] for extent in extents) and request.seconds >= 0
    for memory, start, offset, length, slack in checks:
        assert memory.bytes_at(start, length) == os.pread(descriptor, length, offset)
        assert memory.bytes_at(start, length) == word_bytes(size)[offset : offset + length]
        room = ALIGNMENT if slack else 0
        assert memory.untouched(0, start - room)
        assert memory.untouched(start + length + room, len(memory.view))
    engine.check_integrity()
    engine.close()
    os.close(descriptor)


def test_one_extent_spans_many_blocks(backend, words, make_engine):
    path, contents = words
    engine = make_engine(backend, block_bytes=64 << 10, depth=4)
    memory = Memory(len(contents))
    assert read(engine, File(path), 0, len(contents), memory).wait(DEADLINE)
    assert memory.bytes_at(0, len(contents)) == contents
    assert engine.stats["pieces"] >= len(contents) // (64 << 10)


def test_slack_and_congruence_copy_nothing(backend, words, make_engine):
    path, contents = words
    engine, memory = make_engine(backend), Memory(len(contents) + ALIGNMENT)
    assert read(engine, File(path), 5, len(contents) - 5, memory, start=5, slack=True).wait(DEADLINE)
    assert memory.bytes_at(5, len(contents) - 5) == contents[5:]
    stats = engine.stats
    assert stats["bounced_bytes"] == 0
    assert stats["bytes_requested"] == len(contents) - 5 <= stats["bytes_transferred"]
    assert stats["requests"] == 1 and stats["busy_seconds"] > 0 and stats["errors"] == 0


def test_scattered_extents_of_two_files_arrive_in_one_request(backend, make_file, make_engine):
    first, second = File(make_file(70 * ALIGNMENT + 5)), File(make_file(3 * ALIGNMENT))
    engine, memory = make_engine(backend), Memory(10000)
    extents = [(first, 8 * i * 100, 8, memory.address + 16 * i, False) for i in range(300)]
    extents += [(second, 8 * i, 8, memory.address + 16 * i + 8, False) for i in range(300)]
    assert engine.read(extents, memory).wait(DEADLINE)
    contents = word_bytes(300 * 800)
    for i in range(300):
        assert memory.bytes_at(16 * i, 8) == contents[800 * i : 800 * i + 8]
        assert memory.bytes_at(16 * i + 8, 8) == contents[8 * i : 8 * i + 8]


def test_empty_requests_complete(backend, words, make_engine):
    engine, file = make_engine(backend), File(words[0])
    assert engine.read([]).wait(DEADLINE)
    assert engine.read([(file, 0, 0, 0, False), (file, file.size, 0, 0, True)]).wait(DEADLINE)


def test_the_eventfd_counts_completed_requests(backend, words, make_engine):
    engine, file, memory = make_engine(backend), File(words[0]), Memory(4096)
    requests = [read(engine, file, 0, 100, memory) for _ in range(5)]
    assert all(request.wait(DEADLINE) for request in requests)
    counter = os.dup(engine.eventfd)
    engine.close()  # the last count is written just after the last waiter is told
    assert engine.eventfd == -1
    assert int.from_bytes(os.read(counter, 8), "little") == 5
    os.close(counter)


def test_a_bad_extent_stops_the_whole_request(backend, words, make_engine):
    engine, file, memory = make_engine(backend), File(words[0]), Memory(4096)
    closed = File(words[0])
    closed.close()
    good, where = (file, 0, 100, memory.address, False), memory.address
    for bad, kind, text in [
        ((file, -1, 5, where, False), ValueError, "negative"),
        ((file, 0, -5, where, False), ValueError, "negative"),
        ((file, 0, 5, 0, False), ValueError, "address"),
        ((file, file.size - 4, 5, where, False), DriveError, f"size is {file.size} bytes"),
        ((file, 2**62, 2**62, where, False), DriveError, "size"),
        ((closed, 0, 5, where, False), ClosedError, "closed"),
        ((file, 0, 5), ValueError, "extent"),
        ((words[0], 0, 5, where, False), TypeError, r"first item is a File .* not str"),
        ((None, 0, 5, where, False), TypeError, r"first item is a File .* not NoneType"),
        ((file, 0.5, 5, where, False), TypeError, "integer"),
        ((file, "0", 5, where, False), TypeError, "integer"),
        (5, TypeError, "int"),
    ]:
        with pytest.raises(kind, match=text):
            engine.read([good, bad], memory)
    assert memory.untouched(0, 4096)
    assert engine.stats["requests"] == 0


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64, 2**64 + 4096, -(2**63), -(2**63) - 1])
def test_absurd_numbers_are_refused_at_once(backend, words, tmp_path, make_engine, number):
    engine, file, memory = make_engine(backend), File(words[0]), Memory(4096)
    written = File(str(tmp_path / "written"), "w")
    for extent in [(number, 8, memory.address), (0, number, memory.address), (0, 8, number)]:
        with pytest.raises((ValueError, DriveError)):
            request = engine.read([(file, *extent, False)], memory)
            request.wait(DEADLINE)
        if extent[2] != number or number < 0 or number >= 2**63:
            with pytest.raises(ValueError):
                engine.write([(written, *extent, False)], memory)
    with pytest.raises((OptionError, DriveError)):
        File(str(tmp_path / "reserved"), "w", size=number)
    assert not (tmp_path / "reserved").exists()
    for option in ("depth", "block_bytes", "workers", "bounce_slot_bytes"):
        with pytest.raises(OptionError, match=option):
            Engine(backend, **{option: number})
    assert memory.untouched(0, 4096)
    written.close()


@pytest.mark.parametrize("length", [2**37, 2**45, 2**62])
def test_more_bytes_than_there_is_memory_are_refused_at_once(backend, tmp_path, make_engine, length):
    engine, memory = make_engine(backend), Memory(4096)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)  # bytes, none of them on the drive
    sparse, written = File(str(tmp_path / "sparse")), File(str(tmp_path / "written"), "w")
    with pytest.raises(ValueError, match="no memory at the end"):
        engine.write([(written, 0, length, memory.address, False)], memory)
    if length <= sparse.size:
        with pytest.raises(ValueError, match="no memory at the end"):
            engine.read([(sparse, 0, length, memory.address, False)], memory)
    assert engine.stats["requests"] == 0
    written.close()


def test_a_wait_takes_any_number_of_seconds(backend, words, make_engine):
    request = read(make_engine(backend), File(words[0]), 0, 100, Memory(100))
    assert request.wait(float("inf"))
    for seconds in (-1.0, -1e300, float("-inf"), 0.0, 1e300):
        assert request.wait(seconds)
    with pytest.raises(ValueError, match="number of seconds"):
        request.wait(float("nan"))


def test_many_threads_submit_at_once(backend, words, make_engine):
    path, contents = words
    engine, file = make_engine(backend, depth=4, block_bytes=16 << 10), File(path)
    wrong = []

    def work(seed):
        memory = Memory(50_000)
        for turn in range(30):
            offset = (seed * 104729 + turn * 7919) % (len(contents) - 40_000)
            start = seed * turn % 4096
            done = read(engine, file, offset, 40_000, memory, start=start).wait(DEADLINE)
            if not done or memory.bytes_at(start, 40_000) != contents[offset : offset + 40_000]:
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not wrong
    engine.check_integrity()


@pytest.mark.parametrize("other", BACKENDS)
def test_two_engines_share_a_file(backend, other, words, make_engine):
    path, contents = words
    file, engines = File(path), [make_engine(backend), make_engine(other)]
    memories = [Memory(len(contents)) for _ in engines]
    requests = [
        read(engine, file, 0, len(contents), memory) for engine, memory in zip(engines, memories, strict=True)
    ]
    assert all(request.wait(DEADLINE) for request in requests)
    assert all(memory.bytes_at(0, len(contents)) == contents for memory in memories)


def test_auto_says_what_it_took_and_what_not(make_engine):
    engine = make_engine()
    order = ["io_uring", "libaio", "threads"]
    assert [name for name, _ in engine.fallbacks] == order[: order.index(engine.backend)]
    assert all(reason for _, reason in engine.fallbacks)
    assert (engine.depth, engine.block_bytes, engine.bounce_bytes) == (16, 4 << 20, 16 << 20)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "magic"},
        {"depth": 0},
        {"workers": 0},
        {"block_bytes": 5000},
        {"block_bytes": 0},
        {"faults": [("ok",)]},
        {"backend": "faults", "faults": [("boom",)]},
        {"backend": "faults", "faults": [("short",)]},
        {"backend": "faults", "faults": [("delay", -1)]},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError):
        Engine(**options)
