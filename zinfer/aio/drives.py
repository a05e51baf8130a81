"""The files of one model and the engines that read them: one engine for each block device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from zinfer.aio import Engine, File
from zinfer.aio.block_device import BlockDevice, block_device_of
from zinfer.aio.joint import JointRequest, Waitable
from zinfer.aio.profile import Profile, load_profile
from zinfer.aio.remedy import descriptor_remedy
from zinfer.aio.settings import Settings, divide_bounce, settings_for
from zinfer.errors import DriveError, OptionError

logger = logging.getLogger("zinfer")

Extent = tuple[File, int, int, int, bool]
FIGURES = (
    *("requests", "pieces", "bytes_requested", "bytes_transferred"),
    *("bounced_bytes", "retries", "errors", "busy_seconds"),
)


@dataclass(frozen=True)
class DriveSettings:
    """What the engine of one device settled for; `measured`: by aio_bench, whose profile says so.

    `read_rate`: bytes a second that aio_bench read with these settings, if it did.
    """

    device: str
    settings: Settings
    measured: bool
    read_rate: float | None = None

    def __str__(self) -> str:
        used = self.settings
        size = (
            f"{used.block_bytes >> 20} MiB"
            if used.block_bytes >= 1 << 20
            else f"{used.block_bytes / 1024:g} KiB"
        )
        return f"{self.device}: {used.backend}, depth {used.depth}, blocks of {size}" + (
            " (measured by aio_bench)" if self.measured else ""
        )


class Drives:
    """Opens files for reading and routes each read to the engine of the block device that the file lies on.

    `paths` are all the files there will be; all engines together map at most `bounce_bytes` of bounce memory.
    Which files share a device is decided by device numbers, not by paths: partitions of one disk share an engine,
    so do folders of one filesystem. Owns files and engines until `close`. Any thread may call any method.

    Raises DriveError for a file that cannot be opened or whose drive cannot be told, and BudgetError for more drives
    than `bounce_bytes` serves.
    """

    def __init__(self, paths: Iterable[str], bounce_bytes: int) -> None:
        self.files: dict[str, File] = {}
        self.settings: tuple[DriveSettings, ...] = ()
        self._engines: list[tuple[BlockDevice, Engine]] = []
        self._engine_of: dict[File, int] = {}
        try:
            for path in paths:
                self.files[path] = File(path)
            self._start(_by_device(self.files.values()), bounce_bytes)
        except BaseException:
            self.close()
            raise

    def _start(self, files_on: dict[BlockDevice, list[File]], bounce_bytes: int) -> None:
        profiles = {
            # O_DIRECT is what it was measured with, and a buffered file may be more than its backend takes.
            device: load_profile(device) if all(file.direct for file in files) else None
            for device, files in files_on.items()
        }
        wanted, slot = divide_bounce(
            [settings_for(device, profile) for device, profile in profiles.items()], bounce_bytes
        )
        used = []
        for (device, files), settings in zip(files_on.items(), wanted, strict=True):
            engine, measured = _engine(device, settings, slot, profiles[device])
            self._engine_of |= dict.fromkeys(files, len(self._engines))
            self._engines.append((device, engine))
            in_use = replace(settings, backend=engine.backend, block_bytes=engine.block_bytes)
            profile = profiles[device]
            rate = profile.read_rate if profile is not None and measured else None
            used.append(DriveSettings(device.name, in_use, measured, rate))
            logger.info("reading %s", used[-1])
        self.settings = tuple(used)

    def read(self, extents: Iterable[Extent], keepalive: object = None, *, urgent: bool = False) -> Waitable:
        """Start reading every extent, each through its drive's engine; raises what `Engine.read` raises.

        Where one of several engines refuses its part, the parts that others began are drained first.
        """
        parts: dict[int, list[Extent]] = {}
        for extent in extents:
            parts.setdefault(self._engine_of[extent[0]], []).append(extent)
        if len(parts) == 1:
            ((number, only),) = parts.items()
            return self._engines[number][1].read(only, keepalive, urgent=urgent)
        begun: list[Waitable] = []
        try:
            for number, part in parts.items():
                begun.append(self._engines[number][1].read(part, keepalive, urgent=urgent))
        except BaseException:
            for request in begun:
                request.cancel()
            begun.clear()  # a request that goes has drained; the error's traceback would keep the list
            raise
        return JointRequest(begun)

    @property
    def devices(self) -> list[BlockDevice]:
        """The block devices that the files lie on."""
        return [device for device, _ in self._engines]

    @property
    def backend(self) -> str:
        """The backends in use, such as "io_uring" or "io_uring + threads"."""
        return " + ".join(dict.fromkeys(engine.backend for _, engine in self._engines))

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """`(backend not taken, reason)`, each once; where not every drive says so, the reason names those that do."""
        devices: dict[tuple[str, str], list[str]] = {}
        for device, engine in self._engines:
            for fallback in engine.fallbacks:
                devices.setdefault(fallback, []).append(device.name)
        return [
            (backend, reason if len(names) == len(self._engines) else f"{reason} (on {', '.join(names)})")
            for (backend, reason), names in devices.items()
        ]

    @property
    def stats(self) -> dict[str, Any]:
        """The engines' stats (`zinfer.aio._native.Stats`), summed."""
        totals: dict[str, Any] = dict.fromkeys(FIGURES, 0)
        for _, engine in self._engines:
            for name, figure in engine.stats.items():
                totals[name] += figure
        return totals

    @property
    def bounce_bytes(self) -> int:
        """Bytes of bounce memory that all engines together may allocate, at most."""
        return sum(engine.bounce_bytes for _, engine in self._engines)

    def check_integrity(self) -> None:
        """Raise RuntimeError if an idle engine has pieces in flight or bounce slots missing."""
        for _, engine in self._engines:
            engine.check_integrity()

    def close(self) -> None:
        """Drain every engine, then close the files; all of them, even if one raises. Idempotent."""
        with ExitStack() as closing:  # the last registered is the first called
            for file in self.files.values():
                closing.callback(file.close)
            for _, engine in self._engines:
                closing.callback(engine.close)


def _by_device(files: Iterable[File]) -> dict[BlockDevice, list[File]]:
    """The files on each block device, both in the order given. Raises DriveError where that cannot be told."""
    device_of: dict[int, BlockDevice] = {}  # by st_dev; two partitions have one each, and one device
    found: dict[BlockDevice, list[File]] = {}
    for file in files:
        number = file.identity[0]
        if number not in device_of:
            try:
                device_of[number] = block_device_of(file.path)
            except OSError as error:
                code = error.errno or 0
                raise DriveError(
                    f"{file.path}: cannot find out which drive it lies on: {error.strerror}{descriptor_remedy(code)}",
                    *(file.path, 0, 0, code, "open"),
                ) from error
        found.setdefault(device_of[number], []).append(file)
    return found


def _engine(
    device: BlockDevice, settings: Settings, slot: int, profile: Profile | None
) -> tuple[Engine, bool]:
    """The engine for `device`, and whether it is the one that its profile asks for."""

    try:
        return _made_with(settings, slot), profile is not None
    except OptionError as error:
        if profile is None:
            raise
        logger.warning(
            "%s: %s, which aio_bench found fastest, does not work here any more (%s); taking what does. "
            "Run aio_bench again",
            device.name,
            settings.backend,
            error,
        )
        usual = replace(settings_for(device, None), depth=settings.depth)  # bounce memory is for that depth
        return _made_with(usual, slot), False


def _made_with(settings: Settings, slot: int) -> Engine:
    backend: Any = settings.backend
    return Engine(
        backend,
        depth=settings.depth,
        block_bytes=settings.block_bytes,
        workers=settings.workers,
        bounce_slot_bytes=slot,
    )
