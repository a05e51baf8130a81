"""The machine at hand: measured once, kept, and measured again when something has changed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace

import pytest
import torch

from tests.planner.machines import cpu
from zinfer import cpu_probe, device_probe, hardware_probe
from zinfer.aio.block_device import block_device_of
from zinfer.aio.probe import DriveRate
from zinfer.aio.profile import Profile, save_profile
from zinfer.device.staged import StagedProcessor
from zinfer.device_probe import FIGURES
from zinfer.errors import BudgetError, OptionError
from zinfer.hardware_cache import cache_path
from zinfer.hardware_probe import measured_machine, this_machine

CONDITIONS = ["method", "cpu", "torch", "transformers", "threads", "memory"]


@pytest.fixture
def shard(tmp_path) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8 << 20))
    return str(path)


@pytest.fixture
def measurements(monkeypatch) -> list[list[str]]:
    """The paths of each measurement; none takes time."""
    made: list[list[str]] = []

    def measure(paths: list[str], device: object) -> object:
        made.append(paths)
        return cpu(drive_read=1e9 + len(made)), False

    monkeypatch.setattr(hardware_probe, "_measure", measure)
    return made


def test_the_machine_is_measured_as_it_is(shard, monkeypatch):
    monkeypatch.setattr(cpu_probe, "SECONDS", 0.005)
    monkeypatch.setattr(cpu_probe, "WORKING_SET", 16 << 20)
    monkeypatch.setattr(cpu_probe, "BEYOND", 0)
    monkeypatch.setattr(cpu_probe, "ROWS", (1, 8))
    monkeypatch.setattr(cpu_probe, "WIDTH", 512)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    found = this_machine([shard])
    assert [rows for rows, _ in found.matmul["bfloat16"]] == [1, 8]
    assert not found.has_device
    assert found.drive_read > 1e6
    assert found.operator_seconds > 0
    measured = {"drive_read", "host_memory", "host_bandwidth", "matmul"}
    assert set(found.sources) == measured | {"copy_bandwidth", "attention_bandwidth", "operator_seconds"}
    assert "direct reads" in found.sources["drive_read"]


def test_a_second_plan_takes_the_figures_of_the_first(shard, measurements):
    first = this_machine([shard])
    assert this_machine([shard]) == first
    assert len(measurements) == 1
    (record,) = json.loads(cache_path().read_text())["drives"].values()
    assert record["measured"] and set(record["conditions"]) == set(CONDITIONS)


@pytest.mark.parametrize("change", CONDITIONS)
def test_a_change_of_the_machine_is_measured_anew(shard, measurements, change, monkeypatch):
    this_machine([shard])
    before = hardware_probe._conditions()
    monkeypatch.setattr(hardware_probe, "_conditions", lambda: before | {change: "another"})
    assert this_machine([shard]).drive_read == 1e9 + 2


def test_another_drive_is_measured_and_the_first_is_not_forgotten(shard, measurements, monkeypatch):
    this_machine([shard])
    other = type(block_device_of(shard))("another", "sdz")
    real = hardware_probe.block_device_of
    monkeypatch.setattr(hardware_probe, "block_device_of", lambda _: other)
    assert this_machine([shard]).drive_read == 1e9 + 2
    monkeypatch.setattr(hardware_probe, "block_device_of", real)
    assert this_machine([shard]).drive_read == 1e9 + 1
    assert len(measurements) == 2


def test_measuring_again_is_measuring_again(shard, measurements):
    this_machine([shard])
    assert this_machine([shard], refresh=True).drive_read == 1e9 + 2
    assert this_machine([shard]).drive_read == 1e9 + 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 0, "drives": {}}',
        '{"schema": 2, "drives": []}',
        '{"schema": 2, "drives": {}, "devices": 1}',
        "{",
    ],
)
def test_a_damaged_cache_is_told_of_and_measured_anew(shard, measurements, text, caplog):
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(text)
    with caplog.at_level(logging.WARNING, "zinfer"):
        this_machine([shard])
    assert "measuring again" in caplog.text
    this_machine([shard])
    assert len(measurements) == 1


def test_an_absurd_record_is_told_of_and_measured_anew(shard, measurements, caplog):
    this_machine([shard])
    document = json.loads(cache_path().read_text())
    next(iter(document["drives"].values()))["hardware"]["drive_read"] = -1
    cache_path().write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert this_machine([shard]).drive_read == 1e9 + 2
    assert "drive_read" in caplog.text


def test_a_drive_that_is_gone_is_an_error_that_says_what_to_do(tmp_path, measurements):
    with pytest.raises(OptionError, match="gone; mount it, or name a hardware profile"):
        this_machine([str(tmp_path / "unmounted" / "model.safetensors")])
    assert not measurements


def test_the_profile_that_aio_bench_keeps_comes_before_the_probes_own_reads(shard, measurements):
    this_machine([shard])
    save_profile(block_device_of(shard), Profile("threads", 1 << 20, 4, 2, 7e9, None, "2026-01-01T00:00:00"))
    found = this_machine([shard])
    assert found.drive_read == 7e9
    assert "aio_bench" in found.sources["drive_read"]


def test_without_a_checkpoint_a_nameless_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_probe, "SAMPLE_BYTES", 16 << 20)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    rate, how = hardware_probe._drive_rate([str(tmp_path)], block_device_of(str(tmp_path)))
    assert rate > 1e6
    assert "temporary file" in how
    assert not list(tmp_path.iterdir())


def test_a_machine_that_computes_something_else_meanwhile_is_told_of(shard, monkeypatch, caplog):
    monkeypatch.setattr(cpu_probe, "linear_curve", lambda _: (((1, 1e10),), True))
    monkeypatch.setattr(cpu_probe, "SECONDS", 0.001)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    with caplog.at_level(logging.WARNING, "zinfer"):
        this_machine([shard])
    assert "other programs were computing" in caplog.text
    assert "--remeasure" in caplog.text
    assert not cache_path().exists()


def test_what_was_measured_while_others_computed_is_not_kept(shard, monkeypatch):
    rates = iter([1e9, 2e9, 3e9])
    busy = iter([False, True, False])
    monkeypatch.setattr(hardware_probe, "_measure", lambda *_: (cpu(drive_read=next(rates)), next(busy)))
    assert this_machine([shard]).drive_read == 1e9
    assert this_machine([shard], refresh=True).drive_read == 2e9
    assert this_machine([shard]).drive_read == 1e9
    assert this_machine([shard], refresh=True).drive_read == 3e9
    assert this_machine([shard]).drive_read == 3e9


def test_an_implausible_figure_is_told_of_once_and_not_measured_for_ever(shard, monkeypatch, caplog):
    made = []

    def measure(*_: object) -> object:
        made.append(1)
        slow = {"float32": ((1, 2e5), (8, 1e9))}
        return replace(cpu(), drive_read=5e3, operator_seconds=0.5, matmul=slow), False

    monkeypatch.setattr(hardware_probe, "_measure", measure)
    with caplog.at_level(logging.WARNING, "zinfer"):
        found = this_machine([shard])
    assert (found.drive_read, found.operator_seconds, found.matmul["float32"][0][1]) == (1e6, 1e-3, 1e6)
    assert caplog.text.count("not plausible") == 3
    assert "measured 5000" in found.sources["drive_read"]
    assert this_machine([shard]) == found
    assert len(made) == 1


def test_the_working_set_is_far_beyond_all_caches(tmp_path, monkeypatch):
    for level, size, shared in ((0, "48K", "0"), (2, "1024K", "0,4"), (3, "32768K", "0-1,4-5")):
        folder = tmp_path / f"index{level}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    monkeypatch.setattr(cpu_probe, "CACHES", tmp_path)
    monkeypatch.setattr(cpu_probe.os, "cpu_count", lambda: 32)
    monkeypatch.setattr(cpu_probe, "free_memory", lambda: 1 << 40)
    assert cpu_probe._cache_bytes() == 8 * (32 << 20)
    assert cpu_probe._working_set() == 4 * 8 * (32 << 20)
    (tmp_path / "index3" / "size").write_text("plenty")
    (tmp_path / "index2" / "size").unlink()
    (tmp_path / "index0" / "shared_cpu_list").write_text("?")
    assert cpu_probe._cache_bytes() == 0
    assert cpu_probe._working_set() == cpu_probe.WORKING_SET


def test_results_of_a_copy_are_written_beyond_the_caches_too(monkeypatch):
    monkeypatch.setattr(cpu_probe, "_working_set", lambda: 64 << 20)
    monkeypatch.setattr(cpu_probe, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(cpu_probe, "SECONDS", 0.02)
    read, written, real = [], [], torch.cat

    def cat(parts: list[torch.Tensor]) -> torch.Tensor:
        result = real(parts)
        read.append(parts[0].data_ptr())
        written.append(result.data_ptr())
        return result

    monkeypatch.setattr(torch, "cat", cat)
    assert cpu_probe.copy_rate() > 1e6
    assert len(set(read)) == 32
    assert len(set(written[:32])) == 32


def test_reads_through_the_page_cache_are_called_so(shard, monkeypatch):
    monkeypatch.setattr(hardware_probe, "measure_read_rate", lambda *_: DriveRate(10**9, 1.0, False))
    rate, how = hardware_probe._drive_rate([shard], block_device_of(shard))
    assert rate == 1e9
    assert "page cache" in how and "direct reads" not in how


def test_measuring_and_its_temporary_file_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hardware_probe, "SAMPLE_BYTES", 16 << 20)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    monkeypatch.setattr(
        hardware_probe,
        "_measure",
        lambda paths, device: (cpu(drive_read=hardware_probe._drive_rate(paths, device)[0]), False),
    )
    with caplog.at_level(logging.INFO, "zinfer"):
        this_machine([str(tmp_path)])
    assert "measuring drive, memory and arithmetic" in caplog.text
    assert f"temporary file of 16 MiB in {tmp_path}" in caplog.text


MEMORY = 1 << 30
FOUND = {
    "device_memory": MEMORY,
    "device_bandwidth": 1e12,
    "host_to_device": 2e10,
    "matmul": {"bfloat16": [[1, 1e12], [512, 2e14]]},
    "copy_bandwidth": 9e11,
    "attention_bandwidth": 8e11,
    "operator_seconds": 1e-5,
}


@pytest.fixture
def device_measurements(monkeypatch) -> list[str]:
    """The device of each measurement, none of which takes time: each finds copies faster by 1 byte a second."""
    made: list[str] = []

    def measure(processor: StagedProcessor, when: str) -> object:
        made.append(processor.name)
        figures = FOUND | {"host_to_device": 2e10 + len(made)}
        return figures, dict.fromkeys(FIGURES, f"measured {when}"), False

    monkeypatch.setattr(hardware_probe, "measure_device", measure)
    return made


@pytest.fixture
def quickly(monkeypatch):
    """Measurements of a device in milliseconds, and in little memory."""
    for name, value in {
        "SECONDS": 0.002,
        "BATCH_SECONDS": 0.0005,
        "ROWS": (1, 8),
        "WIDTH": 512,
        "WORKING_SET": 4 << 20,
        "EXTENT_BYTES": 1 << 20,
        "ATTENTION": (2, 2, 64, 32),
    }.items():
        monkeypatch.setattr(device_probe, name, value)


def test_a_device_is_measured_through_its_processor(quickly, nothing_left):
    processor = StagedProcessor(MEMORY)
    figures, sources, _ = device_probe.measure_device(processor, "today")
    processor.close()
    assert set(figures) == set(sources) == set(FIGURES)
    assert figures["device_memory"] == MEMORY
    assert [rows for rows, _ in figures["matmul"]["float16"]] == [1, 8]
    assert set(figures["matmul"]) == {"bfloat16", "float16", "float32"}
    assert all(figures[name] > 0 for name in FIGURES if name != "matmul")
    assert "pageable" in sources["host_to_device"] and "today" in sources["host_to_device"]
    assert processor.memory() == (MEMORY, MEMORY), "what was measured with is given back"


def test_copies_are_timed_until_they_have_run(quickly):
    processor = StagedProcessor(MEMORY, delay=lambda kind: 0.01 if kind == "ordinary" else 0.0)
    rate, _ = device_probe._host_rate(processor)
    processor.close()
    assert rate < (1 << 20) / 0.01


def test_operators_are_timed_until_the_device_has_run_them(quickly, monkeypatch):
    """A device that runs behind the host: what was started has run only when a fence is reached."""
    processor = StagedProcessor(MEMORY)
    started, real = [], processor.fence

    def fence(stream: object) -> object:
        time.sleep(0.001 * len(started))
        started.clear()
        return real(stream)

    monkeypatch.setattr(processor, "fence", fence)
    times = device_probe._times(processor, started.append)
    processor.close()
    assert all(0.001 <= each < 0.1 for each in times)


def test_operators_run_where_the_processor_computes(quickly, monkeypatch):
    """On none but the device it names: here torch's meta device, which the host's own tensors are not on."""
    seen = set()
    processor = StagedProcessor(MEMORY)
    processor.torch_device = torch.device("meta")
    real = device_probe._product

    def product(x: torch.Tensor, weights: list[torch.Tensor], turn: int) -> torch.Tensor:
        seen.update({x.device.type, weights[0].device.type})
        return real(x, weights, turn)

    monkeypatch.setattr(device_probe, "_product", product)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, device: torch.empty(shape, device=device))
    device_probe._curve(processor, torch.bfloat16)
    assert seen == {"meta"}


def test_a_device_without_memory_to_measure_with_is_an_error_that_says_what_to_do(quickly, monkeypatch):
    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_probe, "_curve", none_left)
    with pytest.raises(BudgetError, match="end what else uses it"):
        device_probe.measure_device(StagedProcessor(MEMORY), "today")


def test_a_device_is_measured_once_beside_the_drive(shard, measurements, device_measurements):
    processor = StagedProcessor(MEMORY)
    assert measured_machine(shard, processor) is None
    found = this_machine([shard], processor)
    assert found.has_device and found.host_to_device == 2e10 + 1
    assert (found.drive_read, found.host_memory) == (1e9 + 1, cpu().host_memory)
    assert "staged" in found.name
    assert this_machine([shard], processor) == measured_machine(shard, processor) == found
    assert len(measurements) == len(device_measurements) == 1
    assert not this_machine([shard]).has_device, "the CPU's figures are as they were"
    assert this_machine([shard]).matmul == cpu().matmul
    assert this_machine([shard], processor, refresh=True).host_to_device == 2e10 + 2


CHANGES = ["device method", "device", "device memory", "driver", "runtime"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_device_is_measured_anew(
    shard, measurements, device_measurements, change, monkeypatch
):
    processor = StagedProcessor(MEMORY)
    this_machine([shard], processor)
    before = device_probe.device_conditions(processor)
    assert set(before) == set(CHANGES)
    monkeypatch.setattr(hardware_probe, "device_conditions", lambda _: before | {change: "another"})
    assert measured_machine(shard, processor) is None
    assert this_machine([shard], processor).host_to_device == 2e10 + 2
    assert len(measurements) == 1, "the drive is the same"


def test_a_change_of_torch_measures_the_device_anew_too(
    shard, measurements, device_measurements, monkeypatch
):
    processor = StagedProcessor(MEMORY)
    this_machine([shard], processor)
    before = hardware_probe._conditions()
    monkeypatch.setattr(hardware_probe, "_conditions", lambda: before | {"torch": "another"})
    assert this_machine([shard], processor).host_to_device == 2e10 + 2


def test_another_device_is_measured_and_the_first_is_not_forgotten(shard, measurements, device_measurements):
    first, second = StagedProcessor(MEMORY), StagedProcessor(MEMORY)
    second.name = "staged, too"
    assert this_machine([shard], first).host_to_device == 2e10 + 1
    assert this_machine([shard], second).host_to_device == 2e10 + 2
    assert this_machine([shard], first).host_to_device == 2e10 + 1
    assert device_measurements == ["staged", "staged, too"]


def test_what_was_measured_while_others_used_the_device_is_not_kept(shard, measurements, monkeypatch, caplog):
    monkeypatch.setattr(
        hardware_probe, "measure_device", lambda *_: (FOUND, dict.fromkeys(FIGURES, "measured"), True)
    )
    processor = StagedProcessor(MEMORY)
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert this_machine([shard], processor).has_device
    assert "--remeasure" in caplog.text
    assert measured_machine(shard, processor) is None


def test_an_implausible_figure_of_a_device_is_told_of_once(shard, measurements, monkeypatch, caplog):
    made = []

    def measure(*_: object) -> object:
        made.append(1)
        return FOUND | {"host_to_device": 5e3}, dict.fromkeys(FIGURES, "measured"), False

    monkeypatch.setattr(hardware_probe, "measure_device", measure)
    processor = StagedProcessor(MEMORY)
    with caplog.at_level(logging.WARNING, "zinfer"):
        found = this_machine([shard], processor)
    assert (found.host_to_device, caplog.text.count("not plausible")) == (1e8, 1)
    assert this_machine([shard], processor) == found
    assert len(made) == 1


@pytest.mark.parametrize("damage", [{"host_to_device": -1}, {"matmul": 7}, {"extra": 1}, {"sources": None}])
def test_a_damaged_record_of_a_device_is_told_of_and_measured_anew(
    shard, measurements, device_measurements, damage, caplog
):
    processor = StagedProcessor(MEMORY)
    this_machine([shard], processor)
    document = json.loads(cache_path().read_text())
    document["devices"]["staged"]["hardware"] |= damage
    cache_path().write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert this_machine([shard], processor).host_to_device == 2e10 + 2
    assert "measuring again" in caplog.text


def test_the_driver_is_part_of_what_figures_hold_for(tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text("NVRM version: 1.2.3\nGCC version: ...\n")
    monkeypatch.setattr(device_probe, "DRIVERS", (tmp_path / "none", version))
    assert device_probe.device_conditions(StagedProcessor(MEMORY))["driver"] == "NVRM version: 1.2.3"
    monkeypatch.setattr(device_probe, "DRIVERS", ())
    assert device_probe.device_conditions(StagedProcessor(MEMORY))["driver"] == ""
