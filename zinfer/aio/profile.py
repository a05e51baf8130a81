"""What `aio_bench` found best for a drive, kept for zinfer to use: one small JSON file a block device.

The files lie in `$XDG_CACHE_HOME/zinfer/drives/` (by default `~/.cache/zinfer/drives/`); each may be deleted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zinfer.aio.block_device import BlockDevice

logger = logging.getLogger("zinfer")

SCHEMA = 1
Backend = Literal["io_uring", "libaio", "threads"]
BACKENDS: tuple[Backend, ...] = ("io_uring", "libaio", "threads")  # as the engine prefers them
MAX_DEPTH = 1024
MIN_BLOCK_BYTES = 4096  # no engine takes less
MAX_BLOCK_BYTES = 1 << 30
MAX_WORKERS = 256


@dataclass(frozen=True)
class Profile:
    """The setting that reads a drive best. Rates in bytes a second; None for what was not measured."""

    backend: Backend
    block_bytes: int
    depth: int
    workers: int
    read_rate: float | None
    write_rate: float | None
    measured: str  # ISO date and time

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that no engine takes."""
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r}")
        limits = {"block_bytes": MAX_BLOCK_BYTES, "depth": MAX_DEPTH, "workers": MAX_WORKERS}
        for name, most in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} {value!r}")
        if self.block_bytes < MIN_BLOCK_BYTES:
            raise ValueError(f"block_bytes {self.block_bytes}, less than {MIN_BLOCK_BYTES}")
        if self.block_bytes & (self.block_bytes - 1):
            raise ValueError(f"block_bytes {self.block_bytes}, not a power of two")
        for name in ("read_rate", "write_rate"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 < value < 1e15):
                raise ValueError(f"{name} {value!r}")
        if not isinstance(self.measured, str) or not self.measured.isprintable():
            raise ValueError(f"measured {self.measured!r}")


def profile_path(device: BlockDevice) -> Path:
    """Where the profile of `device` is, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "zinfer", "drives", f"{device.key}.json")


def load_profile(device: BlockDevice) -> Profile | None:
    """The saved profile of `device`, or None; one that cannot be used is logged and left alone."""
    path = profile_path(device)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}")
        return Profile(**document["profile"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("%s: not used (%s: %s); run aio_bench again", path, type(error).__name__, error)
        return None


def save_profile(device: BlockDevice, profile: Profile) -> Path:
    """Keep `profile` for `device`, in place of an older one; returns the file. Raises OSError."""
    path = profile_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "device": device.name, "profile": dataclasses.asdict(profile)}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        try:
            file.write(json.dumps(document, indent=2) + "\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path
