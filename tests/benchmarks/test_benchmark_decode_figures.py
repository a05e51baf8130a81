"""What decode.py makes of its runs: rates, ratios, and which rounds count. No process is started here."""

import pytest

from benchmarks import decode
from benchmarks.cgroup import Usage
from benchmarks.decode import Bench, Run, quiet_rounds, requirements, round_rows
from benchmarks.drive import Drive, Traffic
from benchmarks.worker import Outcome, Phase, Task

GB = 10**9
USAGE = Usage(0, 3 << 30, 0, 0, 0, 0, 0, 0, 1.0, "")


def span(seconds, read, foreign_read=0, foreign_cpu=0.0):
    return Phase(seconds, Traffic(read + foreign_read, 0), Traffic(read, 0), foreign_cpu)


def a_run(tool="zinfer", seconds=2.0, foreign_read=0, foreign_cpu=0.0, probe_rates=(4 * GB, 4 * GB)):
    outcome = Outcome(
        tool,
        first_token=span(3.0, 7 * GB),
        tokens_each=[span(seconds, 6 * GB)] * 3,
        decode=span(3 * seconds, 18 * GB, foreign_read, foreign_cpu),
        probes=[span(1.0, 4 * GB)] * 2,
        probe_rates=list(probe_rates),
        resident=2 * GB,
        report={"bytes_written": 0},
    )
    return Run(outcome, USAGE)


def met(runs):
    return {item.name: item for item in requirements(runs, True, 7 * GB)}


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


def test_ratios_are_taken_within_each_round():
    runs = {
        "zinfer": [a_run(seconds=1.0), a_run(seconds=2.0), a_run(seconds=3.0)],
        "accelerate": [a_run("accelerate", seconds=s) for s in (10.0, 4.0, 10.0)],
    }
    assert met(runs)["seconds a token, zinfer / accelerate"].measured == pytest.approx(0.3)
    assert "| 2 | 2.000 | 4.000 | 0.500 |" in round_rows(runs)


def test_a_figure_that_falls_short_is_not_met():
    runs = {"zinfer": [a_run(seconds=2.0)], "accelerate": [a_run("accelerate", seconds=3.0)]}
    assert not met(runs)["seconds a token, zinfer / accelerate"].met
    assert not met(runs)["share of the drive while decoding"].met
    assert met(runs)["bytes kept resident"].met


def test_only_quiet_rounds_count_where_there_are_enough():
    loud = a_run(foreign_read=9 * GB, seconds=9.0)
    enough = {"zinfer": [a_run(), a_run(), loud, a_run()], "peer": [a_run() for _ in range(4)]}
    assert loud not in quiet_rounds(enough)["zinfer"]
    assert len(quiet_rounds(enough)["peer"]) == 3
    few = {"zinfer": [loud, loud, a_run()], "peer": [a_run() for _ in range(3)]}
    assert quiet_rounds(few) == few


def test_a_disturbed_run_is_repeated_and_the_last_one_kept(monkeypatch):
    given = [a_run(foreign_cpu=9.0), a_run(foreign_cpu=8.0), a_run(foreign_cpu=7.0)]
    left = list(given)
    monkeypatch.setattr(decode, "run_one", lambda *_: left.pop(0))
    bench = Bench(1 << 30, Drive("vda", "ext4"), True, patience=0, repeats=2)
    task = Task("zinfer", "checkpoint", [1], 3, 1)
    assert bench.run(task) is given[2]
    assert bench.discarded == given[:2]


def test_an_undisturbed_run_is_kept_whatever_it_measured(monkeypatch):
    slow = a_run(seconds=99.0)
    monkeypatch.setattr(decode, "run_one", lambda *_: slow)
    bench = Bench(1 << 30, Drive("vda", "ext4"), True, patience=0, repeats=2)
    assert bench.run(Task("zinfer", "checkpoint", [1], 3, 1)) is slow
    assert bench.discarded == []
