"""benchmarks.gpu, on the staged device from its command line to its results file; and its pure parts."""

import json
import os
import stat
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from benchmarks import BenchmarkError, gpu, gpu_stress
from benchmarks.gpu_card import CudaCard, StagedCard, Watch, listed_bytes, visible_device
from benchmarks.gpu_figures import (
    Decode,
    Findings,
    Memory,
    Prefill,
    Round,
    Stress,
    copying,
    decode_table,
    prefill_table,
    remarks,
    requirements,
)
from benchmarks.gpu_runs import Shape, prefill
from benchmarks.gpu_tests import GpuTests
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
        "from_host": [Decode(1, [a_round()], 1.0, "pcie"), Decode(64, [a_round(2.2)], 1.0, "pcie")],
        "from_drive": [a_round(read=6 * GB, yardstick=(3 * GB, 3 * GB))],
        "prefills": [
            Prefill(1, 512, 1e13, [1.0]),
            Prefill(64, 512, 1e15, [2.0, 1.9, 2.5]),
            Prefill(128, 512, 2e15, failed="OutOfMemoryError: no"),
        ],
        "memory": Memory(10 * GB, 9 * GB, None),
        "stress": Stress(1000, 0),
        "tests": [],
    }
    return Findings(**(usual | changes))


def required(**changes):
    return {item.name: item for item in requirements(findings(**changes))}


def test_the_whole_runs_on_the_staged_device(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    folder = tmp_path / "models"
    gpu.main(["--staged", "--folder", str(folder), "--without-tests", "--json", str(out)])
    result = json.loads(out.read_text())
    met = {item["name"]: item["met"] for item in result["requirements"]}
    assert result["figures"]["failed"] == []
    assert met["model's bytes / device budget"]
    assert met["peak device memory by the driver / budget"]
    assert met["stress: sweeps with recycled memory poisoned"]
    assert met["stress: sweeps with other logits"]
    assert len(met) == 11
    assert [part["batch"] for part in result["rounds"]] == [1, 2, 1]
    for part in result["rounds"]:
        assert all(each["copied"] > 0 and 0 < each["busy"] <= each["seconds"] for each in part["rounds"])
    host, _, drive = result["rounds"]
    assert all(each["read"] == 0 for each in host["rounds"])
    assert all(each["read"] > 0 for each in drive["rounds"])
    assert [len(each["seconds"]) for each in result["figures"]["prefills"]] == [gpu.PASSES] * 2
    assert result["hardware"]["card"].startswith("staged")
    assert "| required | measured |" in capsys.readouterr().out
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
        ({"tests": ["bfloat16: exit code 1"]}, "GPU tests: processes that failed"),
        ({"prefills": [Prefill(8, 512, 1e13, failed="no")]}, "prefill, batch 8: flop a second / matmul peak"),
        ({"peak_flops": 0.0}, "prefill, batch 1: flop a second / matmul peak"),
        ({"memory": Memory(10 * GB, 11 * GB, None)}, "peak device memory by the driver / budget"),
        (
            {"memory": Memory(10 * GB, 9 * GB, 11 * GB)},
            "device memory by the driver's list of processes / budget",
        ),
        ({"stress": Stress(999, 0)}, "stress: sweeps with recycled memory poisoned"),
        ({"stress": Stress(1000, 1)}, "stress: sweeps with other logits"),
        ({"from_drive": [a_round(read=GB)]}, "NVMe -> GPU: bytes a second / the drive"),
        (
            {"from_host": [Decode(1, [a_round(copied=94 * GB)], 1.0, "pcie")]},
            "host -> GPU: bytes a second / pinned copies",
        ),
        (
            {"from_host": [Decode(1, [a_round(busy=1.9)], 1.0, "pcie")]},
            "host -> GPU: share of a sweep without a copy",
        ),
    ],
)
def test_what_is_not_good_enough_is_missed(changes, missed):
    if "peak_flops" in changes:
        changes = {**changes, "prefills": [Prefill(1, 512, 1e13, [1.0])]}
    assert not required(**changes)[missed].met


def test_tables_show_what_was_measured_and_what_was_not():
    text = decode_table(findings()) + prefill_table(findings(from_host=[Decode(1, [a_round()], None, "")]))
    assert "| host memory, batch 64 | 1.100 |" in text
    assert "OutOfMemoryError: no" in text
    nothing = Findings(1, 1)
    assert decode_table(nothing) == prefill_table(nothing) == ""
    assert any("left out" in line for line in remarks(nothing))
    assert any("prefill: why" in line for line in remarks(findings(failed=["prefill: why"])))


def test_a_model_has_as_many_layers_as_there_is_room_for():
    shape = Shape(8192, 28672, 24, 32000)
    assert gpu.fitting_layers(shape, 100 * GB) == 24
    fewer = gpu.fitting_layers(shape, 30 * GB)
    assert 10 < fewer < 24
    assert gpu.fitting_layers(shape, 0) == 1


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


def a_check(tmp_path, minutes="1"):
    arguments = ["--staged", "--folder", str(tmp_path), "--minutes", minutes]
    return gpu.Check(gpu._parse(arguments), StagedCard(), ExitStack())


def test_a_part_that_fails_costs_no_other(tmp_path, capsys):
    check = a_check(tmp_path)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    assert check.attempt("one", fail) is None
    assert check.attempt("two", lambda: 2) == 2
    assert check.found.failed == ["one: OutOfMemoryError: CUDA out of memory"]
    assert "and much more" in capsys.readouterr().err


def test_a_part_is_left_out_where_no_time_is_left(tmp_path):
    check = a_check(tmp_path, minutes="1e-9")
    assert check.attempt("one", lambda: 1) is None
    assert check.found.failed == ["one: no time was left"]


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
    found = []
    prefill(
        StagedCard(),
        UpToTwoFit(),
        found,
        batches=[1, 2, 4, 8],
        prompt=3,
        passes=2,
        watch=Watch(lambda: 0),
        left=left,
    )
    return found


def test_prefill_ends_with_the_first_batch_that_does_not_fit():
    found = read_prompts(lambda: 1.0)
    assert [(each.batch, len(each.seconds)) for each in found] == [(1, 2), (2, 2), (4, 0)]
    assert found[-1].failed == "OutOfMemoryError: no room"
    assert found[1].flops == 2 * 3 * 2 * 4 * 8


def test_prefill_ends_when_time_does():
    (only,) = read_prompts(lambda: 0.0)
    assert only.failed == "no time was left"


def test_tests_that_fail_or_do_not_end_are_told(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    )
    tests = GpuTests(("good", "bad"), str(tmp_path))
    (bad,) = tests.failed(60)
    tests.end()
    assert bad.startswith("bad: exit code 1: ")
    assert "assert 1 == 2" in capsys.readouterr().err
    tests = GpuTests(("slow",), str(tmp_path))
    (slow,) = tests.failed(0.1)
    tests.end()
    assert slow.startswith("slow: not done after 0 s")


@pytest.mark.parametrize(
    ("script", "said"), [("exit 0", "memcheck found nothing"), ("sleep 60", "did not end within 1 s")]
)
def test_the_sanitizer_runs_where_there_is_one(script, said, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert said in gpu_stress.sanitized("checkpoint", 1)


def test_what_the_sanitizer_finds_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_stress.sanitized("checkpoint", 1) == "compute-sanitizer is not there"
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho Invalid read; exit 9\n")
    program.chmod(0o755)
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 9.*Invalid read"):
        gpu_stress.sanitized("checkpoint", 1)
