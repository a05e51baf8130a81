"""Runs of workers: their figures, which are disturbed, and why one failed. No tool is started here."""

import os
import sys
from dataclasses import replace

import pytest

from benchmarks import bench
from benchmarks.bench import Bench, PauseHost, counting, failure
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import Drive, drive_of
from benchmarks.worker import Pauses, Task, seconds_since_start
from tests.benchmarks.runs import GB, USAGE, a_run

TASK = Task("zinfer", "checkpoint", [1], 3, 1)


def test_the_share_is_bytes_over_time_over_the_mean_of_both_probes():
    run = a_run(seconds=2.0, probe_rates=(3 * GB, 5 * GB))
    assert run.read_rate == 3 * GB
    assert run.share == pytest.approx(0.75)


def test_neighbours_on_the_drive_or_on_the_cores_disturb_a_run():
    assert not a_run(foreign_read=GB // 2, foreign_cpu=1.0).disturbed
    assert a_run(foreign_read=2 * GB).disturbed
    assert a_run(foreign_cpu=5.0).disturbed


def test_a_slow_run_is_not_disturbed_for_that():
    assert not a_run(seconds=60.0).disturbed


def test_a_disturbed_run_is_repeated_and_the_last_one_kept(monkeypatch):
    given = [a_run(foreign_cpu=9.0), a_run(foreign_cpu=8.0), a_run(foreign_cpu=7.0)]
    left = list(given)
    monkeypatch.setattr(bench, "run_one", lambda *_, **__: left.pop(0))
    runner = Bench(Drive("vda", "ext4"), True, patience=0, repeats=2)
    assert runner.run(TASK, 1 << 30) is given[2]
    assert runner.discarded == given[:2]


def test_an_undisturbed_run_is_kept_whatever_it_measured(monkeypatch):
    slow = a_run(seconds=99.0)
    monkeypatch.setattr(bench, "run_one", lambda *_, **__: slow)
    runner = Bench(Drive("vda", "ext4"), True, patience=0, repeats=2)
    assert runner.run(TASK, 1 << 30) is slow
    assert runner.discarded == []


def test_a_failure_is_told_in_one_line():
    assert failure(USAGE, None) is None
    assert failure(replace(USAGE, exit_code=-9, oom_kills=1), 60) == "killed: out of memory"
    assert failure(replace(USAGE, exit_code=-9, seconds=61.0), 60) == "stopped after 60 s"
    raised = replace(USAGE, exit_code=1, tail="Traceback\n  line\nValueError: no batch of 32\n\n")
    assert failure(raised, 60) == "ValueError: no batch of 32"
    assert failure(replace(USAGE, exit_code=3), None) == "exit code 3"


def test_a_child_that_takes_too_long_is_killed():
    ended = run_sampled(["sleep", "60"], anonymous_bytes, seconds=0.2)
    assert ended.exit_code < 0
    assert 0.2 <= ended.seconds < 30


def test_the_rows_of_a_batch_are_all_different_and_the_first_is_the_prompt():
    rows = Task("zinfer", "checkpoint", [(37 * index + 11) % 250 for index in range(16)], 3, 1, batch=32).rows
    assert rows[0] == [(37 * index + 11) % 250 for index in range(16)]
    assert len({tuple(row) for row in rows}) == 32
    assert {len(row) for row in rows} == {16}


def test_the_drive_is_measured_only_when_the_worker_asks(monkeypatch, tmp_path):
    measured = []

    class Rate:
        bytes_per_second = 3.0

    monkeypatch.setattr(bench, "weight_files", lambda _: ["file"])
    monkeypatch.setattr(bench, "measure_read_rate", lambda *asked: measured.append(asked) or Rate)
    out = str(tmp_path / "outcome.json")
    try:
        host = PauseHost(TASK, out, drive_of(str(tmp_path)))
    except bench.BenchmarkError as error:
        pytest.skip(str(error))
    host.look()
    assert measured == []
    Pauses.asked(out, 0).touch()
    host.look()
    assert Pauses.answered(out, 0).exists()
    host.look()
    assert measured == [(["file"], 1.0)]
    assert host.rates == [3.0]
    assert host.memory_rates == []


def test_the_account_of_a_run_is_the_sum_of_its_parts():
    names = ["planned_resident_bytes", "window_bytes", "small_bytes", "bounce_bytes", "conversion_bytes"]
    names += ["cache_bytes"]
    run = a_run()
    run.outcome.report = {name: 10**number for number, name in enumerate(names)} | {"resident_bytes": 5}
    assert run.account == 111111


def test_undisturbed_rounds_count_unless_they_are_too_few():
    assert counting([1, 2, 3, 4], lambda each: each == 2) == [1, 3, 4]
    assert counting([1, 2, 3, 4], lambda each: each <= 2) == [1, 2, 3, 4]


def test_a_worker_whose_parent_has_gone_does_not_wait_for_it(tmp_path):
    pauses = Pauses(str(tmp_path / "outcome.json"))
    pauses._parent = os.getppid() + 1
    with pytest.raises(bench.BenchmarkError, match="has ended"):
        pauses.take()


def test_the_time_since_the_process_started_is_that_of_the_process():
    code = "import time; time.sleep(0.3); from benchmarks.worker import *; print(seconds_since_start())"
    ended = run_sampled([sys.executable, "-c", code], anonymous_bytes)
    assert 0.3 <= float(ended.tail) <= ended.seconds + 0.02
    assert seconds_since_start() > 0
