"""File: what it opens, what it refuses, what it says about itself."""

import errno
import os
import time
from pathlib import Path

import pytest

from zinfer.aio import File
from zinfer.errors import ClosedError, DriveError, OptionError

from .conftest import ALIGNMENT


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
