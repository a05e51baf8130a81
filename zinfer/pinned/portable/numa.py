"""Which NUMA nodes there are; placing memory on one takes the compiled module."""

from __future__ import annotations

from pathlib import Path


def online_nodes(path: str = "/sys/devices/system/node/online") -> list[int]:
    """The nodes in a list such as "0-1,3"; [0] where the kernel does not tell."""
    try:
        ranges = [part.split("-") for part in Path(path).read_text().strip().split(",") if part]
    except OSError:
        return [0]
    return [node for ends in ranges for node in range(int(ends[0]), int(ends[-1]) + 1)] or [0]
