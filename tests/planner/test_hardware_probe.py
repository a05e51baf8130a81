"""The machine at hand: measured once, kept, and measured again when something has changed."""

from __future__ import annotations

import json
import logging

import pytest

from tests.planner.machines import cpu
from zinfer import hardware_probe
from zinfer.aio.block_device import block_device_of
from zinfer.aio.profile import Profile, save_profile
from zinfer.errors import OptionError
from zinfer.hardware_probe import cache_path, this_machine


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
        return cpu(drive_read=1e9 + len(made))

    monkeypatch.setattr(hardware_probe, "_measure", measure)
    return made


def test_the_machine_is_measured_as_it_is(shard, monkeypatch):
    monkeypatch.setattr(hardware_probe, "SECONDS", 0.005)
    monkeypatch.setattr(hardware_probe, "WORKING_SET", 16 << 20)
    monkeypatch.setattr(hardware_probe, "ROWS", (1, 8))
    monkeypatch.setattr(hardware_probe, "WIDTH", 512)
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
    assert record["measured"] and set(record["conditions"]) == {"torch", "threads", "memory"}


@pytest.mark.parametrize("change", ["torch", "threads", "memory"])
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
    "text", ["", "[]", '{"schema": 0, "drives": {}}', '{"schema": 1, "drives": []}', "{"]
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
    monkeypatch.setattr(hardware_probe, "_curve", lambda _: (((1, 1e10),), True))
    monkeypatch.setattr(hardware_probe, "SECONDS", 0.001)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    with caplog.at_level(logging.WARNING, "zinfer"):
        this_machine([shard])
    assert "other programs were computing" in caplog.text
    assert "--remeasure" in caplog.text
