"""Every fault a drive can show, scripted: retried where that helps, otherwise an error that says enough."""

import errno
import os
import time

import pytest

from zinfer.aio import Engine, File
from zinfer.errors import DriveError

from .conftest import ALIGNMENT, DEADLINE, REAL, Memory, read, skip_refused

BLOCK = 64 << 10


@pytest.fixture(params=["auto", "off"])
def file(request, words):
    return File(words[0], direct=request.param)


def run(make_engine, file, script, *, offset=0, length=4 * BLOCK, start=0, depth=4):
    engine = make_engine("faults", faults=script, block_bytes=BLOCK, depth=depth)
    memory = Memory(length + 2 * ALIGNMENT)
    request = read(engine, file, offset, length, memory, start=start)
    return engine, memory, request


@pytest.mark.parametrize("start", [0, 17])
@pytest.mark.parametrize(
    "script",
    [
        [("short", 4096)],
        [("short", 1)],
        [("short", 5000), ("short", 5000), ("short", 8192)],
        [("short", 10000)] * 3 + [("ok",), ("short", 8192)],
        [("error", errno.EINTR)] * 5,
        [("error", errno.EAGAIN)] * 20,
        [("hold", 3)],
        [("hold", 2), ("hold", 2), ("delay", 0.05), ("ok",)],
        [("delay", 0.05), ("delay", 0.02), ("delay", 0.01)],
        [("hold", 1000)] * 8,
    ],
    ids=str,
)
def test_what_can_be_repaired_is_repaired(make_engine, file, words, script, start):
    engine, memory, request = run(make_engine, file, script, offset=8192, start=start)
    assert request.wait(DEADLINE)
    assert memory.bytes_at(start, 4 * BLOCK) == words[1][8192 : 8192 + 4 * BLOCK]
    assert memory.untouched(0, start) and memory.untouched(start + 4 * BLOCK, len(memory.view))
    repeats = sum(line[0] in ("short", "error") for line in script)
    assert engine.stats["retries"] == repeats
    assert engine.stats["errors"] == 0


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.ENOMEM, errno.ENODEV])
def test_an_error_names_path_offset_length_cause_backend_and_remedy(make_engine, file, code):
    engine, _, request = run(make_engine, file, [("ok",), ("error", code)])
    for _ in range(2):
        with pytest.raises(DriveError) as caught:
            request.wait(DEADLINE)
    error = caught.value
    assert (error.path, error.offset, error.length) == (file.path, BLOCK, BLOCK)
    assert (error.errno, error.backend) == (code, "faults")
    for part in [file.path, f"{BLOCK} bytes at offset {BLOCK}", os.strerror(code), "faults", "; "]:
        assert part in str(error)
    if code == errno.EINVAL and file.direct:
        assert 'direct="off"' in str(error)
    assert request.done and engine.stats["errors"] == 1


def test_the_first_error_wins_and_the_rest_is_dropped(make_engine, file):
    script = [("delay", 0.1), ("error", errno.EIO), ("error", errno.ENODEV)]
    engine, _, request = run(make_engine, file, script, length=40 * BLOCK, depth=3)
    with pytest.raises(DriveError) as caught:
        request.wait(DEADLINE)
    assert caught.value.errno == errno.EIO
    assert engine.stats["pieces"] == 3


def test_an_error_leaves_other_requests_alone(make_engine, file, words):
    engine = make_engine("faults", faults=[("error", errno.EIO)], block_bytes=BLOCK)
    bad, good = Memory(BLOCK), Memory(BLOCK)
    failed, fine = read(engine, file, 0, BLOCK, bad), read(engine, file, BLOCK, BLOCK, good)
    assert fine.wait(DEADLINE)
    assert good.bytes_at(0, BLOCK) == words[1][BLOCK : 2 * BLOCK]
    with pytest.raises(DriveError):
        failed.wait(DEADLINE)


def test_a_zero_read_is_a_file_that_ended_early(make_engine, file):
    _, _, request = run(make_engine, file, [("short", 8192), ("zero",)], length=BLOCK)
    with pytest.raises(DriveError, match="file ended early at 8192") as caught:
        request.wait(DEADLINE)
    assert caught.value.errno == 0


def test_short_reads_without_end_are_a_file_that_ended_early(make_engine, words):
    _, _, request = run(make_engine, File(words[0], direct="on"), [("short", 100)] * 50, length=BLOCK)
    with pytest.raises(DriveError, match="file ended early at 100"):
        request.wait(DEADLINE)


def test_an_eagain_storm_ends_in_an_error(make_engine, file):
    engine, _, request = run(make_engine, file, [("error", errno.EAGAIN)] * 1100, length=BLOCK)
    with pytest.raises(DriveError) as caught:
        request.wait(DEADLINE)
    assert caught.value.errno == errno.EAGAIN
    assert engine.stats["retries"] == 1000


@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("left", [0, 4096, 10000])
def test_a_file_truncated_while_open_is_an_error(tmp_path, make_engine, backend, direct, left):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 300_000)
    file, memory = File(str(path), direct=direct), Memory(300_000)
    skip_refused(backend, file)
    os.truncate(path, left)
    with pytest.raises(DriveError, match=f"file ended early at {left}") as caught:
        read(make_engine(backend), file, 0, 300_000, memory).wait(DEADLINE)
    assert (caught.value.errno, caught.value.backend) == (0, backend)


def test_urgent_requests_go_before_queued_ones(make_engine, file):
    script = [("delay", 0.2)] + [("delay", 0.02)] * 20
    engine = make_engine("faults", faults=script, block_bytes=BLOCK, depth=1)
    memory = Memory(20 * BLOCK)
    slow = read(engine, file, 0, BLOCK, memory)
    deadline = time.monotonic() + DEADLINE
    while engine.stats["pieces"] == 0:  # not a fixed nap: a busy machine may start it late
        assert time.monotonic() < deadline
        time.sleep(0.005)
    late = read(engine, file, 0, 10 * BLOCK, memory, start=BLOCK)
    urgent = engine.read([(file, 0, 100, memory.address + 12 * BLOCK, False)], memory, urgent=True)
    assert urgent.wait(DEADLINE) and slow.done and not late.done
    assert late.wait(DEADLINE)


def test_requests_of_one_queue_go_first_in_first_out(make_engine, file):
    engine = make_engine("faults", faults=[("delay", 0.01)] * 40, block_bytes=BLOCK, depth=1)
    memory = Memory(10 * BLOCK)
    requests = [read(engine, file, 0, 100, memory, start=BLOCK * i) for i in range(8)]
    for i, request in enumerate(requests):
        assert request.wait(DEADLINE)
        assert all(earlier.done for earlier in requests[:i])


def test_wait_gives_up_after_its_timeout(make_engine, file):
    _, _, request = run(make_engine, file, [("delay", 0.5)], length=100)
    began = time.monotonic()
    assert request.wait(0) is False
    assert request.wait(-1) is False
    assert request.wait(0.1) is False
    assert 0.1 <= time.monotonic() - began < 0.4
    assert not request.done
    assert request.wait(DEADLINE) is True
    assert request.seconds >= 0.5


def test_an_engine_waits_for_the_drive_without_using_the_processor(make_engine, file):
    engine = Engine("auto")
    began = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - began < 0.1
    engine.close()
