"""Which settings are measured, what trials come to, and which setting is best: pure functions."""

from __future__ import annotations

import json

import pytest

from zinfer.aio.block_device import BlockDevice
from zinfer.aio_bench.fio import fio_command, free_huge_bytes, parse_fio
from zinfer.aio_bench.measurement import Measurement, Trial, choose, percentile
from zinfer.aio_bench.settings import MAX_IN_FLIGHT, MAX_WRITTEN, Setting, make_plan
from zinfer.aio_bench.table import columns, measured_table, size_text
from zinfer.aio_bench.target import Target
from zinfer.errors import OptionError, ZinferError

MIB = 1 << 20


def test_the_grid_is_every_combination_and_threads_have_counts_of_their_own():
    plan = make_plan(
        backends=["io_uring", "threads"], size=64 * MIB, blocks=[MIB, 4 * MIB], depths=[1, 8], threads=[2]
    )
    assert set(plan.settings) == {
        *(Setting("io_uring", block, depth) for block in (MIB, 4 * MIB) for depth in (1, 8)),
        *(Setting("threads", block, 2) for block in (MIB, 4 * MIB)),
    }
    assert plan.trials == len(plan.settings) * 2 * plan.rounds
    assert plan.seconds * plan.trials <= 50.0 + 1e-6


def test_what_is_larger_than_the_file_or_takes_too_much_memory_is_left_out():
    plan = make_plan(backends=["libaio"], size=32 * MIB, blocks=[16 * MIB, 64 * MIB], depths=[1, 64])
    assert plan.settings == (Setting("libaio", 16 * MIB, 1),)
    assert all(setting.in_flight <= MAX_IN_FLIGHT for setting in plan.settings)


def test_every_setting_is_measured_once_a_round_in_changing_order():
    plan = make_plan(backends=["io_uring"], size=64 * MIB, blocks=[MIB], depths=[1, 2], rounds=2)
    settings = list(plan.settings)
    assert [setting for direction, setting in plan.order() if direction == "read"] == [
        *settings,
        *reversed(settings),
    ]


def test_the_writes_of_a_sweep_stay_within_their_allowance_and_fill_every_queue():
    plan = make_plan(backends=["io_uring", "libaio", "threads"], size=2 << 30)
    assert sum(plan.allowances.values()) * plan.rounds <= MAX_WRITTEN
    assert all(plan.allowances[setting] >= 3 * setting.in_flight for setting in plan.settings)
    assert sum(plan.allowances.values()) * plan.rounds > 0.95 * MAX_WRITTEN


def test_more_writes_than_a_sweep_may_do_are_refused():
    with pytest.raises(OptionError, match="--read"):
        make_plan(backends=["io_uring"], size=1 << 30, blocks=[64 * MIB], depths=[1, 2, 4, 8], rounds=100)
    reads = make_plan(
        backends=["io_uring"], directions=["read"], size=1 << 30, blocks=[64 * MIB], depths=[8], rounds=100
    )
    assert not reads.allowances


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": [0]},
        {"blocks": [-4096]},
        {"blocks": [1000]},
        {"blocks": [3 * MIB]},
        {"blocks": [1 << 40]},
        {"depths": [0]},
        {"depths": [-1]},
        {"depths": [10**6]},
        {"rounds": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"blocks": [128 * MIB]},
        {"directions": []},
    ],
)
def test_a_senseless_grid_is_refused(wrong):
    with pytest.raises(OptionError):
        make_plan(**{"backends": ["io_uring"], "size": 64 * MIB, **wrong})


def measured(rate: float, backend="io_uring", block=MIB, depth=8, cpu=0.01) -> Measurement:
    return Measurement("read", Setting(backend, block, depth), rate, rate, rate, cpu, 0.001, 0.002)


def test_of_settings_as_fast_the_one_with_the_fewest_bytes_in_flight_is_best():
    small = measured(0.97e9, block=MIB, depth=4)
    assert choose([measured(1e9, block=4 * MIB), small]) is small


def test_a_setting_that_is_clearly_faster_is_best_whatever_it_takes():
    fast = measured(2e9, block=16 * MIB, depth=32)
    assert choose([measured(1e9, depth=4), fast]) is fast


def test_a_depth_of_one_is_best_only_where_there_is_nothing_else():
    deep, shallow = measured(1e9, depth=4), measured(2e9, depth=1)
    assert choose([deep, shallow]) is deep
    assert choose([shallow]) is shallow


def test_a_queue_that_is_empty_in_no_time_is_best_only_where_there_is_no_other():
    short, long = measured(4e9, depth=4), measured(3e9, block=4 * MIB, depth=4)
    assert choose([short, long]) is long
    assert choose([short, measured(3e9, depth=1)]) is short


def test_of_the_same_shape_the_one_that_takes_less_cpu_is_best_then_io_uring():
    lean = measured(1e9, backend="libaio", cpu=0.005)
    assert choose([measured(1e9), lean]) is lean
    first = measured(1e9)
    assert choose([measured(1e9, backend="libaio"), first]) is first


def test_there_is_no_best_of_nothing():
    with pytest.raises(ValueError, match="nothing was measured"):
        choose([])


def test_a_measurement_is_the_median_of_its_trials_and_the_latencies_of_all():
    trials = [Trial(10**9, seconds, 0.02, {0.001: 49, 0.01: 1}) for seconds in (1.0, 2.0, 0.5)]
    found = Measurement.of("read", Setting("io_uring", MIB, 8), trials)
    assert (found.low, found.rate, found.high) == (0.5e9, 1e9, 2e9)
    assert found.cpu_per_gb == pytest.approx(0.02)
    assert (found.p50, found.p99) == (0.001, 0.01)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 1.0), (0.51, 2.0), (0.99, 2.0), (1.0, 3.0)]
)
def test_percentiles(share, expected):
    assert percentile({2.0: 49, 1.0: 50, 3.0: 1}, share) == expected


def test_there_is_no_latency_of_nothing():
    assert percentile({}, 0.5) == 0.0


def test_the_table_marks_the_best_and_puts_the_fastest_first():
    slow, best = measured(1e9, depth=4), measured(3.21e9)
    lines = measured_table([slow, best], best).splitlines()
    assert "3.21" in lines[1] and lines[1].endswith("<- best")
    assert "1.00" in lines[2] and "best" not in lines[2]
    assert columns([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d\n"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(1, "1 B"), (4096, "4 KiB"), (MIB, "1 MiB"), (3 << 30, "3 GiB"), (4097, "4097 B")]
)
def test_sizes_in_words(nbytes, text):
    assert size_text(nbytes) == text


TARGET = Target("/mnt", "/proc/7/fd/5", 64 * MIB, BlockDevice("a", "nvme0n1"), None)


def test_fio_is_asked_for_the_same_file_block_depth_and_engine():
    command = fio_command("fio", TARGET, "read", Setting("libaio", MIB, 8), 2.0, huge=True)
    for option in (
        *("--filename=/proc/7/fd/5", "--rw=read", "--ioengine=libaio", f"--bs={MIB}", "--iodepth=8"),
        *("--direct=1", "--iomem=mmaphuge", "--runtime=2", "--readonly"),
    ):
        assert option in command


def test_fio_never_creates_a_file_and_writes_only_when_writes_are_measured():
    for direction in ("read", "write"):
        command = fio_command("fio", TARGET, direction, Setting("io_uring", MIB, 8), 2.0, huge=False)
        assert "--allow_file_create=0" in command
        assert ("--readonly" in command) == (direction == "read")


def test_threads_are_jobs_that_share_the_file():
    command = fio_command("fio", TARGET, "read", Setting("threads", MIB, 4), 2.0, huge=False)
    assert {"--numjobs=4", "--iodepth=1", "--ioengine=psync", f"--offset_increment={16 * MIB}"} <= set(
        command
    )


def test_what_fio_says_is_understood():
    said = (
        'note: something\n{"jobs": [{"read": {"io_bytes": 2000, "runtime": 500}, "usr_cpu": 10.0, '
        '"sys_cpu": 15.0, "job_runtime": 1000}]}'
    )
    assert parse_fio(said, "read") == Trial(2000, 0.5, 0.25, {})


NOTHING_MOVED = {"read": {"io_bytes": 0, "runtime": 0}, "usr_cpu": 0, "sys_cpu": 0, "job_runtime": 0}


@pytest.mark.parametrize("said", ["", "fio: no", "{}", '{"jobs": []}', json.dumps({"jobs": [NOTHING_MOVED]})])
def test_what_fio_does_not_say_is_an_error(said):
    with pytest.raises(ZinferError):
        parse_fio(said, "read")


def test_reserved_huge_pages_are_counted_where_they_are_free():
    assert (
        free_huge_bytes("HugePages_Total: 64\nHugePages_Free:       10\nHugepagesize:       2048 kB\n")
        == 20 * MIB
    )
    assert free_huge_bytes("MemTotal: 1 kB\n") == 0
