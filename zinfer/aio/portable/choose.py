"""Which backend carries out an engine's transfers: by trying, not by the kernel's version."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from zinfer.aio.libaio import Transfer
from zinfer.aio.portable.backends import Backend, LibaioBackend, MixedBackend, ThreadsBackend
from zinfer.aio.portable.memory import AlignedBlock, view_at
from zinfer.aio.portable.threads import Bell
from zinfer.aio.remedy import descriptor_remedy
from zinfer.errors import OptionError

BACKENDS = ("auto", "io_uring", "libaio", "threads", "faults")
COMPILED_ONLY = (
    "it needs zinfer's compiled module, and this is the portable engine: unset ZINFER_PORTABLE if it is set, else "
    "install g++ (and liburing-dev for io_uring) and install zinfer again"
)
TRIAL_BYTES = 4096


@dataclass(frozen=True)
class Wanted:
    """What was asked for; `faults` is the script of the backend of that name, None without one."""

    backend: str
    depth: int
    workers: int
    faults: object | None = None


def make_backend(wanted: Wanted, bell: Bell, fallbacks: list[tuple[str, str]]) -> Backend:
    """The backend, completions of which ring `bell`; adds `(backend not taken, reason)` to `fallbacks`.

    Raises OptionError for an unknown name, or for a named backend that does not work here.
    """
    name = wanted.backend
    if name not in BACKENDS:
        raise OptionError(
            f'backend must be "auto", "io_uring", "libaio", "threads" or "faults", not "{name}"'
        )
    if name in ("io_uring", "faults"):
        raise OptionError(f'backend "{name}" does not work here: {COMPILED_ONLY}; or use backend="auto"')
    if name == "threads":
        return ThreadsBackend(wanted.workers, bell.fd)
    if name == "auto":
        fallbacks.append(("io_uring", COMPILED_ONLY))
    try:
        libaio = _tried_libaio(wanted.depth, bell)
    except OptionError as error:
        if name == "libaio":
            raise OptionError(
                f'backend "libaio" does not work here: {error}; use backend="auto" or "threads"'
            ) from error
        fallbacks.append(("libaio", str(error)))
        return ThreadsBackend(wanted.workers, bell.fd)
    if name == "libaio":
        return libaio
    try:
        return MixedBackend(libaio, ThreadsBackend(wanted.workers, bell.fd))
    except OptionError:
        libaio.close()
        raise


def _tried_libaio(depth: int, bell: Bell) -> Backend:
    """A libaio backend that has served a read: seccomp and sysctl refuse its calls on kernels that have them."""
    block = AlignedBlock(TRIAL_BYTES)
    fd, direct = _trial_file(block)
    try:
        backend = LibaioBackend(depth, bell.fd)
        try:
            backend.submit([Transfer(0, False, fd, block.address, TRIAL_BYTES, 0)], [direct])
            while not (results := backend.collect()):
                bell.wait()
            result = results[0].result
            if result < 0:
                raise OptionError(f"io_submit, trial read: {os.strerror(-result)}")
            if result != TRIAL_BYTES:
                raise OptionError(f"trial read: gave {result} bytes")
        except OptionError:
            backend.close()
            raise
    finally:
        os.close(fd)
    return backend


def _trial_file(block: AlignedBlock) -> tuple[int, bool]:
    """A descriptor of some file of a block or more, and whether it is O_DIRECT.

    A file without a name, gone when closed; the program's own file where none can be written. If neither takes
    O_DIRECT a buffered trial still shows that the calls work, and every File tries its own.
    """
    view = view_at(block.address, TRIAL_BYTES)
    for folder in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        with contextlib.suppress(OSError):
            fd = os.open(folder or "", os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):
                if os.pwritev(fd, [view], 0) == TRIAL_BYTES:
                    return fd, True
            os.close(fd)
    with contextlib.suppress(OSError):
        return os.open("/proc/self/exe", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    try:
        return os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC), False
    except OSError as error:
        what = f"no file for a trial read: {error.strerror}{descriptor_remedy(error.errno)}"
        raise OptionError(what) from error
