"""What a failed read or write tells: path, offset, length, cause, backend and remedy."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from zinfer.errors import DriveError


class Failure(NamedTuple):
    """The arguments of a DriveError. A request keeps this: each `wait` raises an exception of its own."""

    message: str
    path: str
    offset: int
    length: int
    errno: int
    backend: str

    def error(self) -> DriveError:
        """The exception to raise."""
        return DriveError(*self)


def transfer_failure(
    path: str, offset: int, length: int, code: int, backend: str, *, writing: bool, direct: bool
) -> Failure:
    """One read or write of `length` bytes failed with errno `code`."""
    message = (
        f"{path}: {'writing' if writing else 'reading'} {length} bytes at offset {offset} failed: "
        f"{os.strerror(code)} (errno {code}, backend {backend}, {'O_DIRECT' if direct else 'buffered'}); "
        f"{_remedy(code, writing, direct)}"
    )
    return Failure(message, path, offset, length, code, backend)


def ended_early(path: str, offset: int, length: int, ended_at: int, backend: str) -> Failure:
    """The file holds fewer bytes than were wanted; `ended_at` is the first offset that has none."""
    message = (
        f"{path}: reading {length} bytes at offset {offset} failed: file ended early at {ended_at} "
        f"(backend {backend}); it was truncated while open: restore the file and reopen it"
    )
    return Failure(message, path, offset, length, 0, backend)


def _remedy(code: int, writing: bool, direct: bool) -> str:
    what = "write" if writing else "read"
    if code == errno.EINVAL and direct:
        return f'the file system refused an aligned O_DIRECT {what}: open the file with direct="off"'
    if code == errno.EINVAL:
        return f"the file system refused the {what}: use a local drive"
    if code == errno.EIO:
        then = "write the file again, on another drive" if writing else "restore the file"
        return f"the drive reported a fault: look at `dmesg` and `smartctl -a`, then {then}"
    if code == errno.EFAULT:
        end = "the source is not readable" if writing else "the destination is not writable"
        return f"{end} memory: check the address and its length"
    if code in (errno.ENOMEM, errno.EAGAIN):
        return f"the kernel has no memory for the {what}: lower depth or block_bytes, or free memory"
    if code == errno.ECANCELED:
        return f"submit the {what} again if the bytes are still wanted"
    if code in (errno.EPERM, errno.ENOSYS):
        return 'the kernel, or a container\'s seccomp profile, refuses such calls: use backend="threads"'
    if code in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the drive, or its quota, is full: free space or choose another folder, then write the file again"
        )
    if code == errno.EFBIG:
        return "files may not be that long here: look at `ulimit -f` and the file system's limit"
    if code in (errno.ESTALE, errno.ENODEV):
        return "the drive or share has gone: mount it again and reopen the file"
    return f"check that the drive is mounted and the file is {'writable' if writing else 'readable'}"
