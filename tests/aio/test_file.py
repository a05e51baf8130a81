"""File: what it opens, what it refuses, what it says about itself."""

import errno
import os
import time
from pathlib import Path

import pytest

from zinfer.aio import Engine, File
from zinfer.errors import ClosedError, DriveError, OptionError

from .conftest import ALIGNMENT, DEADLINE, Memory, read, word_bytes


def test_a_file_tells_its_facts(words):
    path, contents = words
    file = File(path)
    facts = os.stat(path)
    assert (file.path, file.size) == (path, len(contents))
    assert file.identity == (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    assert file.alignment >= ALIGNMENT if file.direct else file.alignment == 1
    assert bool(file.direct_reason) is not file.direct


def test_buffered_files_have_no_alignment_and_say_why(words):
    file = File(words[0], direct="off")
    assert (file.direct, file.alignment, file.direct_reason) == (False, 1, 'direct="off"')


def test_auto_falls_back_where_o_direct_is_refused():
    file = File("/proc/self/status")
    assert not file.direct
    assert file.direct_reason.startswith("O_DIRECT ")
    with pytest.raises(DriveError, match="O_DIRECT"):
        File("/proc/self/status", direct="on")


def test_an_unknown_mode_is_refused(words):
    with pytest.raises(OptionError, match="maybe"):
        File(words[0], direct="maybe")


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_a_path_with_a_nul_is_refused_and_what_it_begins_with_keeps_its_bytes(tmp_path, kind):
    path = tmp_path / "precious"
    path.write_bytes(b"x" * 100)
    for mode in ("r", "w"):
        with pytest.raises(OptionError, match=r"path.*NUL.*precious\\x00\.new"):
            File(kind(f"{path}\0.new"), mode)
    assert path.read_bytes() == b"x" * 100


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_a_path_may_be_a_str_bytes_or_a_path_object(words, kind):
    file = File(kind(words[0]))
    assert (file.path, file.size) == (words[0], len(words[1]))


def test_what_is_no_path_is_a_type_error():
    for wrong in (3, None, 1.5):
        with pytest.raises(TypeError, match=r"str, bytes or os\.PathLike"):
            File(wrong)


@pytest.fixture
def latin_path(tmp_path):
    """A name that is not UTF-8, as a checkpoint unpacked from an old archive may have."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le")
    try:
        Path(path).write_bytes(word_bytes(10000))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return path


def test_a_name_that_is_not_utf8_is_read_and_written(latin_path):
    memory = Memory(10000)
    engine, file = Engine("threads"), File(latin_path)
    assert file.path == latin_path
    assert read(engine, file, 0, 10000, memory).wait(DEADLINE)
    assert memory.bytes_at(0, 10000) == word_bytes(10000)
    written = File(latin_path + "2", "w")
    assert engine.write([(written, 0, 10000, memory.address, False)], memory).wait(DEADLINE)
    written.close()
    assert Path(latin_path + "2").read_bytes() == word_bytes(10000)


def test_errors_name_a_file_whose_name_is_not_utf8(latin_path):
    missing = latin_path + "-missing"
    with pytest.raises(DriveError) as caught:
        File(missing)
    assert caught.value.path == missing and missing in str(caught.value)
    engine, file, memory = Engine("faults", faults=[("error", errno.EIO)]), File(latin_path), Memory(100)
    with pytest.raises(DriveError) as caught:
        read(engine, file, 0, 100, memory).wait(DEADLINE)
    assert caught.value.path == latin_path and latin_path in str(caught.value)
    with pytest.raises(OptionError) as refused:
        file.sync()
    assert latin_path in str(refused.value)
    with pytest.raises(ValueError, match="negative") as bad:
        read(engine, file, -1, 100, memory)
    assert latin_path in str(bad.value)
    file.close()
    with pytest.raises(ClosedError) as closed:
        file.changed()
    assert latin_path in str(closed.value)


@pytest.mark.parametrize("direct", ["auto", "on", "off"])
def test_a_missing_file_is_a_drive_error(tmp_path, direct):
    path = str(tmp_path / "nothing")
    with pytest.raises(DriveError, match="nothing") as caught:
        File(path, direct=direct)
    error = caught.value
    assert (error.path, error.offset, error.length) == (path, 0, 0)
    assert (error.errno, error.backend) == (errno.ENOENT, "open")


def test_folders_fifos_and_devices_are_refused_at_once(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    for path, what in [(fifo, "FIFO"), (str(tmp_path), "folder"), ("/dev/null", "device")]:
        with pytest.raises(DriveError, match=what):
            File(path)


def test_a_refused_file_leaves_no_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(DriveError):
            File(str(tmp_path))
        with pytest.raises(DriveError):
            File("/proc/self/status", direct="on")
    assert len(os.listdir("/proc/self/fd")) == before


def test_changed_sees_a_write_and_a_truncation(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10000)
    file = File(str(path))
    assert not file.changed()
    os.truncate(path, 5000)
    assert file.changed()
    assert file.size == 10000


def test_changed_sees_a_write_whose_mtime_was_set_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10000)
    status, file = path.stat(), File(str(path))
    time.sleep(0.02)  # more than a tick of the kernel's clock
    path.write_bytes(b"y" * 10000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.changed()


def test_a_file_that_lost_its_name_has_not_changed(tmp_path):
    for act in (lambda path: path.unlink(), lambda path: (tmp_path / "other").replace(path)):
        (tmp_path / "other").write_bytes(b"other")
        path = tmp_path / "file"
        path.write_bytes(b"x" * 10000)
        file = File(str(path))
        time.sleep(0.02)
        act(path)
        assert not file.changed()


def test_close_closes_the_descriptor_and_is_idempotent(words):
    before = len(os.listdir("/proc/self/fd"))
    file = File(words[0])
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert file.size == len(words[1])
    with pytest.raises(ClosedError, match="closed"):
        file.changed()


def test_descriptors_are_not_inherited(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)

    def ours():
        links = Path("/proc/self/fd")
        return [int(link.name) for link in links.iterdir() if os.path.realpath(link) == str(path)]

    file = File(str(path))
    assert [os.get_inheritable(number) for number in ours()] == [False]
    file.close()
    assert ours() == []
