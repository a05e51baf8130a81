"""The block device under a path: what it is, and how many bytes it has moved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import BenchmarkError

SECTOR_BYTES = 512  # the unit of /proc/diskstats, whatever the drive's own sector
KINDS = {"nvme": "nvme", "vd": "virtio", "sd": "scsi", "xvd": "xen", "dm-": "mapped", "md": "raid"}


@dataclass(frozen=True)
class Traffic:
    """Bytes since boot, or between two readings."""

    read: int
    written: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.read - earlier.read, self.written - earlier.written)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Drive:
    """A device, or a partition of one, that /proc/diskstats counts."""

    name: str
    filesystem: str

    @property
    def kind(self) -> str:
        """A word for file names: nvme, virtio, scsi ..."""
        return next((word for start, word in KINDS.items() if self.name.startswith(start)), "drive")

    def traffic(self) -> Traffic:
        """Bytes moved since boot, by everyone."""
        for line in Path("/proc/diskstats").read_text().splitlines():
            fields = line.split()
            if fields[2] == self.name:
                return Traffic(int(fields[5]) * SECTOR_BYTES, int(fields[9]) * SECTOR_BYTES)
        raise BenchmarkError(f"{self.name} has gone from /proc/diskstats")

    def describe(self) -> str:
        """Kind, size, model where it tells one, and filesystem."""
        block = Path(f"/sys/class/block/{self.name}")
        size = int((block / "size").read_text()) * SECTOR_BYTES
        device = block if (block / "device").exists() else block.resolve().parent
        model = _text(device / "device" / "model")
        return f"{self.kind}{f' {model}' if model else ''}, {size / 1e9:.0f} GB, {self.filesystem}"


def drive_of(path: str) -> Drive:
    """The drive that holds `path`. Raises BenchmarkError where none is counted (tmpfs, network, overlay)."""
    from zinfer.aio.block_device import Mount, mount_of, read_mounts  # peers' venvs have no zinfer

    mounted = mount_of(os.path.realpath(path), read_mounts()) or Mount("/", "unknown", "none")
    candidates = [os.stat(path).st_dev]
    if os.path.exists(mounted.device):
        candidates.append(os.stat(mounted.device).st_rdev)  # btrfs and the like have a made-up st_dev
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if os.makedev(int(fields[0]), int(fields[1])) in candidates:
            return Drive(fields[2], mounted.filesystem)
    raise BenchmarkError(
        f"{path} lies on {mounted.filesystem} ({mounted.device}), whose traffic the kernel does not count: "
        "put it on a filesystem that lies on a local drive"
    )


def process_traffic() -> Traffic:
    """Bytes that this process had the drives move for it, whatever its neighbours did meanwhile."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return Traffic(int(fields["read_bytes"]), int(fields["write_bytes"]))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
