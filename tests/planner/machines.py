"""Made-up machines in round numbers."""

from __future__ import annotations

from typing import Any

import pytest

from zinfer import cpu_probe, device_probe, hardware_probe
from zinfer.planner.hardware import Hardware, hardware_from

GB = 10**9
CPU: dict[str, Any] = {
    "name": "a made-up CPU",
    "drive_read": 1e9,
    "host_memory": 16 * GB,
    "host_bandwidth": 2e10,
    "device_memory": 0,
    "device_bandwidth": 0,
    "host_to_device": 0,
    "matmul": {"float32": [[1, 1e10], [16, 1.6e11], [256, 4e11]]},
}
GPU: dict[str, Any] = CPU | {
    "name": "a made-up GPU",
    "device_memory": 8 * GB,
    "device_bandwidth": 1e12,
    "host_to_device": 1e10,
    "matmul": {"float32": [[1, 1e13]]},
    "efficiency": 0.5,
}


def cpu(**changes: Any) -> Hardware:
    return hardware_from(CPU | changes, "test")


def gpu(**changes: Any) -> Hardware:
    return hardware_from(GPU | changes, "test")


def measure_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What zinfer measures of this machine, and of a device, takes next to no time, and means nothing."""
    for module in (cpu_probe, device_probe):
        monkeypatch.setattr(module, "SECONDS", 0.002)
        monkeypatch.setattr(module, "ROWS", (1, 8))
        monkeypatch.setattr(module, "WIDTH", 512)
        monkeypatch.setattr(module, "WORKING_SET", 4 << 20)
        monkeypatch.setattr(module, "ATTENTION", (2, 2, 64, 32))
        monkeypatch.setattr(module, "BUSY", 1e9)  # else what was measured beside other tests is not kept
    monkeypatch.setattr(cpu_probe, "BEYOND", 0)
    monkeypatch.setattr(cpu_probe, "LEAST_SET", 4 << 20)
    monkeypatch.setattr(cpu_probe, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(hardware_probe, "BUSY_PERCENT", 101)
    monkeypatch.setattr(hardware_probe, "BUSY_SECONDS", 0.001)
    monkeypatch.setattr(hardware_probe, "DRIVE_SECONDS", 0.03)
    monkeypatch.setattr(hardware_probe, "WINDOW_BYTES", 8 << 20)
    monkeypatch.setattr(hardware_probe, "SAMPLE_BYTES", 8 << 20)
    monkeypatch.setattr(device_probe, "BATCH_SECONDS", 0.0)
    monkeypatch.setattr(device_probe, "LEAST_BATCHES", 2)
    monkeypatch.setattr(device_probe, "EXTENT_BYTES", 1 << 20)
    monkeypatch.setattr(device_probe, "RESULT_BYTES", 1 << 20)
