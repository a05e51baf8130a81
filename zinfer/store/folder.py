"""The folder the store owns under `nvme_path`: is it there, can it be written, has it room?"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from zinfer.errors import OptionError, StoreError, ZinferError

STORE_NAME = "zinfer-store"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def store_roots(nvme_path: str | Sequence[str]) -> tuple[str, ...]:
    """Absolute paths of the stores under `nvme_path`, one folder or several; the stores need not exist yet.

    Raises OptionError for no folder or one named twice, StoreError for what is not an existing folder.
    """
    paths = (nvme_path,) if isinstance(nvme_path, str) else tuple(nvme_path)
    if not paths:
        raise OptionError("nvme_path is an empty list; name the folders to stripe over, or leave it out")
    roots = tuple(map(_store_root, paths))
    if len(roots) == 1:
        return roots
    roots = tuple(map(os.path.realpath, roots))  # members find each other by these paths, whatever the links
    for root, path in zip(roots, paths, strict=True):
        if roots.count(root) > 1:
            raise OptionError(f"nvme_path names the folder {path!r} twice; give each drive's folder once")
    return roots


def _store_root(nvme_path: str) -> str:
    nvme_path = os.path.abspath(nvme_path)
    if not os.path.lexists(nvme_path):
        raise StoreError(f"nvme_path {nvme_path!r} does not exist; mount the drive, or mkdir -p {nvme_path}")
    if not os.path.isdir(nvme_path):
        raise StoreError(f"nvme_path {nvme_path!r} is not a folder; give a folder on the NVMe drive")
    return os.path.join(nvme_path, STORE_NAME)


def device_of(root: str) -> int:
    """The `st_dev` of the filesystem that files written to the store at `root` will lie on."""
    return os.stat(root if os.path.isdir(root) else os.path.dirname(root)).st_dev


def prepare_root(root: str) -> None:
    """Create the store's folder `root` where it is missing and find out by trying that it can be written.

    Raises StoreError naming the folder, the errno and the remedy.
    """
    try:
        with suppress(FileExistsError):
            os.mkdir(root)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise StoreError(
            f"{root}: cannot write there: {describe(error)}; give an nvme_path on a drive with room, that "
            "this user may write to"
        ) from error


def free_bytes(path: str) -> int:
    """Bytes an unprivileged process may still write to the filesystem that holds, or would hold, `path`."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require_space(roots: Sequence[str], needed: Sequence[int], what: str) -> None:
    """Raise StoreError unless in the store at each of `roots` as many bytes as `needed` of it are free for `what`.

    Stores on one filesystem share what is free there.
    """
    filesystems: dict[int, tuple[str, int]] = {}
    for root, share in zip(roots, needed, strict=True):
        first, before = filesystems.get(device_of(root), (root, 0))
        filesystems[device_of(root)] = first, before + share
    for root, share in filesystems.values():
        free = free_bytes(root)
        if share > free:
            raise StoreError(
                f"{root}: writing {what} needs {share} bytes ({share / 1e9:.1f} GB) but {free} bytes "
                f"({free / 1e9:.1f} GB) are free; free {share - free} bytes, delete entries of the store "
                "that are no longer used, or give an nvme_path on a larger drive"
            )


@contextmanager
def write_errors(path: str, missing: Callable[[], int]) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError about `path`; `missing()`: bytes still to write."""
    try:
        yield
    except ZinferError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise StoreError(
                f"{path}: cannot be written: {describe(error)}; check the drive and the folder's permissions"
            ) from error
        free = free_bytes(path)
        raise StoreError(
            f"{path}: the drive is full ({describe(error)}): {missing()} bytes of this file are still to "
            f"be written, {free} bytes are free; free space, or choose a larger drive for nvme_path"
        ) from error


def describe(error: OSError) -> str:
    """`error` in words with its symbolic errno, such as "No space left on device (ENOSPC)"."""
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'no errno')})"
