"""Memory sizes: parsing them, and what the machine and its cgroup have free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from zinfer.errors import OptionError
from zinfer.wording import brief

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("", 1024))
}
CGROUP_ROOT = Path("/sys/fs/cgroup")


def parse_size(size: int | str) -> int:
    """Bytes from 3221225472, "3GiB" (1024-based), "3GB" (1000-based) or "3G" (1024-based).

    Raises OptionError for anything else, negative and zero sizes included.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if match and match[2].upper() in _UNITS and (count := int(float(match[1]) * _UNITS[match[2].upper()])):
        return count
    raise OptionError(f"{brief(size)} is not a memory size; write bytes, or for example '3GiB' or '500MB'")


def ceilings(max_memory: Mapping[Any, Any] | None, device: int | None) -> tuple[int | None, int | None]:
    """The ceilings of the host and of the device number `device` (None: the CPU computes), in bytes.

    None where the user set none. Keys are "cpu", and for the device its number or torch's name of it. Raises
    OptionError for others.
    """
    if max_memory is None:
        return None, None
    example = "{'cpu': '8GiB'}" if device is None else f"{{'cpu': '64GiB', {device}: '20GiB'}}"
    if not isinstance(max_memory, Mapping):
        raise OptionError(f"max_memory is {brief(max_memory)}; give a mapping such as {example}")
    names = () if device is None else (device, f"cuda:{device}", *(("cuda",) if device == 0 else ()))
    unknown = [key for key in max_memory if key != "cpu" and (isinstance(key, bool) or key not in names)]
    if unknown:
        what = "the CPU: only 'cpu' has an effect" if device is None else f"device {device}: give {example}"
        raise OptionError(f"max_memory has entries for {brief(unknown)}, but this model computes on {what}")
    given = [key for key in max_memory if key != "cpu"]
    if len(given) > 1:
        raise OptionError(f"max_memory names device {device} twice, as {brief(given)}")
    host = parse_size(max_memory["cpu"]) if "cpu" in max_memory else None
    return host, parse_size(max_memory[given[0]]) if given else None


def total_memory() -> int:
    """Bytes that this process could ever have: the machine's, or its cgroup's limit if that is less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_limits())])


def free_memory() -> int:
    """Bytes that can still be allocated: by the machine's account and by every cgroup above this process.

    Page cache that the kernel can drop at once (inactive file pages) counts as free.
    """
    return max(
        0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroup_limits())])
    )


def process_peak() -> int:
    """Peak resident memory of this process in bytes (VmHWM)."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every memory cgroup, v1 or v2, from this process's up to the root."""
    limits = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, limit_file, usage_file = (
                [CGROUP_ROOT, CGROUP_ROOT / "unified"],
                "memory.max",
                "memory.current",
            )
        elif "memory" in controllers.split(","):
            mounts, limit_file, usage_file = (
                [CGROUP_ROOT / "memory"],
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            while True:
                limit, used = _number(folder / limit_file), _number(folder / usage_file)
                if limit is not None and used is not None and limit < 1 << 60:
                    limits.append((limit, used - _reclaimable(folder / "memory.stat")))
                if folder == mount or mount not in folder.parents:
                    break
                folder = folder.parent
    return limits


def _reclaimable(stat: Path) -> int:
    fields = dict(line.split(" ", 1) for line in _lines(stat) if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if os.access(path, os.R_OK) else []
