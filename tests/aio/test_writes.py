"""Writes against a model in memory, on every backend, direct and buffered."""

import contextlib
import errno
import itertools
import os
import subprocess
import threading

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zinfer.aio import Engine, File
from zinfer.errors import ClosedError, DriveError, OptionError

from .conftest import (
    ALIGNMENT,
    BACKENDS,
    DEADLINE,
    Memory,
    _split,
    needs_libaio,
    run_python,
    skip_refused,
    word_bytes,
)

BLOCK = 64 << 10
EDGES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT, 5 * ALIGNMENT + 9, 40 * ALIGNMENT + 5]
NUMBERS = itertools.count()

wild = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["auto", "off"])
def direct(request):
    return request.param


@pytest.fixture
def new_path(tmp_path):
    return lambda: str(tmp_path / f"written-{next(NUMBERS)}")


def filled(contents: bytes, start: int = 0) -> Memory:
    memory = Memory(start + len(contents))
    memory.view[start : start + len(contents)] = numpy.frombuffer(contents, dtype=numpy.uint8)
    return memory


def write(engine, file, offset, contents, start=0):
    memory = filled(contents, start)
    return engine.write([(file, offset, len(contents), memory.address + start, False)], memory)


def contents_of(path):
    with open(path, "rb") as stream:
        return stream.read()


@wild
@given(data=st.data())
def test_any_writes_in_turn_leave_what_pwrite_leaves(backend, direct, new_path, data):
    path, model_path = new_path(), new_path()
    size = data.draw(st.sampled_from([None, *EDGES]), "size")
    file = File(path, "w", size=size, direct=direct)
    skip_refused(backend, file)
    model = os.open(model_path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(model, size or 0)
    engine = Engine(backend, block_bytes=4 * ALIGNMENT, depth=3, bounce_slot_bytes=8192)
    requests = []
    for number in range(data.draw(st.integers(1, 5), "requests")):
        offset = data.draw(st.sampled_from(EDGES), "from") + data.draw(st.integers(0, 9), "shift")
        length = data.draw(st.sampled_from(EDGES), "length")
        congruent = data.draw(st.booleans(), "congruent")
        start = offset % ALIGNMENT if congruent else data.draw(st.integers(0, ALIGNMENT), "start")
        contents = bytes([number + 1]) * length
        requests.append(write(engine, file, offset, contents, start))
        os.pwrite(model, contents, offset)
    # Nobody waited in between: what overlaps lands in the order of submission.
    assert all(request.wait(DEADLINE) for request in requests)
    engine.check_integrity()
    engine.close()
    assert file.size == os.fstat(model).st_size
    file.close()
    os.close(model)
    assert contents_of(path) == contents_of(model_path)


@wild
@given(data=st.data())
def test_neighbours_that_share_blocks_all_survive(backend, direct, new_path, data):
    length = 7 * ALIGNMENT + 123
    cuts = data.draw(st.lists(st.integers(1, length - 1), min_size=5, max_size=40, unique=True), "cuts")
    ends = [0, *sorted(cuts), length]
    order = data.draw(st.permutations(range(len(ends) - 1)), "order")
    path, expected = new_path(), word_bytes(length)
    file = File(path, "w", direct=direct)
    skip_refused(backend, file)
    engine, memory = Engine(backend, depth=8), filled(expected)
    requests = [
        engine.write([(file, ends[i], ends[i + 1] - ends[i], memory.address + ends[i], False)], memory)
        for i in order
    ]
    assert all(request.wait(DEADLINE) for request in requests)
    engine.close()
    file.close()
    assert contents_of(path) == expected


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 17), st.integers(1 << 20, 1 << 21), st.booleans())
def test_pieces_of_a_write_are_single_blocks_in_part_or_whole_blocks(offset, length, address, congruent):
    if congruent:
        address += (offset - address) % ALIGNMENT
    at = offset
    for _, start, size, source, span, span_size, bounced in _split(
        [(0, offset, length, address, False)], ALIGNMENT, 16384, 8192, writing=True
    ):
        assert start == at and size > 0 and source == address + start - offset
        assert span % ALIGNMENT == 0 and span_size % ALIGNMENT == 0
        whole = (start, size) == (span, span_size)
        assert whole or (
            span_size == ALIGNMENT and bounced and span <= start < start + size <= span + span_size
        )
        assert not whole or bounced == ((address - offset) % ALIGNMENT != 0)
        at += size
    assert at == offset + length


def test_an_aligned_write_is_not_copied(backend, new_path, make_engine):
    file, engine = File(new_path(), "w", size=1 << 20), make_engine(backend)
    assert write(engine, file, 0, word_bytes(1 << 20)).wait(DEADLINE)
    assert engine.stats["bounced_bytes"] == 0
    file.close()
    assert contents_of(file.path) == word_bytes(1 << 20)


def test_one_request_writes_two_files(backend, new_path, make_engine):
    files, engine = [File(new_path(), "w") for _ in range(2)], make_engine(backend)
    contents = word_bytes(100_000)
    memory = filled(contents)
    extents = [(files[i // 1000 % 2], i, 1000, memory.address + i, False) for i in range(0, 100_000, 1000)]
    assert engine.write(extents, memory).wait(DEADLINE)
    for file in files:
        file.close()
    merged = bytearray(contents_of(files[1].path))
    for i in range(0, 99_000, 2000):
        merged[i : i + 1000] = contents_of(files[0].path)[i : i + 1000]
    assert bytes(merged) == contents


def test_many_threads_write_their_own_stripes(backend, new_path, make_engine):
    file, engine = File(new_path(), "w"), make_engine(backend, depth=4, block_bytes=8192)
    expected, stripe, wrong = word_bytes(400_000), 1000, []

    def work(first):
        for start in range(first * stripe, len(expected), 4 * stripe):
            if not write(engine, file, start, expected[start : start + stripe], start % 7).wait(DEADLINE):
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    file.close()
    assert not wrong and contents_of(file.path) == expected


@pytest.mark.parametrize(
    "script",
    [
        [("short", 1)],
        [("ok",), ("short", 4096)],
        [("ok",), ("short", 5000), ("short", 5000), ("short", 8192)],
        [("error", errno.EINTR)] * 5,
        [("error", errno.EAGAIN)] * 20,
        [("hold", 3)],
        [("delay", 0.05), ("delay", 0.02), ("hold", 2)],
        [("zero",)],
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [100, 17])
def test_what_can_be_repaired_is_repaired(make_engine, new_path, direct, script, start):
    engine = make_engine("faults", faults=script, block_bytes=BLOCK, depth=4)
    file, contents = File(new_path(), "w", direct=direct), word_bytes(3 * BLOCK + 77)
    assert write(engine, file, 100, contents, start).wait(DEADLINE)
    assert engine.stats["errors"] == 0
    assert (engine.stats["retries"] > 0) == any(line[0] in ("short", "error", "zero") for line in script)
    file.close()
    assert contents_of(file.path) == bytes(100) + contents


@pytest.mark.parametrize(
    "script", [[("short", 100)], [("short", 4095)] * 2, [("error", errno.EINTR)], [("hold", 1)]]
)
def test_the_block_of_an_edge_is_read_again_until_it_is_whole(make_engine, new_path, script):
    path = new_path()
    file = File(path, "w", size=3 * ALIGNMENT)
    if not file.direct:
        pytest.skip(file.direct_reason)
    before = word_bytes(3 * ALIGNMENT)
    first = make_engine("threads")
    assert write(first, file, 0, before).wait(DEADLINE)
    engine = make_engine("faults", faults=script)
    assert write(engine, file, ALIGNMENT + 5, b"x" * 100).wait(DEADLINE)
    file.close()
    assert contents_of(path) == before[: ALIGNMENT + 5] + b"x" * 100 + before[ALIGNMENT + 105 :]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_an_error_names_path_range_cause_and_remedy_and_the_rest_drains(make_engine, new_path, direct, code):
    engine = make_engine("faults", faults=[("delay", 0.05), ("error", code)], block_bytes=BLOCK, depth=3)
    file = File(new_path(), "w", direct=direct)
    request = write(engine, file, 0, bytes(20 * BLOCK))
    with pytest.raises(DriveError) as caught:
        request.wait(DEADLINE)
    error = caught.value
    assert (error.path, error.offset, error.length) == (file.path, BLOCK, BLOCK)
    assert (error.errno, error.backend) == (code, "faults")
    for part in [f"writing {BLOCK} bytes at offset {BLOCK}", os.strerror(code), "; "]:
        assert part in str(error)
    assert engine.stats["errors"] == 1 and engine.stats["pieces"] <= 4
    file.close()


def test_a_drive_that_takes_nothing_is_an_error(make_engine, new_path, direct):
    engine = make_engine("faults", faults=[("zero",)] * 10)
    with pytest.raises(DriveError) as caught:
        write(engine, File(new_path(), "w", direct=direct), 0, bytes(ALIGNMENT)).wait(DEADLINE)
    assert caught.value.errno == errno.EIO


def test_a_failed_write_does_not_hold_up_those_that_waited_for_its_block(make_engine, new_path):
    engine = make_engine("faults", faults=[("delay", 0.05), ("error", errno.EIO)], depth=4)
    file = File(new_path(), "w")
    good = write(engine, file, 0, b"a" * 100)
    bad = write(engine, file, 100, b"b" * 100)
    last = write(engine, file, 200, b"c" * 100)
    assert good.wait(DEADLINE)
    if file.direct:
        with pytest.raises(DriveError):
            bad.wait(DEADLINE)
    assert last.wait(DEADLINE)
    file.close()
    assert contents_of(file.path)[:100] == b"a" * 100 and contents_of(file.path)[200:] == b"c" * 100


def test_a_cancelled_write_ends_and_leaves_the_engine_whole(make_engine, new_path):
    engine = make_engine("faults", faults=[("delay", 1.0)] * 2, block_bytes=BLOCK, depth=2)
    file = File(new_path(), "w")
    requests = [write(engine, file, 100 * i, bytes(10 * BLOCK)) for i in range(3)]
    for request in requests:
        request.cancel()
        request.cancel()
        with pytest.raises(DriveError) as caught:
            request.wait(DEADLINE)
        assert caught.value.errno == errno.ECANCELED
    file.close()


def test_refusals_name_the_remedy_and_write_nothing(backend, new_path, words, make_engine):
    engine, memory = make_engine(backend), Memory(4096)
    file, reading, where = File(new_path(), "w"), File(words[0]), memory.address
    closed = File(new_path(), "w")
    closed.close()
    good = (file, 0, 100, where, False)
    for bad, kind, text in [
        ((reading, 0, 5, where, False), OptionError, 'mode="w"'),
        ((file, 0, 5, where, True), OptionError, "slack"),
        ((file, -1, 5, where, False), ValueError, "negative"),
        ((file, 0, -5, where, False), ValueError, "negative"),
        ((file, 2**63 - 1, 5, where, False), ValueError, "no file can be that long"),
        ((file, 0, 5, 0, False), ValueError, "address"),
        ((closed, 0, 5, where, False), ClosedError, "closed"),
    ]:
        with pytest.raises(kind, match=text):
            engine.write([good, bad], memory)
    with pytest.raises(OptionError, match='mode="r"'):
        engine.read([good], memory)
    assert engine.stats["requests"] == 0
    file.close()
    assert contents_of(file.path) == b""


@needs_libaio
def test_a_buffered_file_is_refused_by_libaio(new_path, make_engine):
    with pytest.raises(OptionError, match="silently block"):
        write(make_engine("libaio"), File(new_path(), "w", direct="off"), 0, b"x")


def test_options_of_a_file_that_make_no_sense_are_refused(new_path, words):
    for arguments in [{"mode": "a"}, {"mode": "r", "size": 5}, {"mode": "w", "size": -1}]:
        with pytest.raises(OptionError):
            File(words[0], **arguments)
    assert contents_of(words[0]) == words[1]
    with pytest.raises(OptionError, match="reading"):
        File(words[0]).sync()
    with pytest.raises(DriveError, match="folder"):
        File(os.path.dirname(words[0]), "w")
    with pytest.raises(DriveError, match="cannot open for writing"):
        File(new_path() + "/nowhere/file", "w")


def test_w_creates_or_empties_and_size_reserves(new_path, direct):
    path = new_path()
    for _ in range(2):
        file = File(path, "w", size=1_000_001, direct=direct)
        assert file.size == 1_000_001 and os.stat(path).st_blocks * 512 >= 1_000_001
        file.close()
        assert contents_of(path) == bytes(1_000_001)
    File(path, "w", direct=direct).close()
    assert contents_of(path) == b""


def test_a_new_file_that_cannot_be_had_is_removed_and_an_old_one_is_not(new_path, direct):
    path = new_path()
    for existed in (False, True):
        if existed:
            File(path, "w", direct=direct).close()
        with pytest.raises(DriveError, match="cannot reserve"):
            File(path, "w", size=1 << 60, direct=direct)
        assert os.path.exists(path) is existed


def test_a_link_found_under_the_name_is_not_removed_when_its_file_cannot_be_had(new_path, direct):
    """Nothing is there as stat has it, and yet the open finds something: as when another made it in between."""
    link, target = new_path(), new_path()
    os.symlink(target, link)
    with pytest.raises(DriveError, match="cannot reserve"):
        File(link, "w", size=1 << 60, direct=direct)
    assert os.path.islink(link)
    File(link, "w", size=5000, direct=direct).close()
    assert contents_of(target) == bytes(5000)


def test_a_file_is_written_by_one_file_object_and_one_engine_at_a_time(new_path, make_engine):
    path = new_path()
    file = File(path, "w")
    with pytest.raises(DriveError, match="being written already"):
        File(path, "w")
    slow, other = make_engine("faults", faults=[("delay", 0.3)]), make_engine("threads")
    request = write(slow, file, 0, b"x" * 100)
    with pytest.raises(OptionError, match="another engine"):
        write(other, file, 100, b"y" * 100)
    assert request.wait(DEADLINE)
    assert write(other, file, 100, b"y" * 100).wait(DEADLINE)
    file.close()
    assert contents_of(path) == b"x" * 100 + b"y" * 100
    File(path, "w").close()


def test_close_waits_for_writes_and_gives_the_file_its_size(new_path, direct, make_engine):
    engine = make_engine("faults", faults=[("delay", 0.2)] * 3)
    before = len(os.listdir("/proc/self/fd"))
    file = File(new_path(), "w", direct=direct)
    request = write(engine, file, 0, word_bytes(5001))
    file.close()
    file.close()
    assert request.done and request.wait(0)
    assert os.stat(file.path).st_size == file.size == 5001
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ClosedError):
        file.sync()


def test_a_file_never_closed_gets_its_size_all_the_same(new_path, direct):
    path = new_path()
    with contextlib.closing(Engine("threads")) as engine:
        file = File(path, "w", direct=direct)
        assert write(engine, file, 0, word_bytes(5001)).wait(DEADLINE)
        file.sync()
        del file
    assert contents_of(path) == word_bytes(5001)


def test_a_forked_child_does_not_cut_its_parents_file(new_path):
    code = """
import ctypes, os, sys
from zinfer.aio import Engine, File
engine, file = Engine("threads"), File(sys.argv[1], "w")
buffer = ctypes.create_string_buffer(b"x" * 9999)
extent = lambda length: [(file, 0, length, ctypes.addressof(buffer), False)]
assert engine.write(extent(10), buffer).wait(10)
ready, tell = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(ready, 1)
    file.close()
    sys.exit(0)
assert engine.write(extent(9999), buffer).wait(10)
before = os.stat(sys.argv[1]).st_size
os.write(tell, b"1")
assert os.waitpid(pid, 0)[1] == 0
assert os.stat(sys.argv[1]).st_size == before >= 9999
file.close()
assert os.stat(sys.argv[1]).st_size == 9999
"""
    process = run_python(code, new_path())
    try:
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, errors


@pytest.fixture
def small_drive(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "zinfer-test", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False, text=True)
    except OSError as error:
        pytest.skip(f"mount: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_drive_is_told_before_the_first_byte(small_drive, direct):
    path = small_drive / "file"
    with pytest.raises(DriveError) as caught:
        File(str(path), "w", size=3 << 20, direct=direct)
    error = caught.value
    assert (error.errno, error.path, error.length) == (errno.ENOSPC, str(path), 3 << 20)
    assert f"{1 << 20} bytes are free" in str(error) and f"free {2 << 20} more" in str(error)
    assert not path.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drive_that_fills_up_is_one_error(small_drive, direct, backend, make_engine):
    file, engine = (
        File(str(small_drive / "file"), "w", direct=direct),
        make_engine(backend, block_bytes=BLOCK),
    )
    skip_refused(backend, file)
    request = write(engine, file, 0, bytes(3 << 20))
    for _ in range(2):
        with pytest.raises(DriveError) as caught:
            request.wait(DEADLINE)
        assert caught.value.errno == errno.ENOSPC and "full" in str(caught.value)
    assert engine.stats["errors"] == 1
    file.close()
    os.unlink(file.path)
    again = File(file.path, "w", direct=direct)
    assert write(engine, again, 0, word_bytes(500_000)).wait(DEADLINE)
    again.close()
    assert contents_of(file.path) == word_bytes(500_000)
