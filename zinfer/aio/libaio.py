"""The raw libaio binding: the kernel's older asynchronous interface, through cffi and without a compiler.

libaio.so.1 is loaded when it is first needed, or libaio.so.1t64, its name since Debian 13 and Ubuntu 24.04.
Where the compiled engine makes the system calls itself, this goes through the C library: two ways that share no
code, so that each is a check on the other.

libaio's header declares `io_event.res` unsigned; whoever trusts it takes EIO for a very long read. Here it is
signed: bytes moved, or -errno.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zinfer.errors import OptionError

try:
    import cffi
except ImportError:  # installed without its dependencies: threads serve
    cffi = None

LIBRARIES = ("libaio.so.1", "libaio.so.1t64")

# <libaio.h> for 64-bit little-endian machines, its padding written out and its unions reduced to io_iocb_common.
DECLARATIONS = """
typedef struct io_context *io_context_t;
struct iocb {
    uint64_t data;
    uint32_t key;
    uint32_t aio_rw_flags;
    int16_t aio_lio_opcode;
    int16_t aio_reqprio;
    int32_t aio_fildes;
    uint64_t buf;
    uint64_t nbytes;
    int64_t offset;
    uint64_t reserved;
    uint32_t flags;
    uint32_t resfd;
};
struct io_event {
    uint64_t data;
    uint64_t obj;
    long res;
    long res2;
};
struct timespec {
    long tv_sec;
    long tv_nsec;
};
int io_setup(int maxevents, io_context_t *context);
int io_destroy(io_context_t context);
int io_submit(io_context_t context, long count, struct iocb **blocks);
int io_getevents(io_context_t context, long least, long most, struct io_event *events, struct timespec *timeout);
"""
SIZES = {"struct iocb": 64, "struct io_event": 32, "struct timespec": 16}  # of the kernel's own structures

PREAD, PWRITE = 0, 1  # IO_CMD_*
NOTIFY = 1  # IOCB_FLAG_RESFD


class Transfer(NamedTuple):
    """One read or write of `length` bytes at `address`, from or to `offset` of the open file `fd`."""

    token: int  # handed back with the result
    writing: bool
    fd: int
    address: int
    length: int
    offset: int


class Result(NamedTuple):
    """What became of the transfer with this token: bytes moved, or -errno."""

    token: int
    result: int


@functools.cache
def load() -> tuple[Any, Any]:
    """cffi's FFI object and the loaded library. Raises OptionError with the remedy where there is none."""
    if sys.byteorder != "little" or sys.maxsize < 1 << 32:
        raise OptionError(
            'the libaio binding is for 64-bit little-endian machines; use backend="threads" or the compiled module'
        )
    if cffi is None:
        raise OptionError("the libaio binding needs cffi: pip install cffi")
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    for name, size in SIZES.items():
        if ffi.sizeof(name) != size:
            raise OptionError(
                f"{name} takes {ffi.sizeof(name)} bytes here, not the kernel's {size}: file a bug"
            )
    failures = []
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name)  # cffi would start a compiler to look for a library that is not there
            return ffi, ffi.dlopen(name)
        except OSError as error:
            failures.append(str(error))
    if any(os.strerror(errno.EMFILE) in failure for failure in failures):
        raise OptionError(
            f"libaio cannot be opened ({failures[0]}): raise `ulimit -n`, or close files and engines"
        )
    raise OptionError(
        f"libaio is not installed ({'; '.join(failures)}): apt-get install libaio1t64 (libaio1 before Debian 13 and "
        "Ubuntu 24.04), or dnf install libaio"
    )


class Context:
    """A kernel context for `events` transfers in flight at most. One thread uses it.

    Whoever owns it keeps the memory of its transfers alive until their results have been taken, or until
    `destroy()`, which waits for what is in flight. Raises OptionError where there is no libaio or the kernel
    refuses a context.
    """

    def __init__(self, events: int) -> None:
        self._handle: Any = None
        self._ffi, self._library = load()
        handle = self._ffi.new("io_context_t *")
        failed = self._library.io_setup(events, handle)
        if failed:
            raise OptionError(f"io_setup: {os.strerror(-failed)}{_setup_hint(-failed)}")
        self._handle = handle[0]
        self._events = self._ffi.new("struct io_event[]", events)

    def submit(self, transfers: Sequence[Transfer], notify_fd: int | None = None) -> list[Result]:
        """Start all of them; returns those that the kernel refused, each with its -errno.

        Each completion is counted on the eventfd `notify_fd`, if one is given.
        """
        blocks = self._ffi.new("struct iocb[]", len(transfers))
        pointers = self._ffi.new("struct iocb *[]", len(transfers))
        for index, transfer in enumerate(transfers):
            block = blocks[index]
            block.data = transfer.token
            block.aio_lio_opcode = PWRITE if transfer.writing else PREAD
            block.aio_fildes = transfer.fd
            block.buf = transfer.address
            block.nbytes = transfer.length
            block.offset = transfer.offset
            if notify_fd is not None:
                block.flags = NOTIFY
                block.resfd = notify_fd
            pointers[index] = blocks + index
        refused: list[Result] = []
        start = 0
        while start < len(transfers):
            taken = self._library.io_submit(self._handle, len(transfers) - start, pointers + start)
            if taken > 0:
                start += taken
                continue
            # The first of the rest was refused, and only that one.
            refused.append(Result(transfers[start].token, taken or -errno.EAGAIN))
            start += 1
        return refused

    def results(self, least: int = 0, timeout: float | None = 0.0) -> list[Result]:
        """Take what has completed: waits for `least` results, `timeout` seconds at most (None: no limit).

        Raises OSError if the kernel refuses io_getevents.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = self._ffi.NULL
            if timeout is not None:
                nanoseconds = max(0, int((deadline - time.monotonic()) * 1e9))
                left = self._ffi.new("struct timespec *", divmod(nanoseconds, 10**9))
            count = self._library.io_getevents(self._handle, least, len(self._events), self._events, left)
            if count >= 0:
                return [Result(event.data, event.res) for event in self._events[0:count]]
            if count != -errno.EINTR:
                raise OSError(-count, f"io_getevents: {os.strerror(-count)}{_setup_hint(-count)}")

    def destroy(self) -> None:
        """Cancel what can be cancelled, wait for the rest, give the context back. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.io_destroy(handle)


def _setup_hint(code: int) -> str:
    if code == errno.EAGAIN:
        return (
            f" ({_limit('aio-nr')} of fs.aio-max-nr = {_limit('aio-max-nr')} events are taken: close other "
            "programs' contexts or raise it, `sysctl fs.aio-max-nr=1048576`)"
        )
    if code in (errno.EPERM, errno.ENOSYS):
        return " (refused by the kernel or a container's seccomp profile)"
    return ""


def _limit(name: str) -> str:
    try:
        return Path("/proc/sys/fs", name).read_text().strip()
    except OSError:
        return "?"
