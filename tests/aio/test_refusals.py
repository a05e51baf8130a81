"""A kernel that refuses: calls forbidden, now or in mid-flight; no descriptor, thread or locked page to be had."""

import errno

import pytest

from .conftest import compiled_only, needs_io_uring, needs_libaio, run_refused
from .seccomp import NUMBERS

needs_seccomp = pytest.mark.skipif(not NUMBERS, reason="seccomp numbers of this machine unknown")
BOTH = [
    pytest.param("io_uring", "io_uring_enter", marks=needs_io_uring),
    pytest.param("libaio", "io_getevents", marks=needs_libaio),
]

LIMITS = """
import os, resource
def limit(kind, soft):
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
def descriptors():
    return set(os.listdir("/proc/self/fd"))
def be_nobody():
    "As root no limit on threads and locked pages would hold."
    if os.getuid() == 0:
        os.setresuid(61234, 61234, 61234)
"""


@needs_seccomp
@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EPERM, "kernel.io_uring_disabled"),  # also what that sysctl, set to 1 or 2, answers
        (errno.ENOSYS, "refused by the kernel"),
        (errno.ENOMEM, "ulimit -l"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
@needs_io_uring
@compiled_only
def test_without_io_uring_the_next_best_serves_and_says_why(words, code, says):
    run_refused(
        f"""
refuse("io_uring_setup", {code})
engine = Engine()
assert engine.backend in ("libaio", "threads")
assert "io_uring_setup" in dict(engine.fallbacks)["io_uring"] and {says!r} in dict(engine.fallbacks)["io_uring"]
assert serves(engine, File(path))
try:
    Engine("io_uring")
except OptionError as error:
    assert {says!r} in str(error) and 'backend="auto"' in str(error), error
else:
    raise SystemExit("accepted")
""",
        words,
    )


@needs_seccomp
@pytest.mark.parametrize("code", [errno.EPERM, errno.EBADF])
@pytest.mark.parametrize(("backend", "call"), BOTH)
def test_a_call_forbidden_later_fails_every_read_at_once_and_nothing_hangs(words, backend, call, code):
    run_refused(
        f"""
engine, file = Engine({backend!r}, block_bytes=65536, depth=8), File(path)
assert serves(engine, file)
memory = Memory(len(contents))
before = [read(engine, file, 0, len(contents), memory) for _ in range(8)]
refuse({call!r}, {code})
failed = 0
for request in before:  # some had been served, some have not
    try:
        assert request.wait(10)
    except DriveError as error:
        failed += 1
        assert (error.errno, error.backend, error.path) == ({code}, {backend!r}, path), error
began = time.monotonic()
for _ in range(20):
    request = read(engine, file, 0, len(contents), memory)
    try:
        request.wait(10)
    except DriveError as error:
        assert error.errno == {code} and "; " in str(error), error
        assert ({code} != errno.EPERM) or "seccomp" in str(error)
    else:
        raise SystemExit("read")
assert engine.stats["errors"] == failed + 20
engine.check_integrity()
assert time.monotonic() - began < 5
began = time.process_time()
time.sleep(0.3)
assert time.process_time() - began < 0.1
request = read(engine, file, 0, 100, memory)
request.cancel()
engine.close()
engine.check_integrity()
assert serves(Engine("threads"), file)
""",
        words,
    )


@needs_seccomp
@needs_io_uring
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY])
@compiled_only
def test_an_io_uring_that_takes_no_more_ends_in_an_error(words, code):
    run_refused(
        f"""
engine, file, memory = Engine("io_uring", depth=3), File(path), Memory(4096)
assert serves(engine, file)
refuse("io_uring_enter", {code})
for _ in range(2):
    try:
        read(engine, file, 0, 100, memory).wait(10)
    except DriveError as error:
        assert error.errno == errno.EAGAIN and "lower depth" in str(error), error
    else:
        raise SystemExit("read")
assert engine.stats["retries"] == 2000
engine.check_integrity()
began = time.process_time()
time.sleep(0.3)
assert time.process_time() - began < 0.1
engine.close()
""",
        words,
    )


@needs_seccomp
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize(
    ("backend", "call"), [BOTH[0], pytest.param("libaio", "io_submit", marks=needs_libaio)]
)
def test_a_call_refused_now_and_then_is_made_again(words, backend, call, code):
    run_refused(
        f"""
from itertools import cycle
from tests.aio.seccomp import answer
engine, file = Engine({backend!r}, depth=3, block_bytes=65536), File(path)
answer({call!r}, cycle([{code}, {code}, 0]))
for _ in range(3):
    assert serves(engine, file)
assert engine.stats["errors"] == 0
engine.check_integrity()
engine.close()
""",
        words,
    )


@needs_seccomp
@pytest.mark.parametrize(
    ("backend", "call"), [BOTH[0], pytest.param("libaio", "io_submit", marks=needs_libaio)]
)
def test_a_call_forbidden_for_a_while_fails_what_was_asked_for_then_and_no_more(words, backend, call):
    run_refused(
        f"""
import random
from tests.aio.seccomp import answer
engine, file = Engine({backend!r}, depth=3, block_bytes=65536), File(path)
chooser = random.Random(5)
forbidden = True
answer({call!r}, iter(lambda: errno.EPERM if forbidden and chooser.random() < 0.3 else 0, None))
failed = 0
for _ in range(100):
    try:
        assert serves(engine, file)
    except DriveError as error:
        failed += 1
        assert error.errno == errno.EPERM, error
    engine.check_integrity()
assert 10 < failed and engine.stats["errors"] == failed
forbidden = False
for _ in range(5):
    assert serves(engine, file)
engine.close()
""",
        words,
    )


@needs_seccomp
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_file_that_another_made_just_before_the_open_is_not_removed_when_it_cannot_be_had(
    words, tmp_path, direct
):
    run_refused(
        f"""
import os, stat
from tests.aio.seccomp import answer
new, armed = sys.argv[2], []
def another_makes_it():
    "When it is looked for there is nothing; before it is opened there is."
    while True:
        if armed:
            armed.clear()
            os.mknod(new, 0o600 | stat.S_IFREG)
        yield 0
answer("openat", another_makes_it())
armed.append(True)
try:
    File(new, "w", size=1 << 60, direct={direct!r})
except DriveError as error:
    assert error.backend == "fallocate", error
else:
    raise SystemExit("reserved")
assert not armed and os.path.exists(new)
""",
        words,
        str(tmp_path / "new"),
    )


@pytest.mark.parametrize("backend", ["auto", "io_uring", "libaio", "threads"])
def test_without_descriptors_an_engine_is_made_with_less_or_refused_with_the_remedy(words, backend):
    run_refused(
        LIMITS
        + """
def attempt(spare):
    before = descriptors()
    taken = [os.dup(0) for _ in range(max(map(int, before)) + 8)]  # no gaps below the limit
    for number in taken[-spare:] if spare else []:
        os.close(number)
    limit(resource.RLIMIT_NOFILE, max(taken) + 1)
    try:
        engine = Engine(sys.argv[2])
    except OptionError as error:
        assert sys.argv[2] not in ("auto", "threads") or spare < 2, (spare, error)
        if sys.argv[2] != "libaio" or "seccomp" not in str(error):
            assert "ulimit -n" in str(error) or "liburing" in str(error), (spare, error)
    else:
        assert all(reason for _, reason in engine.fallbacks)
        engine.close()
        del engine
    limit(resource.RLIMIT_NOFILE, 1024)
    for number in taken[: len(taken) - spare]:
        os.close(number)
    assert descriptors() == before, spare
for spare in range(6):
    attempt(spare)
""",
        words,
        backend,
    )


@pytest.mark.parametrize("mode", ["r", "w"])
def test_without_descriptors_a_file_is_refused_with_the_remedy(words, tmp_path, mode):
    run_refused(
        LIMITS
        + """
before, wanted = descriptors(), sys.argv[2] if sys.argv[3] == "w" else path
taken = [os.dup(0) for _ in range(max(map(int, before)) + 8)]
limit(resource.RLIMIT_NOFILE, max(taken) + 1)
try:
    File(wanted, sys.argv[3])
except DriveError as error:
    assert (error.errno, error.backend, error.path) == (errno.EMFILE, "open", wanted)
    assert "ulimit -n" in str(error), error
else:
    raise SystemExit("opened")
limit(resource.RLIMIT_NOFILE, 1024)
for number in taken:
    os.close(number)
assert descriptors() == before and not os.path.exists(sys.argv[2])
""",
        words,
        str(tmp_path / "new"),
        mode,
    )


@pytest.mark.parametrize("backend", ["auto", "io_uring", "libaio", "threads"])
def test_without_threads_an_engine_is_refused_and_control_c_still_works(words, backend):
    run_refused(
        LIMITS
        + """
import signal
file, before = File(path), descriptors()
be_nobody()
try:
    Engine(sys.argv[2]).close()  # where it does not work at all there is nothing to see
except OptionError:
    sys.exit(0)
limit(resource.RLIMIT_NPROC, 0)
for _ in range(3):
    try:
        Engine(sys.argv[2])
    except OptionError as error:
        assert "ulimit -u" in str(error), error
    else:
        raise SystemExit("made")
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
assert descriptors() == before
limit(resource.RLIMIT_NPROC, resource.getrlimit(resource.RLIMIT_NPROC)[1])
assert serves(Engine(sys.argv[2]), file)
""",
        words,
        backend,
    )


def test_without_locked_memory_an_engine_and_a_pool_work_all_the_same(words):
    run_refused(
        LIMITS
        + """
from zinfer.pinned import Pool
file = File(path)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
be_nobody()
engine, pool = Engine(), Pool(len(contents) + 4096)
assert all(reason for _, reason in engine.fallbacks)
assert pool.page_locked or pool.page_lock_reason
region = pool.acquire(len(contents))
assert engine.read([(file, 0, len(contents), region.address, False)], region).wait(10)
assert bytes(memoryview(region)[: len(contents)]) == contents
engine.close()
""",
        words,
    )
