"""Files on several block devices: an engine for each, reads routed to it, failures as if there were one."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest

import zinfer.aio.drives
from tests.aio.conftest import Memory, word_bytes
from zinfer.aio import Engine
from zinfer.aio._native import Request
from zinfer.aio.block_device import BlockDevice, block_device_of
from zinfer.aio.drives import Drives
from zinfer.aio.joint import JointRequest
from zinfer.aio.profile import Profile, save_profile
from zinfer.errors import BudgetError, ClosedError, DriveError, OptionError

pytestmark = pytest.mark.usefixtures("nothing_left")
SIZE = 200_000
BOUNCE = 1 << 20


@pytest.fixture
def other(tmp_path):
    """A folder on another device than `tmp_path`'s."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def words(folder, name="words", size=SIZE):
    (folder / name).write_bytes(word_bytes(size))
    return str(folder / name)


@pytest.fixture
def two(tmp_path, other):
    """The drives of two files on two devices, and their paths."""
    paths = [words(tmp_path), words(other)]
    drives = Drives(paths, BOUNCE)
    yield drives, paths
    drives.check_integrity()
    drives.close()


def extents(drives, paths, memory, length=10_000):
    return [
        (drives.files[path], 100 + 5 * number, length, memory.address + number * length, False)
        for number, path in enumerate(paths)
    ]


def test_files_of_one_device_share_an_engine_whose_own_request_comes_back(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = [words(tmp_path), words(tmp_path / "sub")]
    drives, memory = Drives(paths, BOUNCE), Memory(20_000)
    assert len(drives.settings) == 1
    request = drives.read(extents(drives, paths, memory), memory)
    assert isinstance(request, Request)
    assert request.wait()
    assert memory.bytes_at(10_000, 10_000) == word_bytes(SIZE)[105:10_105]
    drives.close()


def test_files_of_two_devices_are_read_by_two_engines_into_one_request(two):
    drives, paths = two
    memory = Memory(40_000)
    request = drives.read(extents(drives, [*paths, *paths], memory), memory, urgent=True)
    assert isinstance(request, JointRequest)
    assert request.nbytes == 40_000 and request.wait(20.0) and request.done
    for number in range(4):
        start = 100 + 5 * number
        assert memory.bytes_at(number * 10_000, 10_000) == word_bytes(SIZE)[start : start + 10_000]
    each = [engine.stats for _, engine in drives._engines]
    assert [figures["bytes_requested"] for figures in each] == [20_000, 20_000]
    assert drives.stats["bytes_requested"] == 40_000
    assert drives.stats.keys() == each[0].keys()


def test_reading_nothing_is_done_at_once(two):
    drives, _ = two
    assert drives.read([]).wait(0)
    nothing = Drives([], BOUNCE)
    assert nothing.read([]).done and nothing.stats["requests"] == 0 and nothing.backend == ""
    nothing.close()


@pytest.mark.parametrize("bounce", [64 << 10, 1 << 20, 8 << 20])
def test_bounce_memory_is_divided_and_never_exceeded(bounce, tmp_path, other):
    drives = Drives([words(tmp_path), words(other)], bounce)
    assert 0 < drives.bounce_bytes <= bounce
    drives.close()


def test_an_error_on_one_device_names_its_file_and_leaves_nothing_in_flight(two):
    drives, paths = two
    os.truncate(paths[1], 50)
    memory = Memory(20_000)
    request = drives.read(extents(drives, paths, memory), memory)
    for _ in range(2):
        with pytest.raises(DriveError) as caught:
            request.wait()
        assert (caught.value.path, caught.value.errno) == (paths[1], 0)
    assert request.done
    drives.check_integrity()


def test_a_part_that_is_refused_takes_back_those_that_began(two):
    drives, paths = two
    memory = Memory(20_000)
    wrong = extents(drives, paths, memory)
    wrong[1] = (wrong[1][0], SIZE, 1, memory.address, False)
    with pytest.raises(DriveError, match="words") as caught:
        drives.read(wrong, memory)
    assert caught.value.path == paths[1]
    drives.check_integrity()


def test_a_missing_file_closes_those_that_were_opened(tmp_path):
    with pytest.raises(DriveError, match="absent"):
        Drives([words(tmp_path), str(tmp_path / "absent")], BOUNCE)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EMFILE, "raise `ulimit -n`"), (errno.ENFILE, "fs.file-max"), (errno.EACCES, "Permission denied")],
)
def test_a_file_whose_drive_cannot_be_told_is_named(code, remedy, tmp_path, monkeypatch):
    def failing(path):
        raise OSError(code, os.strerror(code), "/proc/self/mountinfo")

    monkeypatch.setattr(zinfer.aio.drives, "block_device_of", failing)
    with pytest.raises(DriveError, match=f"which drive it lies on: .*{remedy}") as caught:
        Drives([path := words(tmp_path)], BOUNCE)
    assert (caught.value.path, caught.value.errno, caught.value.backend) == (path, code, "open")


def test_running_out_of_descriptors_at_any_moment_is_a_drive_error_with_a_remedy(tmp_path):
    path, taken = words(tmp_path), []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Drives([path], BOUNCE).close()  # everything is imported by now
    try:
        for spare in range(4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            try:
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                for _ in range(min(spare, len(taken))):
                    os.close(taken.pop())
            try:
                Drives([path], BOUNCE).close()
            except (DriveError, OptionError) as error:
                assert "ulimit -n" in str(error), (spare, error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def test_a_budget_for_too_few_buffers_is_refused(tmp_path, other):
    with pytest.raises(BudgetError, match="2 drives at once"):
        Drives([words(tmp_path), words(other)], 8192)


def test_after_close_reads_are_refused_and_closing_again_is_harmless(two):
    drives, paths = two
    memory = Memory(20_000)
    drives.close()
    drives.close()
    with pytest.raises(ClosedError):
        drives.read(extents(drives, paths, memory), memory)


def test_closing_goes_on_when_one_engine_fails(tmp_path, other, monkeypatch):
    closed = []

    class Stubborn:
        def __init__(self, *args, **options):
            self._engine = Engine(*args, **options)

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def close(self):
            self._engine.close()
            closed.append(self)
            if len(closed) == 1:
                raise RuntimeError("first")

    monkeypatch.setattr(zinfer.aio.drives, "Engine", Stubborn)
    drives = Drives([words(tmp_path), words(other)], BOUNCE)
    with pytest.raises(RuntimeError, match="first"):
        drives.close()
    assert len(closed) == 2
    for file in drives.files.values():
        with pytest.raises(ClosedError):
            file.changed()


# Settings


def profile(**changes):
    fields = {"backend": "threads", "block_bytes": 1 << 20, "depth": 32, "workers": 2} | changes
    return Profile(**fields, read_rate=None, write_rate=None, measured="2026-11-20T21:00:00")


def test_a_profile_is_used_on_its_drive_alone_and_shown(tmp_path, other, caplog):
    caplog.set_level("INFO", "zinfer")
    paths = [words(tmp_path), words(other)]
    save_profile(block_device_of(paths[0]), profile())
    drives = Drives(paths, BOUNCE)
    direct = drives.files[paths[0]].direct
    drives.close()
    first, second = map(str, drives.settings)
    name = block_device_of(paths[0]).name
    if direct:
        assert first == f"{name}: threads, depth 32, blocks of 1 MiB (measured by aio_bench)"
        assert drives.settings[0].measured
    assert "measured" not in second and "depth 8, blocks of 4 MiB" in second
    assert f"reading {first}" in caplog.text and f"reading {second}" in caplog.text


def test_a_profile_is_not_used_where_a_file_is_buffered(tmp_path, monkeypatch):
    path = words(tmp_path)
    save_profile(block_device_of(path), profile())
    file = zinfer.aio.drives.File
    monkeypatch.setattr(zinfer.aio.drives, "File", lambda path: file(path, direct="off"))
    drives = Drives([path], BOUNCE)
    assert not drives.settings[0].measured and drives.settings[0].settings.depth == 8
    drives.close()


def test_a_profile_that_no_engine_takes_any_more_is_left_with_a_warning(tmp_path, monkeypatch, caplog):
    path = words(tmp_path)
    save_profile(block_device_of(path), profile(backend="libaio"))

    def engine(backend, **options):
        if backend == "libaio":
            raise OptionError("libaio: no contexts left")
        return Engine(backend, **options)

    monkeypatch.setattr(zinfer.aio.drives, "Engine", engine)
    drives = Drives([path], BOUNCE)
    if not drives.files[path].direct:
        pytest.skip("no O_DIRECT here, so no profile is used")
    (used,) = drives.settings
    assert (used.measured, used.settings.depth, used.settings.block_bytes) == (False, 32, 4 << 20)
    assert caplog.text.count("Run aio_bench again") == 1
    drives.close()


def test_fallbacks_come_once_and_name_the_drives_that_differ(tmp_path, other, monkeypatch):
    class Falling:
        made = 0

        def __init__(self, *args, **options):
            self._engine = Engine(*args, **options)
            Falling.made += 1
            self.backend = "threads" if Falling.made == 2 else "io_uring"
            self.fallbacks = [("common", "reason")] + [("io_uring", "EPERM")] * (Falling.made == 2)

        def __getattr__(self, name):
            return getattr(self._engine, name)

    monkeypatch.setattr(zinfer.aio.drives, "Engine", Falling)
    paths = [words(tmp_path), words(other)]
    drives = Drives(paths, BOUNCE)
    assert drives.backend == "io_uring + threads"
    device = block_device_of(paths[1]).name
    assert drives.fallbacks == [("common", "reason"), ("io_uring", f"EPERM (on {device})")]
    drives.close()


def test_two_drives_without_serial_numbers_are_two(tmp_path, other, monkeypatch):
    """They share what a profile is filed under, and nothing else."""
    names = iter(["sda", "sdb"])
    monkeypatch.setattr(zinfer.aio.drives, "block_device_of", lambda _: BlockDevice("same", next(names)))
    drives = Drives([words(tmp_path), words(other)], BOUNCE)
    assert [setting.device for setting in drives.settings] == ["sda", "sdb"]
    drives.close()


def test_a_scripted_error_of_one_engine_cancels_the_other(tmp_path, other, monkeypatch):
    scripts = iter([[("delay", 0.3)] * 50, [("error", errno.EIO)]])
    monkeypatch.setattr(
        zinfer.aio.drives, "Engine", lambda _, **options: Engine("faults", faults=next(scripts), **options)
    )
    paths = [words(tmp_path), words(other)]
    drives, memory = Drives(paths, BOUNCE), Memory(400_000)
    request = drives.read(extents(drives, paths, memory, 150_000), memory)
    with pytest.raises(DriveError, match="Input/output error") as caught:
        request.wait(20.0)
    assert caught.value.path == paths[1]
    drives.check_integrity()
    drives.close()
