"""libaio: direct files only, honest about refusals, and the second choice of "auto"."""

import pytest

from zinfer.aio import Engine, File
from zinfer.errors import OptionError

from .conftest import DEADLINE, Memory, needs_libaio, read, run_refused
from .seccomp import NUMBERS

pytestmark = [needs_libaio, pytest.mark.skipif(not NUMBERS, reason="seccomp numbers of this machine unknown")]


def test_a_buffered_file_is_refused_and_told_what_to_use(make_engine, words):
    engine, memory = make_engine("libaio"), Memory(100)
    with pytest.raises(OptionError, match=r'silently block.*"threads"') as caught:
        read(engine, File(words[0], direct="off"), 0, 100, memory)
    assert words[0] in str(caught.value) and 'direct="off"' in str(caught.value)
    assert engine.stats["requests"] == 0


def test_auto_takes_libaio_without_io_uring_and_still_reads_buffered_files(words):
    run_refused(
        """
refuse("io_uring_setup", errno.EPERM)
engine = Engine()
assert engine.backend == "libaio", engine.fallbacks
[(name, reason)] = engine.fallbacks
assert name == "io_uring" and ("Operation not permitted" in reason or "liburing" in reason), reason
both = File(path), File(path, direct="off")
for file in both * 3:
    assert serves(engine, file)
memory = Memory(2 << 20)
extents = [(both[i % 2], 5000 * i, 5000, memory.address + 5000 * i, False) for i in range(400)]
assert engine.read(extents, memory).wait(10)
assert memory.bytes_at(0, 400 * 5000) == contents[: 400 * 5000]
engine.check_integrity()
began = time.process_time()
time.sleep(0.5)
assert time.process_time() - began < 0.1
""",
        words,
    )


def test_auto_ends_at_threads_with_both_reasons(words):
    run_refused(
        """
refuse("io_uring_setup", errno.EPERM)
refuse("io_setup", errno.ENOSYS)
engine = Engine()
assert engine.backend == "threads"
assert [name for name, _ in engine.fallbacks] == ["io_uring", "libaio"]
assert "seccomp" in dict(engine.fallbacks)["libaio"], engine.fallbacks
assert serves(engine, File(path))
""",
        words,
    )


@pytest.mark.parametrize("call", ["io_submit", "io_getevents"])
def test_a_half_forbidden_libaio_is_found_out_by_the_trial_read(words, call):
    run_refused(
        f"""
refuse("io_uring_setup", errno.EPERM)
refuse("{call}", errno.EPERM)
engine = Engine()
assert engine.backend == "threads"
assert "{call}" in dict(engine.fallbacks)["libaio"], engine.fallbacks
""",
        words,
    )


def test_a_used_up_aio_max_nr_names_the_sysctl(words):
    run_refused(
        """
refuse("io_setup", errno.EAGAIN)
try:
    Engine("libaio")
except OptionError as error:
    assert "io_setup" in str(error) and "sysctl fs.aio-max-nr" in str(error), error
else:
    raise SystemExit("accepted")
""",
        words,
    )


def test_a_kernel_that_takes_no_more_fails_the_read_and_hurts_nothing_else(words):
    run_refused(
        """
engine, file, memory = Engine("libaio"), File(path), Memory(4096)
assert serves(engine, file)
refuse("io_submit", errno.EAGAIN)
for _ in range(2):
    try:
        read(engine, file, 0, 100, memory).wait(10)
    except DriveError as error:
        assert error.errno == errno.EAGAIN and "lower depth" in str(error), error
    else:
        raise SystemExit("read")
engine.check_integrity()
began = time.process_time()
time.sleep(0.3)
assert time.process_time() - began < 0.1
engine.close()
""",
        words,
    )


def test_many_engines_come_and_go(words):
    for depth in (1, 7, 64):
        engine = Engine("libaio", depth=depth, block_bytes=8192)
        memory = Memory(len(words[1]))
        assert read(engine, File(words[0]), 0, len(words[1]), memory).wait(DEADLINE)
        assert memory.bytes_at(0, len(words[1])) == words[1]
        engine.close()
