"""What is behind a path: filesystem, block device, direct reads, and how fast they are."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from zinfer.aio import File
from zinfer.aio.block_device import BlockDevice, Mount, block_device_of, mount_of, read_mounts
from zinfer.aio.probe import BLOCK_BYTES, measure_read_rate
from zinfer.aio.profile import Profile, load_profile
from zinfer.errors import DriveError

SAMPLE_BYTES = 256 << 20  # of the temporary file that is measured
SMALLEST_SAMPLE = 32 << 20  # less says nothing
SPARE_SHARE = 4  # the temporary file takes at most 1/4 of the free space
SECONDS = 1.0  # of measuring


@dataclass(frozen=True)
class Drive:
    """`path` and what was found behind it.

    `kind`: "folder", "file", "missing" or "other". `measured`: what was read, in words, "" if nothing was;
    then `failure` says why, and `direct`, `alignment` (bytes) and `read_rate` (bytes a second) are None.
    `profile` is what aio_bench has kept of the device.
    """

    path: str
    kind: str
    writable: bool = False
    mount: Mount | None = None
    device: BlockDevice | None = None
    free: int | None = None
    measured: str = ""
    direct: bool | None = None
    direct_reason: str = ""
    alignment: int | None = None
    read_rate: float | None = None
    failure: str = ""
    profile: Profile | None = None


def look_at(path: str) -> Drive:
    """Look at `path` and measure plain direct reads there; never raises for what it finds."""
    try:
        status = os.stat(path)
    except OSError as error:
        return Drive(path, "missing", failure=f"{path}: {error.strerror}")
    folder, file = stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode)
    if not (folder or file):
        return Drive(path, "other", failure=f"{path}: neither a folder nor a regular file")
    try:
        mount = mount_of(os.path.realpath(path), read_mounts())
        found = Drive(
            path,
            "folder" if folder else "file",
            writable=_takes_files(path) if folder else os.access(path, os.W_OK),
            mount=mount,
            device=(device := block_device_of(path)),
            profile=load_profile(device),
            free=_free(path),
        )
        with _sample(found) as (paths, what):
            return _measure(found, paths, what)
    except OSError as error:  # DriveError is one
        reason = str(error) if isinstance(error, DriveError) else f"{path}: {error.strerror}"
        return replace(found, failure=reason)


def _takes_files(folder: str) -> bool:
    """Tried, because permission bits do not tell of read-only and virtual filesystems."""
    try:
        tempfile.TemporaryFile(dir=folder, prefix=".zinfer-doctor-").close()
    except OSError:
        return False
    return True


def _free(path: str) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize


@contextmanager
def _sample(drive: Drive) -> Iterator[tuple[list[str], str]]:
    """Files to read, and what they are: those given, the folder's shards, or a nameless temporary file."""
    if drive.kind == "file":
        yield [drive.path], "the file"
        return
    shards = sorted(
        entry.path
        for entry in os.scandir(drive.path)
        if entry.name.endswith(".safetensors") and entry.is_file() and entry.stat().st_size >= BLOCK_BYTES
    )
    if shards:
        yield shards, f"{len(shards)} shard(s)"
        return
    if not drive.writable:
        raise DriveError(
            f"{drive.path}: no shard in it to read and no file can be made there",
            drive.path,
            0,
            0,
            0,
            "probe",
        )
    nbytes = min(SAMPLE_BYTES, (drive.free or 0) // SPARE_SHARE // BLOCK_BYTES * BLOCK_BYTES)
    if nbytes < SMALLEST_SAMPLE:
        raise DriveError(
            f"{drive.path}: {drive.free} bytes free are too few for a temporary file to measure",
            drive.path,
            0,
            0,
            0,
            "probe",
        )
    with tempfile.TemporaryFile(dir=drive.path, prefix=".zinfer-doctor-") as file:
        block = os.urandom(BLOCK_BYTES - 8)  # not zeros: some drives do not store those
        for number in range(nbytes // BLOCK_BYTES):
            file.write(number.to_bytes(8, "little") + block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield [f"/proc/self/fd/{file.fileno()}"], f"a temporary file of {nbytes >> 20} MiB"


def _measure(drive: Drive, paths: list[str], what: str) -> Drive:
    file = File(paths[0])
    try:
        found = replace(drive, direct=file.direct, direct_reason=file.direct_reason, alignment=file.alignment)
    finally:
        file.close()
    rate = measure_read_rate(paths, SECONDS)
    return replace(found, measured=what, read_rate=rate.bytes_per_second)
