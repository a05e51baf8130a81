"""The engine's own threads: how they are started, how they are known, how they are woken."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any

from zinfer.aio.remedy import descriptor_remedy
from zinfer.errors import OptionError

PR_SET_NAME = 15

_libc = ctypes.CDLL(None)
_here = threading.local()


def on_engine_thread() -> bool:
    """Whether the caller runs on a thread of some engine, which must not wait for one."""
    return getattr(_here, "marked", False)


def start_thread(name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Start `target(*arguments)` on a thread called `name` (15 characters at most).

    A daemon thread, for the interpreter waits for all others before it runs the exit functions, and those are what
    ends this one: whoever starts it registers one that stops and joins it. Raises OptionError.
    """
    thread = threading.Thread(target=_run, args=(name, target, *arguments), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OptionError(
            f"cannot start a thread ({name}): {error}; lower workers or raise `ulimit -u`"
        ) from error
    return thread


def _run(name: str, target: Callable[..., None], *arguments: Any) -> None:
    _here.marked = True
    # Signals belong to the program's own threads: one taken here would not interrupt a wait there.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    _libc.prctl(
        PR_SET_NAME, name.encode()
    )  # as `top` shows it; threading tells the kernel from Python 3.14 on
    target(*arguments)


class Bell:
    """Wakes the one thread that waits on it. Any thread may ring, also after `close()`.

    `fd` is the eventfd behind it, for those that are known to have ended before it is closed: workers and kernel.
    """

    def __init__(self) -> None:
        self.fd = new_eventfd()
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self._lock = threading.RLock()  # a descriptor that was closed may be another file's by now

    def ring(self) -> None:
        """Wake the thread, now or when it waits next."""
        with self._lock:
            if self.fd >= 0:
                count_on(self.fd)

    def wait(self) -> None:
        """Sleep until somebody has rung since the last return."""
        self._poll.poll()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            descriptor, self.fd = self.fd, -1
            if descriptor >= 0:
                os.close(descriptor)


def new_eventfd() -> int:
    """A non-blocking eventfd. Raises OptionError when there are no more descriptors."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise OptionError(f"eventfd: {error.strerror}{descriptor_remedy(error.errno)}") from error


def count_on(fd: int) -> None:
    """Add one to an eventfd; a full counter is readable anyway."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, 1)
