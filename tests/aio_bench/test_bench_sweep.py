"""Sweeps of small files, and the files themselves: made, measured, gone; or the user's, and untouched."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy
import psutil
import pytest

from zinfer.aio import File
from zinfer.aio.block_device import BlockDevice
from zinfer.aio_bench import READ, WRITE, Setting, given_targets, made_targets, make_plan, sweep
from zinfer.aio_bench import target as target_module
from zinfer.aio_bench.sweep import usable_backends
from zinfer.aio_bench.trial import Stream, run_trial
from zinfer.errors import DriveError, OptionError, StoreError
from zinfer.pinned import Pool

MIB = 1 << 20
USABLE = usable_backends()[0]


def test_a_made_file_has_no_name_and_is_gone_afterwards(tmp_path, nothing_left):
    with made_targets([str(tmp_path)], 16 * MIB) as [target]:
        assert list(tmp_path.iterdir()) == []
        assert target.size == 16 * MIB
        assert os.stat(target.path).st_size == 16 * MIB
    assert not os.path.exists(target.path)


def test_a_made_file_is_random_and_no_two_stretches_are_the_same(tmp_path):
    with made_targets([str(tmp_path)], 2 * target_module.FILL_BYTES) as [target]:
        words = numpy.fromfile(target.path, dtype=numpy.uint64)
        first, second = words.reshape(2, -1)
    assert (first != second).any()
    assert len(numpy.unique(first)) > 0.99 * len(first)


def test_a_made_file_is_gone_after_an_error_too(tmp_path, nothing_left):
    with pytest.raises(KeyboardInterrupt), made_targets([str(tmp_path)], 16 * MIB):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", [READ, WRITE])
@pytest.mark.parametrize("backend", USABLE)
def test_a_trial_counts_what_it_moves(tmp_path, direction, backend, nothing_left):
    setting = Setting(backend, MIB, 4)
    with made_targets([str(tmp_path)], 16 * MIB) as targets:
        pool = Pool(setting.in_flight, page_lock="off")
        trial = run_trial(targets, setting, direction, pool=pool, seconds=0.05, expected_rate=1e8)
        assert pool.in_use == 0
        pool.close()
    assert trial.nbytes > 0 and trial.nbytes % MIB == 0
    assert trial.seconds > 0 and trial.cpu_seconds > 0
    assert sum(trial.latencies.values()) * MIB >= trial.nbytes


def written_bytes() -> int:
    return psutil.Process().io_counters().write_bytes


@pytest.mark.parametrize(
    ("block", "depth", "most"), [(MIB, 2, 6), (MIB, 1, 3), (4 * MIB, 2, 40), (256 << 10, 32, 24)]
)
def test_a_trial_of_writes_never_writes_more_than_its_allowance(tmp_path, block, depth, most):
    setting = Setting(USABLE[0], block, depth)
    with made_targets([str(tmp_path)], 16 * MIB) as targets:
        pool = Pool(setting.in_flight, page_lock="off")
        before = written_bytes()
        trial = run_trial(
            targets, setting, WRITE, pool=pool, seconds=60.0, expected_rate=1e9, most_bytes=most * MIB
        )
        written = written_bytes() - before
        pool.close()
    assert 0 < trial.nbytes <= written or not written  # a filesystem in memory counts nothing
    assert sum(trial.latencies.values()) * block <= most * MIB
    assert written <= most * MIB + MIB  # and what the filesystem notes of it


def test_a_sweep_measures_every_setting_in_both_directions(tmp_path, nothing_left):
    heard = []
    with made_targets([str(tmp_path)], 16 * MIB) as targets:
        plan = make_plan(
            backends=USABLE, size=16 * MIB, blocks=[MIB], depths=[1, 4], threads=[2], rounds=2, seconds=0.5
        )
        measurements = sweep(targets, plan, heard.append)
    assert len(heard) == plan.trials
    assert [(item.direction, item.setting) for item in measurements] == [
        (direction, setting) for direction in (READ, WRITE) for setting in plan.settings
    ]
    assert all(0 < item.low <= item.rate <= item.high and 0 < item.p50 <= item.p99 for item in measurements)


def two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    return [str(tmp_path / name) for name in "ab"]


def test_folders_of_one_drive_share_its_queue(tmp_path, nothing_left):
    setting = Setting(USABLE[0], MIB, 2)
    with made_targets(two_folders(tmp_path), 16 * MIB) as targets:
        pool = Pool(setting.in_flight, page_lock="off")
        trial = run_trial(targets, setting, READ, pool=pool, seconds=0.1, expected_rate=1e9)
        pool.close()
    assert trial.by_drive == (trial.nbytes,)


def test_several_drives_are_measured_together_and_each_share_is_told(tmp_path, nothing_left):
    setting = Setting(USABLE[0], MIB, 2)
    with made_targets(two_folders(tmp_path), 16 * MIB) as made:
        targets = [
            replace(target, device=BlockDevice(f"drive-{i}", f"d{i}")) for i, target in enumerate(made)
        ]
        plan = make_plan(
            backends=USABLE[:1], directions=[READ], size=16 * MIB, blocks=[MIB], depths=[2], seconds=0.5
        )
        pool = Pool(2 * setting.in_flight, page_lock="off")
        trial = run_trial(targets, setting, READ, pool=pool, seconds=0.1, expected_rate=1e9)
        pool.close()
        (found, *_) = sweep(targets, plan)
    assert len(trial.by_drive) == 2 and sum(trial.by_drive) == trial.nbytes
    assert len(found.shares) == 2 and sum(found.shares) == pytest.approx(1.0)


def test_several_files_of_one_drive_are_read_one_after_the_other(tmp_path, nothing_left):
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom((number + 1) * MIB + 7))
    with given_targets(list(map(str, paths))) as targets:
        region = Pool(MIB, page_lock="off").acquire(MIB)
        stream = Stream(targets, Setting("threads", MIB, 1), READ, region, MIB, None)
        places = [(file.path, offset) for block in range(6) for file, offset, *_ in [stream._extent(block)]]
        stream.close()
    assert places == [(str(paths[n]), i * MIB) for n in range(3) for i in range(n + 1)]


def test_a_file_of_the_users_is_read_and_stays_as_it_is(tmp_path, nothing_left):
    path = tmp_path / "mine"
    content = os.urandom(8 * MIB + 5)
    path.write_bytes(content)
    before = path.stat()
    with given_targets([str(path)]) as targets:
        assert targets[0].writer is None
        plan = make_plan(
            backends=USABLE,
            directions=[READ],
            size=targets[0].size,
            blocks=[MIB],
            depths=[2],
            rounds=1,
            seconds=0.2,
        )
        assert len(sweep(targets, plan)) == len(plan.settings)
        with pytest.raises(ValueError, match="only to be read"):
            pool = Pool(MIB, page_lock="off")
            run_trial(targets, Setting(USABLE[0], MIB, 1), WRITE, pool=pool, seconds=0.1, expected_rate=1e9)
    assert path.read_bytes() == content
    assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path, nothing_left):
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(8 * MIB))
    with given_targets([str(path)]) as targets:
        os.truncate(path, MIB)
        pool = Pool(4 * MIB, page_lock="off")
        with pytest.raises(DriveError):
            run_trial(targets, Setting("threads", MIB, 4), READ, pool=pool, seconds=1.0, expected_rate=1e9)
        pool.close()


def test_the_folder_has_to_be_one_with_room(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    for path, error, text in (
        (tmp_path / "file", OptionError, "--file"),
        (tmp_path / "absent", OptionError, "no such folder"),
    ):
        with pytest.raises(error, match=text), made_targets([str(path)], 16 * MIB):
            pass
    with pytest.raises(StoreError, match="smaller --size"), made_targets([str(tmp_path)], 1 << 60):
        pass
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_an_absent_file_is_an_error_before_anything_is_measured(tmp_path):
    with pytest.raises(DriveError), given_targets([str(tmp_path / "absent")]):
        pass


def test_libaio_is_not_measured_on_a_buffered_file():
    usable, refused = usable_backends(direct=False)
    assert "libaio" not in usable
    assert "page cache" in refused["libaio"]


def test_the_reader_is_direct_where_the_file_is(tmp_path):
    with made_targets([str(tmp_path)], 16 * MIB) as [target]:
        reader = target.reader()
        named = File(str(_named(tmp_path)))
        assert reader.direct == named.direct
        reader.close()
        named.close()


def _named(folder):
    path = folder / "named"
    path.write_bytes(bytes(MIB))
    return path
