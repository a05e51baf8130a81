"""benchmarks.gpu, on the staged device from its command line to its results file; and its pure parts."""

import json
import os
import re
import stat
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import BenchmarkError, gpu, gpu_part, gpu_process, gpu_runs, gpu_stress, gpu_tests
from benchmarks.gpu_card import CudaCard, StagedCard, Watch, listed_bytes, nvml_counter, visible_device
from benchmarks.gpu_figures import (
    LATE,
    Bound,
    Decode,
    Findings,
    Memory,
    Outcome,
    Prefill,
    Round,
    Stress,
    copying,
    decode_table,
    prefill_table,
    remarks,
    requirements,
    table_of_tests,
)
from benchmarks.gpu_part import Part
from benchmarks.gpu_process import PartProcess, State, ends, started
from benchmarks.gpu_runs import Shape, fitting_layers, prefill
from benchmarks.gpu_tests import GpuTests
from tests import conftest
from tests.planner.machines import measure_quickly
from zinfer.timeline.events import COPIES, SWEEPS, Span, Timeline

GB = 10**9
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def a_round(seconds=2.0, copied=100 * GB, busy=1.98, read=0, yardstick=(52 * GB, 48 * GB)):
    return Round(2, seconds, copied, busy, read, yardstick)


def findings(**changes):
    usual = {
        "budget": 10 * GB,
        "sweeps_wanted": 1000,
        "model_bytes": 40 * GB,
        "peak_flops": 8e14,
        "plans": {1: Bound(1.0, "pcie"), 64: Bound(1.0, "pcie")},
        "plain": {1: Bound(0.9, "drive")},
        "from_host": [Decode(1, [a_round()]), Decode(64, [a_round(2.2)])],
        "from_drive": [a_round(read=6 * GB, yardstick=(3 * GB, 3 * GB))],
        "prefills": [
            Prefill(1, 512, 1e13, [1.0]),
            Prefill(64, 512, 1e15, [2.0, 1.9, 2.5]),
            Prefill(128, 512, 2e15, failed="OutOfMemoryError: no"),
        ],
        "memory": Memory(10 * GB, 9 * GB),
        "stress": Stress(1000, 0),
        "tests": [],
    }
    return Findings(**(usual | changes))


def required(**changes):
    return {item.name: item for item in requirements(findings(**changes))}


class Inside:
    """A part in this very process: it takes no seconds to start, and measures in little time."""

    def __init__(self, path, name, end):
        Part(path, end).run(name)

    def wait(self):
        return ""


@pytest.fixture
def quick(monkeypatch):
    """What zinfer, and the benchmark, measure of this machine takes next to no time."""
    measure_quickly(monkeypatch)
    monkeypatch.setattr(gpu_runs, "MEMORY", 8 << 20)
    monkeypatch.setattr(gpu_runs, "ROWS", (1, 16, 64))
    monkeypatch.setattr(gpu_runs, "PEAK_ROWS", 256)
    monkeypatch.setattr(gpu_runs, "QUIET", 0.03)


def test_the_whole_runs_on_the_staged_device(tmp_path, capsys, monkeypatch, quick):
    out = tmp_path / "gpu.json"
    folder = tmp_path / "models"
    monkeypatch.setattr(gpu, "PartProcess", Inside)
    gpu.main(["--staged", "--folder", str(folder), "--without-tests", "--json", str(out)])
    result = json.loads(out.read_text())
    met = {item["name"]: item["met"] for item in result["requirements"]}
    assert result["figures"]["failed"] == []
    assert met["model's bytes / device budget"]
    assert met["peak device memory by the driver / budget"]
    assert met["stress: sweeps with recycled memory poisoned"]
    assert met["stress: sweeps with other logits"]
    assert len(met) == 11
    assert not any(item["measured"] is None for item in result["requirements"])
    for plans in (result["figures"]["plans"], result["figures"]["plain"]):
        assert set(plans) == {"1", "2"} and all(each["seconds"] > 0 for each in plans.values())
    assert [part["batch"] for part in result["rounds"]] == [1, 2, 1]
    for part in result["rounds"]:
        assert all(each["copied"] > 0 and 0 < each["busy"] <= each["seconds"] for each in part["rounds"])
    host, _, drive = result["rounds"]
    assert all(each["read"] == 0 for each in host["rounds"])
    assert all(each["read"] > 0 for each in drive["rounds"])
    assert [len(each["seconds"]) for each in result["figures"]["prefills"]] == [gpu_part.PASSES] * 2
    assert result["hardware"]["card"].startswith("staged")
    assert "| required | measured |" in capsys.readouterr().out
    assert os.listdir(folder) == []


def test_a_part_that_takes_too_long_is_ended_and_the_results_are_written(tmp_path, capfd):
    """In real processes: none of them is done importing torch when its time is over."""
    out, folder = tmp_path / "gpu.json", tmp_path / "models"
    begun = time.monotonic()
    arguments = ["--staged", "--folder", str(folder), "--without-tests", "--json", str(out)]
    assert gpu.main([*arguments, "--minutes", "0.01"]) == 1
    assert time.monotonic() - begun < 5
    result = json.loads(out.read_text())
    failed = result["figures"]["failed"]
    assert re.match(r"model: ended after \d s, its share of the time", failed[0])
    assert [line.partition(":")[0] for line in failed] == list(gpu.RESERVED)
    assert "| NVMe -> GPU: bytes a second / the drive | not measured |" in capfd.readouterr().out
    assert os.listdir(folder) == []


@without_gpu
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no GPU.*--staged"):
        gpu.main(["--folder", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()


def test_copies_count_from_the_start_of_one_sweep_to_the_start_of_another():
    sweeps = [Span(SWEEPS, str(number), number, number + 0.1) for number in range(4)]
    copies = [
        Span(COPIES, "a", 0.5, 1.5, nbytes=8),  # half of it is before
        Span(COPIES, "b", 1.4, 1.9, nbytes=10),
        Span(COPIES, "c", 2.5, 3.5, nbytes=6),  # and of this one after
    ]
    found = copying(Timeline("m", (*sweeps, *copies)), 2)
    assert found.seconds == pytest.approx(2.0)
    assert found.nbytes == pytest.approx(4 + 10 + 3)
    assert found.busy == pytest.approx(0.9 + 0.5)
    with pytest.raises(BenchmarkError, match="4 sweeps"):
        copying(Timeline("m", (*sweeps, *copies)), 4)


def test_a_round_is_held_against_the_yardstick_around_it():
    each = a_round(seconds=2.0, copied=95 * GB, busy=1.9, read=10 * GB)
    assert each.seconds_a_token == 1.0
    assert each.copy_share == pytest.approx(0.95)
    assert each.read_share == pytest.approx(0.1)
    assert each.idle == pytest.approx(0.05)


def test_every_requirement_has_its_figure():
    found = required()
    assert {name for name, item in found.items() if not item.met} == {
        "decode, batch 64: s a token / planner's"
    }
    assert found["decode, batch 64: s a token / planner's"].measured == pytest.approx(1.1)
    assert found["prefill, batch 64: flop a second / matmul peak"].measured == pytest.approx(1e15 / 2 / 8e14)
    assert found["NVMe -> GPU: bytes a second / the drive"].measured == pytest.approx(1.0)
    assert found["host -> GPU: share of a sweep without a copy"].measured == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"model_bytes": 29 * GB}, "model's bytes / device budget"),
        ({"failed": ["prefill: no"]}, "parts that failed or were left out"),
        ({"tests": [Outcome("a", 3, 1, 0, 0, "exit code 1")]}, "GPU tests that failed"),
        ({"tests": [Outcome("a", 0, 0, 0, 0, "exit code 4")]}, "GPU tests that failed"),
        ({"tests": [Outcome("a", 3, 0, 0, 9, f"{LATE}: a::b")]}, "GPU tests that were not run"),
        ({"prefills": [Prefill(8, 512, 1e13, failed="no")]}, "prefill: flop a second / matmul peak"),
        ({"peak_flops": 0.0}, "prefill, batch 1: flop a second / matmul peak"),
        ({"memory": Memory(10 * GB, 11 * GB)}, "peak device memory by the driver / budget"),
        (
            {"memory": Memory(10 * GB, 9 * GB, listed=11 * GB)},
            "device memory by the driver's list of processes / budget",
        ),
        ({"memory": Memory(10 * GB, 9 * GB, nvml=11 * GB)}, "peak device memory by NVML / budget"),
        ({"stress": Stress(999, 0)}, "stress: sweeps with recycled memory poisoned"),
        ({"stress": Stress(1000, 1)}, "stress: sweeps with other logits"),
        ({"from_drive": [a_round(read=GB)]}, "NVMe -> GPU: bytes a second / the drive"),
        (
            {"from_host": [Decode(1, [a_round(copied=94 * GB)])]},
            "host -> GPU: bytes a second / pinned copies",
        ),
        (
            {"from_host": [Decode(1, [a_round(busy=1.9)])]},
            "host -> GPU: share of a sweep without a copy",
        ),
    ],
)
def test_what_is_not_good_enough_is_missed(changes, missed):
    if "peak_flops" in changes:
        changes = {**changes, "prefills": [Prefill(1, 512, 1e13, [1.0])]}
    assert not required(**changes)[missed].met


def test_tables_show_what_was_measured_and_what_was_not():
    text = decode_table(findings()) + prefill_table(findings())
    assert "| 1.000 (pcie) | 0.900 (drive) |" in text
    assert "| host memory, batch 64 | 1.100 |" in text
    assert "OutOfMemoryError: no" in text
    nothing = Findings(1, 1)
    assert decode_table(nothing) == prefill_table(nothing) == ""
    assert any("left out" in line for line in remarks(nothing))
    assert any("prefill: why" in line for line in remarks(findings(failed=["prefill: why"])))


def test_a_model_has_as_many_layers_as_there_is_room_for():
    shape = Shape(8192, 28672, 24, 32000)
    assert fitting_layers(shape, 100 * GB) == shape
    assert 10 < fitting_layers(shape, 30 * GB).layers < 24
    assert fitting_layers(shape, 0).layers == 1


def test_a_card_gives_the_results_file_its_name():
    assert gpu.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_the_drivers_list_of_processes_is_read_for_this_one():
    assert listed_bytes("12, 100\n34, 512\n", 34) == 512 << 20
    assert listed_bytes("12, 100\n", 34) is None
    assert listed_bytes("34, [N/A]\n", 34) is None
    assert listed_bytes("", 34) is None


def test_the_drivers_tools_are_asked_for_the_card_that_torch_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert visible_device() == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_device() == "0"


def test_the_most_memory_in_use_counts_only_while_it_is_watched():
    now = [5]
    watch = Watch(lambda: now[0])
    with watch:
        time.sleep(0.03)
        now[0] = 7
    now[0] = 100
    time.sleep(0.03)
    assert watch.peak == 7
    now[0] = 8
    with watch:
        pass
    assert watch.peak == 8


def test_a_staged_card_counts_what_its_device_allocated():
    card = StagedCard()
    assert card.used() == 0
    processor = card.processor()
    block = processor.block(1 << 20)
    assert card.used() == 1 << 20
    del block


@without_gpu
def test_there_is_no_card_without_a_gpu():
    with pytest.raises(BenchmarkError, match="no GPU"):
        CudaCard()


@pytest.fixture
def state(tmp_path):
    """The file of a run that has just begun."""
    options = gpu._parse(["--staged", "--folder", str(tmp_path)])
    State(vars(options), Findings(1 << 20, 20)).save(str(tmp_path / "state"))
    return str(tmp_path / "state")


def a_part(state, seconds=60.0):
    return Part(state, time.monotonic() + gpu_part.GRACE + seconds)


def test_a_step_that_fails_costs_no_other(state, capsys):
    part = a_part(state)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    assert part.attempt("one", fail) is None
    assert part.attempt("two", lambda: 2) == 2
    assert State.load(state).found.failed == ["one: OutOfMemoryError: CUDA out of memory"]
    assert "and much more" in capsys.readouterr().err


def test_a_step_is_left_out_where_no_time_is_left(state):
    assert a_part(state, seconds=-1).attempt("one", lambda: 1) is None
    assert State.load(state).found.failed == ["one: no time was left"]


def test_a_part_without_a_model_says_so(state, capsys):
    part = a_part(state)
    part.run("host")
    assert part.found.failed == ["host: BenchmarkError: there is no model to measure with"]


def test_a_budget_is_less_than_a_third_of_whatever_model_there_was_room_for(state, monkeypatch):
    part = a_part(state)
    part.options.device_memory = part.found.budget = 1 << 30
    part.run("model")
    assert part.found.failed == []
    assert 3 < part.found.model_bytes / part.found.budget < 3.2


def test_a_drive_that_writes_slowly_gets_a_smaller_model(state, monkeypatch):
    part = a_part(state)
    monkeypatch.setattr(gpu_part, "WRITING", 1e-6)
    part.run("model")
    assert part.found.layers == 1


def test_every_part_leaves_those_after_it_what_is_reserved_for_them():
    reserved = {"a": 10.0, "b": 20.0, "c": 30.0}
    assert ends(100, 200, reserved) == {"a": 150, "b": 170, "c": 200}
    assert ends(100, 130, reserved) == {"a": 105, "b": 115, "c": 130}
    assert ends(140, 130, reserved) == {"a": 130, "b": 130, "c": 130}


def test_the_minutes_include_those_of_the_build(tmp_path):
    arguments = ["--staged", "--folder", str(tmp_path), "--minutes", "7"]
    check = gpu.Check(gpu._parse([*arguments, "--started", str(time.time() - 60)]))
    assert check.end - time.monotonic() == pytest.approx(360, abs=2)
    check = gpu.Check(gpu._parse(arguments))
    assert check.end - time.monotonic() == pytest.approx(420, abs=2)
    assert gpu.MINUTES * 60 + 2 * 15 < 8 * 60  # a process that dies slowly, and the one before


def test_a_part_that_dies_is_told(tmp_path):
    reason = PartProcess(str(tmp_path / "nothing"), "host", time.monotonic() + 60).wait()
    assert reason == "ended with exit code 1"


def test_what_a_process_has_started_ends_with_it(tmp_path):
    script = (
        "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    )
    with open(tmp_path / "out", "wb") as out:
        process = started([sys.executable, "-c", script], out)
    while not (tmp_path / "out").read_text().endswith("\n"):
        time.sleep(0.01)
    gpu_process.end_group(process)
    assert process.returncode == -9
    child = int((tmp_path / "out").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it runs still"
        time.sleep(0.01)


@pytest.mark.parametrize("bad", [["--seconds", "0"], ["--minutes", "0"], ["--decode-batches", "64"]])
def test_what_cannot_be_measured_is_refused(bad, capsys):
    with pytest.raises(SystemExit):
        gpu._parse(["--folder", "x", *bad])
    assert "error" in capsys.readouterr().err


class UpToTwoFit:
    """A model in whose memory a batch of two has room."""

    config = SimpleNamespace(vocab_size=16)
    base_model = torch.nn.Sequential(torch.nn.Linear(4, 8))

    def __call__(self, input_ids, **_):
        if input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return SimpleNamespace(past_key_values=None, logits=torch.zeros(*input_ids.shape, 16))


def read_prompts(left):
    return list(
        prefill(
            StagedCard(),
            UpToTwoFit(),
            batches=[1, 2, 4, 8],
            prompt=3,
            passes=2,
            watch=Watch(lambda: 0),
            left=left,
        )
    )


def test_prefill_ends_with_the_first_batch_that_does_not_fit():
    found = read_prompts(lambda: 1e9)
    assert [(each.batch, len(each.seconds)) for each in found] == [(1, 2), (2, 2), (4, 0)]
    assert found[-1].failed == "OutOfMemoryError: no room"
    assert found[1].flops == 2 * 3 * 2 * 4 * 8


def test_prefill_ends_when_time_does():
    (only,) = read_prompts(lambda: 0.0)
    assert only.failed == "no time was left"


def test_prefill_ends_where_the_next_batch_would_take_longer_than_there_is_time():
    left = iter([1e9, 1e-9])
    found = read_prompts(lambda: next(left))
    assert [(each.batch, each.failed) for each in found] == [(1, ""), (2, "no time was left")]


def test_tests_that_fail_or_do_not_end_are_told(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    )
    path = str(tmp_path)
    tests = GpuTests([[[path, "-k", "good"], [path, "-k", "bad"]], [[path, "-k", "slow"]]])
    good, bad, slow = tests.outcomes(time.monotonic() + 6)
    tests.end()
    assert (good.passed, good.failed, good.not_run, good.wrong) == (1, 0, 0, "")
    assert (bad.passed, bad.failed, bad.not_run) == (0, 1, 0)
    assert bad.wrong.startswith("exit code 1: ")
    assert "assert 1 == 2" in capsys.readouterr().err
    assert (slow.passed, slow.failed, slow.not_run) == (0, 0, 1)
    assert slow.wrong.startswith("not done when its time was over")
    text = table_of_tests(findings(tests=[good, bad, slow]))
    assert "| all | 1 | 1 | 0 | 1 |" in text
    assert any("exit code 1" in line for line in remarks(findings(tests=[good, bad, slow])))


def test_what_pytest_printed_of_tests_is_counted_to_the_last_line():
    text = (
        "collecting ... collected 9 items / 4 deselected / 5 selected\n\n"
        "tests/a.py::test_one[x y] PASSED                [ 20%]\n"
        "tests/a.py::test_two SKIPPED (no GPU: a::b PASSED) [ 40%]\n"
        "tests/a.py::test_three PASSED [ 60%]\n"
        "tests/a.py::test_three ERROR [ 60%]\n"
        "tests/a.py::test_four "
    )
    assert gpu_tests.counted("a", text, "late") == Outcome("a", 1, 1, 1, 2, "late")
    assert gpu_tests.counted("a", "no module", "exit code 4") == Outcome("a", 0, 0, 0, 0, "exit code 4")
    assert gpu_tests.counted("a", "collected 1 item\na::b PASSED", "") == Outcome("a", 1, 0, 0, 0)


def test_the_processes_of_tests_leave_no_file_out_and_none_is_run_twice():
    alone, shared = gpu_tests.all_tests()
    (path,) = {arguments[0] for arguments in shared}
    assert [arguments[-1] for arguments in shared] == [f"{n + 1}/{len(shared)}" for n in range(len(shared))]
    there = {str(each.relative_to(gpu_process.ROOT)) for each in gpu_process.ROOT.glob("tests/gpu/test_*.py")}
    assert there == {path, *(each[0] for each in alone)}


def test_the_shares_of_the_tests_are_all_of_them():
    shares = []
    for number in (1, 2, 3):
        items, others = list(range(10)), []
        hook = SimpleNamespace(pytest_deselected=lambda items, others=others: others.extend(items))
        options = SimpleNamespace(getoption={"--share": f"{number}/3"}.get, hook=hook)
        conftest.pytest_collection_modifyitems(options, items)
        assert sorted(items + others) == list(range(10)), "what pytest prints tells how many there are"
        shares.append(items)
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


class FakeNvml:
    """nvidia-ml-py, of a card with 7 bytes in use."""

    class NVMLError(Exception):
        pass

    def __init__(self, there=True):
        self._there = there

    def nvmlInit(self):
        if not self._there:
            raise self.NVMLError

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        assert handle in (3, "GPU-1")
        return SimpleNamespace(total=100, free=93, used=7)


def test_the_drivers_library_is_asked_where_it_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert nvml_counter("3")() == nvml_counter("GPU-1")() == 7
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(there=False))
    assert nvml_counter("3") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_counter("3") is None


def test_a_count_that_fails_is_no_peak():
    def fail():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), Watch(lambda: 1, fail):
        time.sleep(0.03)


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Put a program of that name on the path, which is a shell's script."""

    def put(script):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "memcheck found nothing"),
        ("sleep 60", "did not end within 1 s"),
        ("echo '========= Error: Device not supported'; exit 9", "does not work here: exit code 9: ====="),
        ("exit 1", "does not work here: exit code 1: nothing was printed"),
    ],
)
def test_the_sanitizer_runs_where_there_is_one_that_works(script, said, sanitizer):
    sanitizer(script)
    assert said in gpu_stress.sanitized("checkpoint", 1)


@pytest.mark.parametrize(
    "script",
    [
        "echo '========= Invalid __global__ read of size 4 bytes'; exit 9",
        "echo 'Other logits in 1 of 3 sweeps'; exit 1",
    ],
)
def test_what_the_sanitizer_finds_is_an_error(script, sanitizer, tmp_path, monkeypatch):
    sanitizer(script)
    with pytest.raises(BenchmarkError, match=r"found something: .*(Invalid|Other)"):
        gpu_stress.sanitized("checkpoint", 1)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu_stress.sanitized("checkpoint", 1) == "compute-sanitizer is not there"
