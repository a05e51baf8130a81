"""The block device behind a path, and what a profile of it is filed under. Only looks; opens no device."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_DEVICES = Path("/sys/dev/block")
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo; `number`: the filesystem's "major:minor"."""

    point: str
    filesystem: str
    device: str
    number: str = ""


@dataclass(frozen=True)
class BlockDevice:
    """What serves the reads of a path: a disk, a RAID set, or a filesystem with no device of its own.

    `key` names it across reboots, fit for a file name: model and serial number where it tells them. `disks`
    counts the drives that share its reads: the members of a RAID set, else 1. `rotational` is what it claims,
    `numa_node` where it is attached; None where there is nobody to ask. `number` tells mounted filesystems with no
    device of their own apart (NFS, tmpfs): two may well have one name and one key; "" for all others.
    """

    key: str
    name: str
    disks: int = 1
    rotational: bool | None = None
    numa_node: int | None = None
    number: str = ""


def block_device_of(path: str) -> BlockDevice:
    """The device behind the existing `path`. Raises OSError when there is no such path."""
    number = os.stat(path).st_dev
    mount = mount_of(os.path.realpath(path), read_mounts())
    numbers = [number]
    if mount and mount.device.startswith("/") and os.path.exists(mount.device):
        numbers.append(os.stat(mount.device).st_rdev)  # btrfs and its kind: files have a made-up st_dev
    for candidate in numbers:
        entry = BLOCK_DEVICES / f"{os.major(candidate)}:{os.minor(candidate)}"
        if entry.exists():
            return _describe(_whole(entry.resolve()))
    if mount is None:
        return BlockDevice(_file_name(f"device-{number}"), "unknown", number=str(number))
    key = _file_name(f"{mount.filesystem}-{mount.device}")
    return BlockDevice(key, mount.filesystem, number=mount.number)


def read_mounts() -> str:
    """The text of /proc/self/mountinfo, "" where there is none. Paths in it need not be UTF-8: as os.fsdecode has them.

    Raises OSError when it cannot be read, as where file descriptors have run out.
    """
    try:
        return os.fsdecode(MOUNTS.read_bytes())
    except FileNotFoundError:
        return ""


def mount_of(real_path: str, mountinfo: str) -> Mount | None:
    """The mount that `real_path` lies on, from the text of /proc/self/mountinfo (see proc(5))."""
    best: Mount | None = None
    for line in mountinfo.split("\n"):  # not splitlines: names hold what it takes for line ends
        left, dash, right = line.partition(" - ")
        if not dash:
            continue
        fields = left.split(" ")
        point = _unescape(fields[4])
        inside = real_path == point or real_path.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later hides the earlier.
        if inside and (best is None or len(point) >= len(best.point)):
            filesystem, device = right.split(" ")[:2]
            best = Mount(point, filesystem, _unescape(device), fields[2])
    return best


def _unescape(text: str) -> str:
    """An escape stands for a byte, not for a character: a name that is UTF-8 may have several in a row."""
    return os.fsdecode(
        re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text))
    )


def _whole(device: Path) -> Path:
    """The disk that a partition is part of."""
    return device.parent if (device / "partition").exists() else device


def _describe(device: Path) -> BlockDevice:
    rotational = _text(device / "queue" / "rotational")
    disks = list(_disks(device))
    nodes = {node for disk in disks if (node := _numa_node(disk)) is not None}
    return BlockDevice(
        _file_name("-".join([_identity(device), f"{int(_text(device / 'size') or 0) * 512}"])),
        device.name,
        len(set(disks)),
        None if not rotational else rotational == "1",
        nodes.pop() if len(nodes) == 1 else None,
    )


def _identity(device: Path) -> str:
    """What stays the same when drives are found in another order; else the kernel's name."""
    facts = ("device/model", "device/serial", "serial", "wwid", "device/wwid", "md/uuid", "dm/uuid")
    told = list(dict.fromkeys(text for fact in facts if (text := _text(device / fact))))
    return "-".join(told[:2]) or device.name


def _disks(device: Path) -> Iterator[Path]:
    """The physical drives below a mapped device or a RAID set; a disk is its own."""
    below = device / "slaves"
    members = sorted(below.iterdir()) if below.is_dir() else []
    if not members:
        yield device
    for member in members:
        yield from _disks(_whole(member.resolve()))


def _numa_node(disk: Path) -> int | None:
    """The first ancestor that names a node; -1 means none."""
    for place in (disk / "device").resolve(), *(disk / "device").resolve().parents:
        if text := _text(place / "numa_node"):
            return int(text) if int(text) >= 0 else None
    return None


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.strip()).strip("._-")[:128] or "unknown"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
