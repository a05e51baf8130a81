"""One entry of the store: its folder, its manifest, and the lock that keeps two writers apart.

nothing --write--> parts, journal --manifest.json--> complete --a file's size differs--> parts, journal

A striped entry that was begun has its folder on every path. Where one has gone, its drive is most likely not mounted:
to write the entry anew would fill whatever lies below the mount point, so that is an error.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from zinfer.errors import CheckpointError, StoreError
from zinfer.store.folder import describe, prepare_root, write_errors
from zinfer.store.part_file import hash_file, write_file
from zinfer.store.striped_file import check_fits, hash_striped
from zinfer.weights.checkpoint import is_inside, read_json
from zinfer.weights.packed import STRIPE, read_pack
from zinfer.weights.safetensors_header import quote

logger = logging.getLogger("zinfer")

SCHEMA = 1
MANIFEST = "manifest.json"
JOURNAL = MANIFEST + ".done"
WAIT_BEFORE_LOG = 1.0  # seconds


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file; `source_*` where it is a copy of one, `members` where it is striped."""

    size: int  # bytes
    sha256: str  # hex
    source_size: int | None = None  # bytes
    source_mtime_ns: int | None = None
    members: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what no file has."""
        numbers = [number for number in (self.source_size, self.source_mtime_ns) if number is not None]
        if not all(type(number) is int and abs(number) < 1 << 63 for number in (self.size, *numbers)):
            raise ValueError(f"sizes {quote(self.size)}, {quote(numbers)}")
        if type(self.members) is not int or self.members < 1:
            raise ValueError(f"members {quote(self.members)}")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 {quote(self.sha256)}")


class Entry:
    """The entry for the source with `identity` (sha256 hex) in the stores at `roots`. Holds nothing open.

    `folder`, in the first of them, has everything but the members of striped shards, which lie in all `folders`.
    Raises OptionError for paths too long to be striped over.
    """

    def __init__(self, roots: Sequence[str], name: str, identity: str, kind: str, source: str) -> None:
        if len(roots) > 1:  # not to be taken for the plain entry, nor for that of other drives
            identity = hashlib.sha256(json.dumps([identity, STRIPE, *roots]).encode()).hexdigest()
        self.roots = tuple(roots)
        self.source = source
        self.folders = tuple(os.path.join(root, f"{name}-{identity[:12]}") for root in roots)
        self.folder = self.folders[0]
        if len(roots) > 1:
            check_fits(self.folders)
        self._about = {"schema": SCHEMA, "kind": kind, "source": source, "identity": identity}

    def obtain(self, write: Callable[[], dict[str, FileRecord]]) -> str:
        """The entry's folder, complete: as it is, or after `write` has written its files under the lock.

        `write` returns what it wrote, by file name relative to the folder. Raises StoreError, also where a drive
        of a striped entry seems not to be mounted.
        """
        if not self._is_complete(logging.DEBUG):  # what is wrong is said once, and not while others mend it
            self._check_mounted()
            for root in self.roots:
                prepare_root(root)
            with self._lock():
                if not self._is_complete(logging.WARNING):
                    for folder in self.folders:
                        with write_errors(folder, lambda: 0):
                            os.makedirs(folder, exist_ok=True)
                    with write_errors(self.folder, lambda: 0):
                        self._withdraw()
                    self._save(MANIFEST, write())
                    self._remove(JOURNAL)
        return self.folder

    def path(self, name: str) -> str:
        """Absolute path of the entry's file `name`."""
        return os.path.join(self.folder, name)

    def shard_paths(self, name: str) -> tuple[str, ...]:
        """Absolute paths of the members of the shard `name`: one where it is not striped."""
        return tuple(os.path.join(folder, name) for folder in self.folders)

    def done(self) -> dict[str, FileRecord]:
        """The files that an earlier, interrupted writing finished and that still have the right size."""
        records = _read_records(self.path(JOURNAL), self._about) or {}
        return {name: record for name, record in records.items() if not _fault(self.path(name), record)}

    def note(self, records: dict[str, FileRecord]) -> None:
        """Remember `records` as finished files, should this writing be interrupted."""
        self._save(JOURNAL, records)

    def clear(self) -> None:
        """Remove every file of the entry. Only under the lock, so only from `obtain`'s `write`."""
        for folder in self.folders:
            with write_errors(folder, lambda: 0), os.scandir(folder) as children:
                for child in children:
                    if child.is_dir(follow_symlinks=False):
                        shutil.rmtree(child.path)
                    else:
                        os.unlink(child.path)

    def _is_complete(self, level: int) -> bool:
        """Whether all is there; logs at `level` what is not as the manifest says."""
        records = _read_records(self.path(MANIFEST), self._about, level)
        for name, record in (records or {}).items():
            if fault := _fault(self.path(name), record):
                logger.log(level, "%s: %s; writing it anew", self.path(name), fault)
                return False
        return records is not None

    def _check_mounted(self) -> None:
        """Raise StoreError where striped files of this entry are known of and one of its folders has gone."""
        records = [
            record
            for name in (MANIFEST, JOURNAL)
            for record in (_read_records(self.path(name), self._about, logging.DEBUG) or {}).values()
        ]
        if not any(record.members > 1 for record in records):
            return
        for root, folder in zip(self.roots, self.folders, strict=True):
            if not os.path.isdir(folder):
                path = os.path.dirname(root)
                raise StoreError(
                    f"{folder}: not there, but {self.folder} is striped over it: is the drive mounted at {path}? "
                    f"mount it, or delete {self.folder} to have it written anew"
                )

    def _withdraw(self) -> None:
        """Make a damaged entry an unfinished one, whose sound files count as done."""
        if os.path.lexists(self.path(MANIFEST)):
            os.replace(self.path(MANIFEST), self.path(JOURNAL))

    def _save(self, name: str, records: dict[str, FileRecord]) -> None:
        files = {file: _fields(record) for file, record in sorted(records.items())}
        write_file(self.path(name), json.dumps({**self._about, "files": files}, indent=1).encode())

    def _remove(self, name: str) -> None:
        if os.path.lexists(self.path(name)):
            os.unlink(self.path(name))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self.folder + ".lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {describe(error)}; check its permissions") from error
        try:
            _flock(fd, path)
            try:
                yield
            finally:
                fcntl.flock(
                    fd, fcntl.LOCK_UN
                )  # closing would not do: a forked child may share the descriptor
        finally:
            os.close(fd)


def verify(entry: str) -> None:
    """Read every file of the store's entry in folder `entry` and compare it with the manifest.

    Raises StoreError naming the file that is missing, short or altered, or when the entry is incomplete.
    """
    records = _read_records(os.path.join(entry, MANIFEST), {"schema": SCHEMA})
    if records is None:
        raise StoreError(
            f"{entry}: no readable {MANIFEST} in it: not a complete entry of the store; write it again"
        )
    for name, record in records.items():
        path = os.path.join(entry, name)
        try:
            size, sha256 = _hash(path, record)
        except (OSError, CheckpointError) as error:
            raise StoreError(
                f"{path}: cannot be read: {error}; delete {entry} and let zinfer write it again"
            ) from error
        if (size, sha256) != (record.size, record.sha256):
            raise StoreError(
                f"{path}: damaged: {size} bytes with sha256 {sha256}, but {record.size} bytes with sha256 "
                f"{record.sha256} were written; delete {entry} and let zinfer write it again"
            )


def _read_records(
    path: str, about: dict[str, Any], level: int = logging.WARNING
) -> dict[str, FileRecord] | None:
    """The files a manifest lists; None where it is missing, malformed, or not `about` the same thing.

    Logs at `level` what is wrong with one that is there.
    """
    if not os.path.lexists(path):
        return None
    try:
        manifest = read_json(path)
        if any(manifest.get(key) != value for key, value in about.items()):
            raise ValueError(f"it is not about {about}")
        outside = [name for name in manifest["files"] if not is_inside(name)]
        if outside:
            raise ValueError(f"{quote(outside)} are no names of files in this folder")
        return {name: _record(record) for name, record in manifest["files"].items()}
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.log(level, "%s: not used: %s", path, error)
        return None


def _record(fields: dict[str, Any]) -> FileRecord:
    try:
        return FileRecord(**fields)
    except TypeError as error:  # whose text repeats a field's name as it is, and any name may be in a file
        raise ValueError(f"{quote(fields)} does not describe a file") from error


def _fields(record: FileRecord) -> dict[str, Any]:
    fields = asdict(record)
    if record.members == 1:
        del fields["members"]
    return fields


def _hash(path: str, record: FileRecord) -> tuple[int, str]:
    if record.members == 1:
        return hash_file(path)
    pack = read_pack(path)
    if pack is None:
        raise CheckpointError("its header is gone")
    return hash_striped(pack.members, pack.geometry)


def _fault(path: str, record: FileRecord) -> str:
    """What is wrong with the file, as far as its size, or its members' headers and sizes, tell; "" where nothing is."""
    try:
        if record.members == 1:
            size = os.stat(path).st_size
        elif not os.path.lexists(path):
            return "is missing"
        elif (pack := read_pack(path)) is None:
            return "its header is gone"
        elif len(pack.members) != record.members:
            return f"has {len(pack.members)} members, not {record.members}"
        else:
            size = pack.size
    except CheckpointError as error:
        told = str(error).rsplit("; ", 1)[0]  # without the remedy, which is under way
        return f"its members are not all there and of one set ({told})"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return "is missing"
        raise StoreError(f"{path}: cannot be looked at: {describe(error)}; check the drive") from error
    return "" if size == record.size else f"has {size} bytes, not {record.size}"


def _flock(fd: int, path: str) -> None:
    """Take the lock; say so once when another process holds it for longer than WAIT_BEFORE_LOG."""
    started = time.monotonic()
    try:
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - started > WAIT_BEFORE_LOG:
                    logger.warning(
                        "%s: waiting for another process that writes this entry of the store", path
                    )
                    return fcntl.flock(fd, fcntl.LOCK_EX)
            time.sleep(0.02)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be locked: {describe(error)}; give an nvme_path on a local drive"
        ) from error
