"""The raw libaio binding: its structures, its signed results, what it says where there is no libaio."""

import errno
import os
import time

import pytest

from zinfer.aio import libaio, portable
from zinfer.aio.libaio import Context, Transfer
from zinfer.errors import DriveError, OptionError

from .conftest import ALIGNMENT, DEADLINE, Memory, word_bytes

try:
    Context(1).destroy()
    REASON = ""
except OptionError as refusal:
    REASON = str(refusal)
needs_libaio = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def context():
    context = Context(8)
    yield context
    context.destroy()
    context.destroy()


@needs_libaio
def test_structures_have_the_kernels_layout():
    ffi, _ = libaio.load()
    offsets = {
        "data": 0,
        "key": 8,
        "aio_lio_opcode": 16,
        "aio_fildes": 20,
        "buf": 24,
        "nbytes": 32,
        "offset": 40,
    }
    for name, offset in {**offsets, "flags": 56, "resfd": 60}.items():
        assert ffi.offsetof("struct iocb", name) == offset
    assert [ffi.offsetof("struct io_event", name) for name in ("data", "obj", "res", "res2")] == [
        0,
        8,
        16,
        24,
    ]


@needs_libaio
def test_a_result_is_signed():
    ffi, _ = libaio.load()
    event = ffi.new("struct io_event *")
    ffi.buffer(event)[16:24] = (-errno.EIO).to_bytes(8, "little", signed=True)
    assert event.res == -errno.EIO


@needs_libaio
def test_bytes_written_are_read_back_each_under_its_token(context, tmp_path):
    memory, back, contents = Memory(4 * ALIGNMENT), Memory(4 * ALIGNMENT), word_bytes(4 * ALIGNMENT)
    memory.view[: len(contents)] = list(contents)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert context.submit([Transfer(7, True, fd, memory.address, len(contents), 0)]) == []
    assert context.results(1, DEADLINE) == [(7, len(contents))]
    reads = [Transfer(i, False, fd, back.address + i * ALIGNMENT, ALIGNMENT, i * ALIGNMENT) for i in range(4)]
    assert context.submit(reads) == []
    got = []
    while len(got) < 4:
        got += context.results(1, DEADLINE)
    assert sorted(got) == [(i, ALIGNMENT) for i in range(4)]
    assert back.bytes_at(0, len(contents)) == contents
    os.close(fd)


@needs_libaio
def test_a_bad_descriptor_is_refused_and_the_rest_goes_on(context, words):
    memory, fd = Memory(ALIGNMENT), os.open(words[0], os.O_RDONLY)
    bad = Transfer(1, False, 1_000_000, memory.address, ALIGNMENT, 0)
    good = Transfer(2, False, fd, memory.address, ALIGNMENT, 0)
    assert context.submit([bad, good, bad._replace(token=3)]) == [(1, -errno.EBADF), (3, -errno.EBADF)]
    assert context.results(1, DEADLINE) == [(2, ALIGNMENT)]
    os.close(fd)


@needs_libaio
def test_a_failure_of_the_transfer_itself_is_a_negative_result(context, words):
    fd = os.open(words[0], os.O_RDONLY)
    assert context.submit([Transfer(5, False, fd, 8, ALIGNMENT, 0)]) == []  # nothing is mapped there
    assert context.results(1, DEADLINE) == [(5, -errno.EFAULT)]
    os.close(fd)


@needs_libaio
def test_results_give_up_after_their_timeout(context):
    began = time.monotonic()
    assert context.results(1, 0.05) == []
    assert time.monotonic() - began >= 0.04


@needs_libaio
@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EBADF])
def test_an_error_completion_is_a_drive_error_with_its_errno(monkeypatch, words, code):
    """The kernel's answer is replaced byte for byte where the binding reads it: at `res`."""
    file, memory = portable.File(words[0]), Memory(ALIGNMENT)
    if not file.direct:
        pytest.skip(file.direct_reason)
    engine = portable.Engine("libaio")
    ffi, library = libaio.load()

    class Faulty:
        def __getattr__(self, name):
            return getattr(library, name)

        def io_getevents(self, context, least, most, events, timeout):
            count = library.io_getevents(context, least, most, events, timeout)
            for index in range(max(count, 0)):
                ffi.buffer(events + index)[16:24] = (-code).to_bytes(8, "little", signed=True)
            return count

    monkeypatch.setattr(engine._reactor._backend._context, "_library", Faulty())
    with pytest.raises(DriveError) as caught:
        engine.read([(file, 0, ALIGNMENT, memory.address, False)], memory).wait(DEADLINE)
    assert (caught.value.errno, caught.value.backend) == (code, "libaio")
    assert os.strerror(code) in str(caught.value)
    engine.close()


@needs_libaio
def test_an_unaligned_direct_read_is_refused_by_the_drive_and_seen(context, words):
    try:
        fd = os.open(words[0], os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT: {error}")
    memory = Memory(2 * ALIGNMENT)
    answers = context.submit([Transfer(1, False, fd, memory.address + 1, ALIGNMENT, 3)])
    answers = answers or context.results(1, DEADLINE)
    os.close(fd)
    if answers == [(1, ALIGNMENT)]:
        pytest.skip("this file system takes unaligned O_DIRECT reads")
    assert answers == [(1, -errno.EINVAL)]


@pytest.fixture
def no_libaio(monkeypatch):
    monkeypatch.setattr(libaio, "LIBRARIES", ("libnot-there.so.1", "libnot-there.so.1t64"))
    libaio.load.cache_clear()
    yield
    libaio.load.cache_clear()


def test_a_missing_library_is_an_option_error_that_names_the_packages(no_libaio):
    with pytest.raises(
        OptionError, match=r"libnot-there.so.1t64.*apt-get install libaio1t64.*dnf install libaio"
    ):
        Context(1)


def test_auto_reads_with_threads_where_there_is_no_libaio(no_libaio, words):
    engine, memory = portable.Engine(), Memory(len(words[1]))
    assert engine.backend == "threads"
    assert "libaio is not installed" in dict(engine.fallbacks)["libaio"]
    request = engine.read([(portable.File(words[0]), 0, len(words[1]), memory.address, False)], memory)
    assert request.wait(DEADLINE)
    assert memory.bytes_at(0, len(words[1])) == words[1]
    engine.close()
    with pytest.raises(OptionError, match=r'not installed.*"threads"'):
        portable.Engine("libaio")
