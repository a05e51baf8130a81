"""The one seam between policy and the kernel: transfers go in, results come out, a bell rings in between.

A backend knows nothing of alignment, retries, short reads or requests. One thread, the reactor, calls its methods.
It never has more than `depth` transfers in flight and closes a backend only when none is, unless it has failed.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from zinfer.aio.libaio import Context, Result, Transfer
from zinfer.aio.portable.memory import view_at
from zinfer.aio.portable.threads import count_on, start_thread
from zinfer.errors import OptionError


class Backend(Protocol):
    """Carries out transfers; counts on the eventfd it was made with whenever `collect` has something to give."""

    name: str
    direct_only: bool  # a buffered transfer would block submit(): the owner refuses buffered files

    def submit(self, transfers: Sequence[Transfer], direct: Sequence[bool]) -> None:
        """Take all of them; what cannot be submitted completes with its -errno. `direct` tells which are O_DIRECT."""

    def collect(self) -> list[Result]:
        """What has completed since the last call; does not wait."""

    def close(self) -> None:
        """Wait for what is in flight, end threads, give descriptors back."""


class ThreadsBackend:
    """Threads that call preadv and pwritev: works on every kernel, container and file system."""

    name = "threads"
    direct_only = False

    def __init__(self, workers: int, bell_fd: int) -> None:
        self._transfers: SimpleQueue[Transfer | None] = SimpleQueue()
        self._results: deque[Result] = deque()
        self._workers = []
        try:
            for _ in range(workers):
                worker = start_thread("zinfer-pread", _work, self._transfers, self._results, bell_fd)
                self._workers.append(worker)
        except OptionError:
            self.close()
            raise

    def submit(self, transfers: Sequence[Transfer], direct: Sequence[bool]) -> None:
        """See Backend."""
        for transfer in transfers:
            self._transfers.put(transfer)

    def collect(self) -> list[Result]:
        """See Backend."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def close(self) -> None:
        """See Backend."""
        for _ in self._workers:
            self._transfers.put(None)
        for worker in self._workers:
            worker.join()
        self._workers.clear()


class LibaioBackend:
    """libaio through cffi, for O_DIRECT files: io_submit of a buffered read silently blocks."""

    name = "libaio"
    direct_only = True

    def __init__(self, depth: int, bell_fd: int) -> None:
        self._context = Context(depth)
        self._bell_fd = bell_fd
        self._refused: list[Result] = []
        self._in_flight: set[int] = set()
        self._proven = False  # io_getevents has worked
        self._broken = 0  # errno with which it no longer does; the context is gone then

    def submit(self, transfers: Sequence[Transfer], direct: Sequence[bool]) -> None:
        """See Backend."""
        if self._broken:
            refused = [Result(transfer.token, -self._broken) for transfer in transfers]
        else:
            refused = self._context.submit(transfers, self._bell_fd)
            self._in_flight |= {transfer.token for transfer in transfers} - {each.token for each in refused}
        if refused:
            self._refused += refused
            count_on(self._bell_fd)

    def collect(self) -> list[Result]:
        """See Backend."""
        refused, self._refused = self._refused, []
        if self._broken:
            return refused
        try:
            results = self._context.results()
        except OSError as error:
            if not self._proven:  # the trial read's answer
                raise OptionError(str(error.strerror)) from error
            return refused + self._give_up(error.errno or errno.EIO)
        self._proven = self._proven or bool(
            results
        )  # without results the library may not have asked the kernel
        self._in_flight -= {each.token for each in results}
        return refused + results

    def _give_up(self, code: int) -> list[Result]:
        """Somebody forbade the call after the trial read: what is in flight fails, and nothing more is taken."""
        self._context.destroy()  # waits until the kernel is through with its memory
        self._broken = code
        failed = [Result(token, -code) for token in self._in_flight]
        self._in_flight.clear()
        return failed

    def close(self) -> None:
        """See Backend."""
        self._context.destroy()


class MixedBackend:
    """Direct transfers to a backend that can do nothing else, buffered ones to threads beside it."""

    direct_only = False

    def __init__(self, direct: Backend, buffered: Backend) -> None:
        self.name = direct.name
        self._direct = direct
        self._buffered = buffered

    def submit(self, transfers: Sequence[Transfer], direct: Sequence[bool]) -> None:
        """See Backend."""
        for backend, wanted in ((self._direct, True), (self._buffered, False)):
            chosen = [
                transfer for transfer, is_direct in zip(transfers, direct, strict=True) if is_direct is wanted
            ]
            if chosen:
                backend.submit(chosen, [wanted] * len(chosen))

    def collect(self) -> list[Result]:
        """See Backend."""
        return self._direct.collect() + self._buffered.collect()

    def close(self) -> None:
        """See Backend."""
        self._buffered.close()
        self._direct.close()


def carry_out(transfer: Transfer) -> Result:
    """Read or write on the calling thread."""
    try:
        view = view_at(transfer.address, transfer.length)
        call = os.pwritev if transfer.writing else os.preadv
        return Result(transfer.token, call(transfer.fd, [view], transfer.offset))
    except OSError as error:
        return Result(transfer.token, -(error.errno or errno.EIO))


def _work(transfers: SimpleQueue[Transfer | None], results: deque[Result], bell_fd: int) -> None:
    while (transfer := transfers.get()) is not None:
        results.append(carry_out(transfer))
        count_on(bell_fd)
