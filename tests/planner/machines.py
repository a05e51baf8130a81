"""Made-up machines in round numbers."""

from __future__ import annotations

from typing import Any

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
