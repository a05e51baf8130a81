"""Measure the machine at hand for the planner, in a few seconds, and keep the figures.

Here are the drive, and what is kept; cpu_probe.py measures arithmetic and memory, device_probe.py a device.

The figures are kept (see hardware_cache.py), one record a drive; a record counts while processor, torch, its thread
count, transformers, the memory and the drive are the same, and figures are measured in the same way. So are those of a
device with memory of its own, while the device and its driver are the same too. What was measured while other programs
computed is not kept.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from zinfer import cpu_probe
from zinfer.aio.block_device import BlockDevice, block_device_of
from zinfer.aio.probe import BLOCK_BYTES, measure_read_rate
from zinfer.aio.profile import load_profile
from zinfer.aio_bench.target import made_targets
from zinfer.device.processor import Processor
from zinfer.device_probe import FIGURES, device_conditions, measure_device
from zinfer.errors import DriveError, OptionError, StoreError
from zinfer.hardware_cache import cache_path, load, save
from zinfer.planner.hardware import FLOPS_RANGE, RANGES, WITHOUT_DEVICE, Hardware, hardware_from
from zinfer.planner.memory import free_memory, total_memory

logger = logging.getLogger("zinfer")

METHOD = 2  # raised whenever a figure is measured in another way: older ones do not count
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DRIVE_SECONDS, DRIVE_TIMES = 1.5, 5
WINDOW_BYTES = 256 << 20
SAMPLE_BYTES = 256 << 20  # of the temporary file that is read where there is no checkpoint and no profile
CPU_INFO = Path("/proc/cpuinfo")
BUSY_PERCENT, BUSY_SECONDS = 25, 0.2  # of all cores, used by others before anything is measured
MEASURED = (
    "drive_read",
    "host_bandwidth",
    "device_bandwidth",
    "host_to_device",
    "copy_bandwidth",
    "attention_bandwidth",
    "operator_seconds",
)


def this_machine(
    paths: Sequence[str], processor: Processor | None = None, *, refresh: bool = False
) -> Hardware:
    """The machine at hand, with the drive that `paths` lie on: shards, or else a folder. `processor`: what computes.

    From the cache, unless `refresh` or something has changed since. What is measured while other programs compute
    is not kept. Raises OptionError where a path is gone, DriveError or StoreError where the drive cannot be read, or
    takes no file to read, and BudgetError where the device has no memory left to measure with.
    """
    try:
        device = block_device_of(paths[0])
    except OSError as error:
        raise OptionError(
            f"{paths[0]}: {error.strerror}: the drive to plan for is gone; mount it, or name a hardware profile"
        ) from error
    conditions = _conditions()
    records = {} if refresh else load("drives")
    found = _usable(records.get(device.key), conditions)
    if found is None:
        logger.info("measuring drive, memory and arithmetic of this machine: a few seconds")
        measured, busy = _measure(paths, device)
        found = _plausible(measured)
        if not busy:
            save("drives", device.key, _record(conditions, found.as_dict()))
    if processor is not None:
        found = _with_device(found, processor, refresh=refresh)
    return _with_profile(found, device)


def measured_machine(path: str, processor: Processor | None = None) -> Hardware | None:
    """What this_machine() measured earlier, for the drive that `path` lies on; None where it has not, or not so."""
    try:
        device = block_device_of(path)
    except OSError:
        return None
    found = _usable(load("drives").get(device.key), _conditions())
    if found is not None and processor is not None:
        found = _kept_device(found, processor)
    return None if found is None else _with_profile(found, device)


def _with_device(machine: Hardware, processor: Processor, *, refresh: bool) -> Hardware:
    """`machine` with what computes on `processor` there, measured where it was not before."""
    found = None if refresh else _kept_device(machine, processor)
    if found is None:
        logger.info("measuring %s: a few seconds", processor.name)
        figures, sources, busy = measure_device(processor, _now())
        if busy:
            logger.warning(
                "the times of %s vary as they do when others use it too, so predictions may be too slow, and the "
                "figures are not kept: measure again when it is idle, with remeasure=True (`zinfer plan --remeasure`)",
                processor.name,
            )
        found = _plausible(Hardware(**_on_device(machine, processor, figures, sources)))
        if not busy:
            fields = found.as_dict()
            kept = {name: fields[name] for name in FIGURES}
            kept["sources"] = {name: fields["sources"][name] for name in FIGURES}
            save("devices", processor.name, _record(_conditions_of(processor), kept))
    return found


def _kept_device(machine: Hardware, processor: Processor) -> Hardware | None:
    record = load("devices").get(processor.name)
    if not isinstance(record, dict) or record.get("conditions") != _conditions_of(processor):
        return None
    try:
        fields = dict(record["hardware"])
        sources = fields.pop("sources")
        if set(fields) != set(FIGURES):
            raise OptionError(f"{cache_path()}: the figures of {processor.name} are not those of a device")
        return hardware_from(
            _on_device(machine, processor, fields, sources), f"{cache_path()}, {processor.name}"
        )
    except (OptionError, TypeError, ValueError, KeyError) as error:
        logger.warning("%s; measuring again", error)
        return None


def _on_device(
    machine: Hardware, processor: Processor, figures: dict[str, Any], sources: dict[str, str]
) -> dict[str, Any]:
    """The fields of `machine` with those of a device."""
    fields = machine.as_dict()
    name, where = f"{machine.name}, {processor.name}", fields["sources"] | sources
    return fields | figures | {"name": name, "sources": where}


def _record(conditions: dict[str, Any], hardware: dict[str, Any]) -> dict[str, Any]:
    return {"conditions": conditions, "measured": _now(), "hardware": hardware}


def _conditions_of(processor: Processor) -> dict[str, Any]:
    return _conditions() | device_conditions(processor)


def _conditions() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "method": METHOD,
        "cpu": _cpu_model(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "memory": total_memory(),
    }


def _cpu_model() -> str:
    """What the processor calls itself; its architecture where it does not."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _usable(record: Any, conditions: dict[str, Any]) -> Hardware | None:
    if not isinstance(record, dict) or record.get("conditions") != conditions:
        return None
    try:
        return hardware_from(record.get("hardware"), str(cache_path()))
    except OptionError as error:
        logger.warning("%s; measuring again", error)
        return None


def _measure(paths: Sequence[str], device: BlockDevice) -> tuple[Hardware, bool]:
    """The figures, and whether other programs were computing meanwhile."""
    width, curves, busy = cpu_probe.WIDTH, {}, psutil.cpu_percent(BUSY_SECONDS) > BUSY_PERCENT
    for name, dtype in DTYPES.items():
        curves[name], disturbed = cpu_probe.linear_curve(dtype)
        busy = busy or disturbed
    if busy:
        logger.warning(
            "other programs were computing while this machine was measured, so predictions may be too slow, and the "
            "figures are not kept: measure again when it is quiet, with remeasure=True (`zinfer plan --remeasure`)"
        )
    # One row reads each weight once, for 2 flops an element.
    matvec = max(curves[name][0][1] * dtype.itemsize / 2 for name, dtype in DTYPES.items())
    rate, how = _drive_rate(paths, device)
    measured = f"measured {_now()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    found = Hardware(
        name="this machine",
        drive_read=rate,
        host_memory=total_memory(),
        host_bandwidth=matvec,
        device_memory=0,
        device_bandwidth=0,
        host_to_device=0,
        matmul=curves,
        copy_bandwidth=cpu_probe.copy_rate(),
        attention_bandwidth=cpu_probe.attention_rate(),
        operator_seconds=cpu_probe.operator_seconds(),
        sources={
            "drive_read": how,
            "host_memory": "the machine's, or its memory cgroup's limit",
            "host_bandwidth": f"{measured}: matrix times vector, working set beyond the caches",
            "copy_bandwidth": f"{measured}: tensors of {cpu_probe.COPY_BYTES >> 20} MiB joined, as a cache grows, "
            "working set beyond the caches",
            "attention_bandwidth": f"{measured}: one query a head over caches of keys and values, "
            "working set beyond the processor's caches",
            "operator_seconds": f"{measured}: a decoding step of a transformer with hardly any weights",
            "matmul": f"{measured}: products with {width} x {width} weights, working set beyond the caches",
        },
    )
    return found, busy


def _drive_rate(paths: Sequence[str], device: BlockDevice) -> tuple[float, str]:
    profile = load_profile(device)
    if profile is not None and profile.read_rate is not None:
        return profile.read_rate, f"{device.name}: aio_bench's profile of {profile.measured}"
    files = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) >= BLOCK_BYTES]
    if files:
        rate, how = _read_rate(files)
        return rate, f"{device.name}: {how} of the checkpoint, {_now()}"
    folder = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(os.path.abspath(paths[0]))
    logger.info("measuring the drive with a temporary file of %d MiB in %s", SAMPLE_BYTES >> 20, folder)
    try:
        with made_targets([folder], SAMPLE_BYTES) as (target,):
            rate, how = _read_rate([target.path])
    except StoreError as error:
        raise StoreError(
            f"{error}; run `aio_bench` on the drive to plan for, which keeps a profile"
        ) from error
    except DriveError as error:
        raise OptionError(f"{error}; name a hardware profile instead of 'this'") from error
    return rate, f"{device.name}: {how} of a temporary file, {_now()}"


def _read_rate(files: Sequence[str]) -> tuple[float, str]:
    """Bytes a second into as much memory as a window is, and what kind of reads they were.

    What stays in a processor's cache can come faster; what the page cache holds is no drive's speed at all.
    """
    memory = min(WINDOW_BYTES, free_memory() // 8)
    found = [measure_read_rate(files, DRIVE_SECONDS / DRIVE_TIMES, memory) for _ in range(DRIVE_TIMES)]
    direct = all(each.direct for each in found)
    how = "direct reads" if direct else "reads through the page cache, as it takes no direct ones,"
    return statistics.median(each.bytes_per_second for each in found), how


def _plausible(measured: Hardware) -> Hardware:
    """`measured`, its rates brought into the ranges that the cache is read back with: else it would never be used.

    What was changed is told, and stands in the sources.
    """
    fields = measured.as_dict()

    def within(name: str, value: float, least: float, most: float) -> float:
        taken = min(max(value, least), most)
        if taken != value:
            remark = f"measured {value:g}, which is not plausible; taken as {taken:g}"
            logger.warning("%s of this machine: %s", name, remark)
            fields["sources"][name] = f"{fields['sources'].get(name, '')} ({remark})"
        return taken

    for name in MEASURED:
        none_there = name in WITHOUT_DEVICE and not measured.has_device
        if (value := fields[name]) is not None and not none_there:
            fields[name] = within(name, value, *RANGES[name][:2])
    for points in fields["matmul"].values():
        for point in points:
            point[1] = within("matmul", point[1], *FLOPS_RANGE)
    return hardware_from(fields, "this machine, as measured")


def _with_profile(found: Hardware, device: BlockDevice) -> Hardware:
    """`found` with the read rate that aio_bench has kept meanwhile: it is measured with more care."""
    profile = load_profile(device)
    if profile is None or profile.read_rate is None:
        return found
    least, most, _ = RANGES["drive_read"]
    if not least <= profile.read_rate <= most:
        return found
    fields = found.as_dict()
    fields["drive_read"] = profile.read_rate
    fields["sources"]["drive_read"] = f"{device.name}: aio_bench's profile of {profile.measured}"
    return hardware_from(fields, "aio_bench's profile")


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
