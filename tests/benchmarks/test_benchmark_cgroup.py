"""Running a command in a memory group of its own."""

import sys
from pathlib import Path

import pytest

from benchmarks import BenchmarkError, cgroup
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import drive_of

LIMIT = 200 << 20
FILL = "import time; block = bytearray({0} << 20); block[::4096] = b'x' * len(block[::4096]); time.sleep(0.3)"


@pytest.fixture
def here(tmp_path):
    """The drive, where groups can be made at all."""
    try:
        with cgroup.memory_group(LIMIT):
            pass
        return drive_of(str(tmp_path))
    except BenchmarkError as error:
        pytest.skip(str(error))


def run(here, code, limit=LIMIT):
    return cgroup.run_limited([sys.executable, "-c", code], limit, here, keep_page_cache=True)


def groups():
    return list(cgroup._hierarchy()[0].glob("zinfer-benchmark-*"))


def test_a_command_within_its_limit_runs_to_its_end(here):
    usage = run(here, FILL.format(100) + "; print('done')")
    assert (usage.exit_code, usage.oom_kills, usage.tail.strip()) == (0, 0, "done")
    assert 100 << 20 <= usage.peak_anonymous <= usage.max_usage <= LIMIT
    assert usage.seconds > 0.3


def test_a_command_over_its_limit_is_killed_and_counted(here):
    usage = run(here, FILL.format(400))
    assert usage.exit_code != 0
    assert usage.oom_kills == 1
    assert usage.max_usage <= LIMIT


def test_the_page_cache_counts_against_the_limit(here, tmp_path):
    file = tmp_path / "file"
    usage = run(here, f"open({str(file)!r}, 'wb').write(bytes(60 << 20))", limit=40 << 20)
    assert usage.max_usage <= 40 << 20


def test_processes_left_behind_are_ended_and_the_group_removed(here):
    before = groups()
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    pid = int(run(here, code).tail)
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    assert groups() == before


def test_the_group_is_removed_when_the_caller_fails(here):
    before = groups()
    with pytest.raises(RuntimeError, match="mine"), cgroup.memory_group(LIMIT):
        raise RuntimeError("mine")
    assert groups() == before


def test_a_machine_without_the_controller_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "_hierarchy", lambda: (tmp_path / "missing", False))
    with pytest.raises(BenchmarkError, match="run as root"), cgroup.memory_group(LIMIT):
        pass


def test_a_page_cache_that_may_not_be_dropped_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "DROP_CACHES", tmp_path / "missing" / "drop_caches")
    with pytest.raises(BenchmarkError, match="run as root, or keep the page cache"):
        cgroup.drop_page_cache()


def test_a_child_is_sampled_while_it_runs():
    ended = run_sampled([sys.executable, "-c", FILL.format(50)], anonymous_bytes)
    assert ended.exit_code == 0
    assert ended.peak >= 50 << 20


def test_a_child_does_not_outlive_an_error_of_its_watcher():
    pids = []

    def fail(pid):
        pids.append(pid)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run_sampled(["sleep", "60"], fail)
    assert not Path(f"/proc/{pids[0]}").exists()
