"""What a run's timeline and report say of it: every byte once, every operator after its weight, every thread apart."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections import defaultdict

import pytest
import torch
from running import IDS, check_device, run_tightly, smallest, survive_interrupts, tokens

import zinfer
import zinfer.aio.drives
import zinfer.planning
from tests import architectures
from tests.planner.machines import cpu, gpu
from zinfer.aio import portable
from zinfer.coordinator.coordinator import Coordinator
from zinfer.device.staged import StagedProcessor
from zinfer.errors import OptionError
from zinfer.timeline import chrome
from zinfer.timeline.events import COMPUTE, COPIES, READS, SWEEPS, WAITS, totals

pytestmark = pytest.mark.usefixtures("nothing_left")
SPARE = 20_000  # bytes over the fewest that work: nearly everything streams


@pytest.fixture
def recorded(saved):
    """A tiny Llama that streams and records; closed after the test."""
    with run_tightly(saved("llama"), SPARE, timeline=True) as model:
        yield model


def timeline_of(model, tmp_path):
    """What the model's trace file says."""
    model.zinfer.timeline(tmp_path / "out.json")
    return chrome.read(tmp_path / "out.json")


def engine_stats(model):
    return model.zinfer._streaming.coordinator.device.drives.stats


def by_thread(spans):
    threads = defaultdict(list)
    for span in spans:
        threads[span.thread].append(span)
    return threads.values()


def assert_apart(spans):
    spans = sorted(spans, key=lambda span: (span.start, span.end))
    for first, second in itertools.pairwise(spans):
        assert first.end <= second.start + 2e-9, (first, second)  # times are written in nanoseconds


def assert_consistent(timeline):
    for one in (SWEEPS, COMPUTE, WAITS):
        for spans in by_thread(timeline.row(one)):
            assert_apart(spans)
    for spans in by_thread(timeline.row(COMPUTE) + timeline.row(WAITS)):
        assert_apart(spans)
    assert timeline.row(COPIES) == []
    assert timeline.dropped == 0


@pytest.mark.parametrize("engine", ["this", "portable"])
def test_every_byte_read_appears_once(engine, saved, tmp_path, monkeypatch):
    if engine == "portable":
        monkeypatch.setattr(zinfer.aio.drives, "Engine", portable.Engine)
        monkeypatch.setattr(zinfer.aio.drives, "File", portable.File)
    with run_tightly(saved("llama"), SPARE, timeline=True) as model:
        tokens(model, count=5)
        model(IDS)  # another path: some of what was read ahead is dropped
    timeline = timeline_of(model, tmp_path)
    reads = timeline.row(READS)
    assert sum(read.nbytes for read in reads) == engine_stats(model)["bytes_transferred"]
    assert engine_stats(model)["bytes_transferred"] > 3 * model.zinfer.report().model_bytes
    assert {read.kind for read in reads} == {"load", "rows", "demand", "prefetch"}
    assert_consistent(timeline)


def test_the_reads_of_an_operator_end_before_its_compute_begins(recorded, tmp_path):
    tokens(recorded, count=4)
    timeline = timeline_of(recorded, tmp_path)
    reads = defaultdict(list)
    for read in timeline.row(READS):
        reads[read.name].append(read)
    before: dict[str, float] = {}
    uses = timeline.row(COMPUTE)
    for use in uses:
        mine = [read for read in reads[use.name] if before.get(use.name, 0.0) <= read.start]
        assert any(read.end <= use.start for read in mine), f"{use.name} was used before it was read"
        before[use.name] = use.start
    assert len(uses) > 4 * 10


def test_a_wait_ends_when_the_weight_has_come_and_compute_follows(recorded, tmp_path):
    tokens(recorded, count=4)
    timeline = timeline_of(recorded, tmp_path)
    waits, uses = timeline.row(WAITS), timeline.row(COMPUTE)
    assert waits
    for wait in waits:
        following = next(use for use in uses if use.start >= wait.end - 2e-9)
        assert following.name == wait.name
    total = sum(wait.end - wait.start for wait in waits)
    assert total == pytest.approx(recorded.zinfer.report().wait_seconds, rel=0.05, abs=1e-3)


def test_sweeps_are_marked_and_hold_their_operators(recorded, tmp_path):
    tokens(recorded, count=5)
    timeline = timeline_of(recorded, tmp_path)
    sweeps = timeline.row(SWEEPS)
    assert [sweep.name for sweep in sweeps] == ["0", "1", "2", "3", "4"]
    for use in timeline.row(COMPUTE):
        assert any(sweep.start <= use.start and use.end <= sweep.end + 2e-9 for sweep in sweeps)
    assert totals(timeline).sweeps == 5
    capacity = recorded.zinfer.report().window_bytes
    assert all(0 <= used <= capacity for _, used in timeline.window) and timeline.window


def test_parts_of_the_model_called_alone_are_recorded_too(saved, tmp_path):
    with run_tightly(saved("t5"), SPARE, timeline=True) as model, torch.no_grad():
        model.encoder(IDS)
        alone = timeline_of(model, tmp_path)
        assert alone.row(SWEEPS) == [] and alone.row(COMPUTE) and alone.row(READS)
        tokens(model)
        assert_consistent(timeline_of(model, tmp_path))


def test_the_tokens_are_the_same(recorded):
    assert tokens(recorded) == tokens(architectures.build("llama"))
    check_device(recorded)


def test_off_nothing_is_recorded(saved, tmp_path):
    with run_tightly(saved("llama"), SPARE) as model:
        tokens(model, count=2)
        coordinator = model.zinfer._streaming.coordinator
        assert type(coordinator) is Coordinator
        assert coordinator.device._recorder is None
        with pytest.raises(OptionError, match="timeline=True"):
            model.zinfer.timeline(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_before_anything_ran_it_says_so(saved, tmp_path):
    # All its tensors are weights, and none has been read.
    torch.manual_seed(3)
    module = torch.nn.Linear(600, 600, bias=False)
    (tmp_path / "drive").mkdir()
    options = {"nvme_path": tmp_path / "drive", "offload": "nvme"}
    with zinfer.run(module, timeline=True, max_memory={"cpu": "2MB"}, **options) as model:
        with pytest.raises(OptionError, match="call the model first"):
            model.zinfer.timeline(tmp_path / "out.json")
        model(torch.ones(1, 600))
        assert len(timeline_of(model, tmp_path).row(READS)) == 1


@pytest.mark.parametrize("wrong", ["out.json", 1, None])
def test_timeline_is_a_yes_or_no(wrong, saved):
    with pytest.raises(OptionError, match="pass True"):
        zinfer.run(saved("llama"), timeline=wrong)


def test_a_folder_that_is_not_there_is_an_os_error(recorded, tmp_path):
    tokens(recorded, count=1)
    with pytest.raises(FileNotFoundError):
        recorded.zinfer.timeline(tmp_path / "none" / "out.json")


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_a_model_kept_in_memory_has_reads_of_its_load_and_sweeps(offload, saved, tmp_path):
    with zinfer.run(saved("llama"), offload=offload, timeline=True) as model:
        tokens(model, count=3)
        timeline = timeline_of(model, tmp_path)
        report = model.zinfer.report()
    assert len(timeline.row(SWEEPS)) == 3
    assert sum(read.nbytes for read in timeline.row(READS)) == engine_stats(model)["bytes_transferred"]
    assert timeline.row(COMPUTE) == timeline.row(WAITS) == []
    assert report.bubble_seconds == 0
    assert all(sweep.nvme_bytes == 0 for sweep in report.each_sweep)


def test_it_can_be_written_after_close_and_twice(recorded, tmp_path):
    tokens(recorded, count=2)
    recorded.zinfer.close()
    first = timeline_of(recorded, tmp_path)
    assert timeline_of(recorded, tmp_path) == first
    assert len(first.row(SWEEPS)) == 2


def test_two_models_keep_their_events_apart(saved, tmp_path):
    folder = saved("llama")
    with run_tightly(folder, SPARE, timeline=True) as one, run_tightly(folder, SPARE, timeline=True) as other:
        for _ in range(3):
            one(IDS)
            other(IDS[:, :2])
        other(IDS)
        for model, sweeps in ((one, 3), (other, 4)):
            model.zinfer.close()
            timeline = timeline_of(model, tmp_path)
            assert len(timeline.row(SWEEPS)) == sweeps
            moved = sum(read.nbytes for read in timeline.row(READS))
            assert moved == engine_stats(model)["bytes_transferred"]
            assert_consistent(timeline)


def test_two_threads_are_told_apart(saved, tmp_path):
    with run_tightly(saved("llama"), 200_000, timeline=True) as model:
        model(IDS)
        loaded = engine_stats(model)["bytes_requested"] - model.zinfer.report().each_sweep[0].nvme_bytes
        ready = threading.Barrier(2)

        def work(count):
            ready.wait(10)
            for _ in range(count):
                model(IDS)

        threads = [threading.Thread(target=work, args=(count,)) for count in (4, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        report = model.zinfer.report()
        requested = engine_stats(model)["bytes_requested"]
    timeline = timeline_of(model, tmp_path)
    assert_consistent(timeline)
    assert sorted(len(spans) for spans in by_thread(timeline.row(SWEEPS))) == [1, 4, 7]
    counts = defaultdict(int)
    for sweep in report.each_sweep:
        counts[sweep.thread] += 1
    assert sorted(counts.values()) == [1, 4, 7]
    assert sum(sweep.nvme_bytes for sweep in report.each_sweep) + loaded == requested
    assert sum(sweep.hits for sweep in report.each_sweep) == report.hits
    assert sum(sweep.misses for sweep in report.each_sweep) == report.misses
    waited = sum(sweep.wait_seconds for sweep in report.each_sweep)
    assert waited == pytest.approx(report.wait_seconds)


def test_a_kept_interrupt_keeps_no_region_of_a_recorded_model(saved, tmp_path):
    folder = saved("llama")
    gc.collect()  # of other tests' models now: an interrupt in a finalizer is lost
    with run_tightly(folder, 100_000, timeline=True) as model:
        survive_interrupts(model, tokens(architectures.build("llama")))
        assert_consistent(timeline_of(model, tmp_path))


def test_nothing_of_a_model_lives_on_in_its_recorder(saved):
    with run_tightly(saved("llama"), SPARE, timeline=True) as model:
        tokens(model, count=3)
    recorder = model.zinfer._recorder
    del model
    gc.collect()
    for event in recorder.timeline("M").spans:
        assert {type(value) for value in vars(event).values()} <= {str, float, int}


# The report


def test_the_report_divides_bytes_waits_and_uses_by_sweep(saved):
    folder = saved("llama")
    with run_tightly(folder, 100_000) as model:
        start = engine_stats(model)["bytes_requested"]
        tokens(model, count=6)
        report = model.zinfer.report()
        asked = engine_stats(model)["bytes_requested"] - start
        streamed = model.zinfer.sweep_bytes
    assert [sweep.number for sweep in report.each_sweep] == list(range(6))
    assert sum(sweep.nvme_bytes for sweep in report.each_sweep) == asked
    for sweep in report.each_sweep[2:]:
        assert sweep.nvme_bytes == pytest.approx(streamed, rel=0.25), "the look-ahead wraps around"
        assert (sweep.host_bytes, sweep.device_bytes) == (report.resident_bytes, 0)
        assert sweep.hits + sweep.misses > 10
    assert sum(sweep.wait_seconds for sweep in report.each_sweep) == pytest.approx(report.wait_seconds)


def test_waits_are_listed_for_every_weight_the_longest_first(recorded):
    tokens(recorded, count=4)
    report = recorded.zinfer.report()
    lengths = list(report.waits_by_weight.values())
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == pytest.approx(report.wait_seconds)
    assert list(report.waits_by_weight.items())[:5] == list(report.longest_waits)
    names = {name for name, _ in architectures.build("llama").named_parameters()}
    assert set(report.waits_by_weight) <= names


def test_bubbles_are_part_of_the_sweeps(recorded):
    tokens(recorded, count=6)
    report = recorded.zinfer.report()
    later = report.each_sweep[1:]
    assert report.steady_seconds == pytest.approx(sum(sweep.seconds for sweep in later), rel=0.01)
    assert 0 <= report.bubble_seconds <= report.steady_seconds
    assert f"of {report.steady_seconds:.2f} s" in str(report)


def test_the_drives_own_rate_is_this_runs_unless_aio_bench_has_measured_it(saved, monkeypatch):
    folder = saved("llama")
    with run_tightly(folder, SPARE) as model:
        tokens(model, count=3)
        report = model.zinfer.report()
    assert report.drive_rate_source == "engine" and report.drive_rate >= report.read_rate > 0
    assert "run aio_bench" in str(report)
    profile = zinfer.aio.drives.Profile(
        "threads", 1 << 20, 4, 4, read_rate=3.25e9, write_rate=None, measured="2026-11-20T21:00:00"
    )
    monkeypatch.setattr(zinfer.aio.drives, "load_profile", lambda device: profile)
    with run_tightly(folder, SPARE) as model:
        tokens(model, count=3)
        report = model.zinfer.report()
    assert (report.drive_rate, report.drive_rate_source) == (3.25e9, "aio_bench")
    assert "drive's own 3.25 GB/s (as aio_bench measured)" in str(report)


def test_a_prediction_stands_beside_what_was_measured(recorded):
    runtime = recorded.zinfer
    tokens(recorded, count=1)
    asked = []

    def predict(rows, length):
        asked.append((rows, length))
        return 0.5

    runtime = type(runtime)(recorded, runtime._streaming, "folder", "none", 0, predict=predict)
    assert runtime.predict() is None
    for length in (7, 8, 9):
        runtime.begin_sweep(recorded, (torch.zeros(2, length, dtype=torch.long),), {})
        runtime.end_sweep(recorded, (), {}, None)
    assert runtime.report().predicted_seconds is None
    assert "predicted" not in str(runtime.report())
    assert runtime.predict() == 0.5
    report = runtime.report()
    assert report.predicted_seconds == 0.5
    assert asked == [(2, 9)]
    assert f" 0.500 s a sweep; measured {report.sweep_seconds:.3f} s, " in str(report)


def test_a_run_on_a_measured_machine_is_predicted(saved, monkeypatch):
    folder = saved("llama")
    with run_tightly(folder, SPARE) as model:
        assert model.zinfer.predict() is None
        tokens(model, count=3)
        monkeypatch.setattr(zinfer.planning, "measured_machine", lambda path, processor: None)
        assert model.zinfer.predict() is None
        monkeypatch.setattr(zinfer.planning, "measured_machine", lambda path, processor: cpu(drive_read=1e6))
        predicted = model.zinfer.predict()
        assert predicted == pytest.approx(model.zinfer.sweep_bytes / 1e6, rel=0.5)
        assert model.zinfer.report().predicted_seconds == predicted


def test_a_run_on_a_measured_device_is_predicted_by_its_own_tiers(saved, monkeypatch):
    folder, asked = saved("llama"), []

    def measured(path: str, processor: object) -> object:
        asked.append(processor)
        return gpu(drive_read=1e6, device_memory=1 << 30)

    monkeypatch.setattr(zinfer.planning, "measured_machine", measured)
    total = sum(p.nbytes for p in architectures.ALL["llama"][0].from_pretrained(folder).parameters())
    processor = StagedProcessor(1 << 30)
    ceilings = {0: total // 2 + SPARE, "cpu": total // 2 + (64 << 10)}
    with zinfer.run(folder, device=processor, max_memory=ceilings, offload="nvme", progress=False) as model:
        assert model.zinfer.predict() is None
        tokens(model, count=3)
        predicted = model.zinfer.predict()
        assert asked == [processor]
        assert model.zinfer.sweep_bytes > 0
        assert predicted == pytest.approx(model.zinfer.sweep_bytes / 1e6, rel=0.5)
        assert f"measured {model.zinfer.report().sweep_seconds:.3f} s" in str(model.zinfer.report())
    with zinfer.run(
        folder, device=StagedProcessor(1 << 30), max_memory={0: 4 * total}, offload="nvme", progress=False
    ) as model:
        tokens(model, count=3)
        assert model.zinfer.sweep_bytes == 0
        assert model.zinfer.predict() < predicted / 10


def test_a_run_whose_caches_are_in_host_memory_is_not_predicted_as_if_they_were_not(saved, monkeypatch):
    monkeypatch.setattr(zinfer.planning, "measured_machine", lambda path, processor: gpu())
    with zinfer.run(
        saved("llama"), device=StagedProcessor(1 << 30), kv_offload="cpu", progress=False
    ) as model:
        tokens(model, count=3)
        assert model.zinfer.predict() is None


def test_a_run_with_a_changed_config_is_not_predicted_as_if_it_had_not(saved, monkeypatch):
    monkeypatch.setattr(zinfer.planning, "measured_machine", lambda path, processor: cpu(drive_read=1e6))
    with zinfer.run(saved("llama"), offload="nvme", rms_norm_eps=1e-3) as model:
        tokens(model, count=3)
        assert model.zinfer.predict() is None


def test_the_report_is_plain_json(recorded):
    tokens(recorded, count=3)
    data = json.loads(json.dumps(recorded.zinfer.report().as_dict()))
    assert len(data["each_sweep"]) == 3
    assert data["each_sweep"][1]["nvme_bytes"] > 0
    assert data["waits_by_weight"]


def test_the_smallest_budget_is_the_same_with_a_recorder(saved):
    folder = saved("llama")
    assert smallest(folder, timeline=True) == smallest(folder)
