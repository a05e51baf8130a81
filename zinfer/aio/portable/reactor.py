"""One thread that owns a backend and holds all policy on transfers: order, depth, retries, draining.

Users reach it through a dict that they insert into and a deque that they append to, each of which is one step, and
a bell. It takes no lock that a user's thread may hold (see request.py).
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections import deque

from zinfer.aio.libaio import Result, Transfer
from zinfer.aio.portable.backends import Backend
from zinfer.aio.portable.failures import Failure, ended_early, transfer_failure
from zinfer.aio.portable.latency import LatencyHistogram
from zinfer.aio.portable.memory import BouncePool, clear, copy
from zinfer.aio.portable.request import Progress
from zinfer.aio.portable.split import Piece
from zinfer.aio.portable.threads import Bell, count_on
from zinfer.aio.portable.work import FIGURES, Operation, Snapshot, Work
from zinfer.errors import ClosedError

MAX_TRIES = 1000  # EINTR and EAGAIN on one piece
MAX_STALLS = 3  # a direct read that ends mid-block again and again: the file's end
LONGEST_NAP = 0.001


class Reactor:
    """`run` is its thread's; `submit`, `cancel`, `cancel_all`, `stop` and `knows` are anybody's."""

    def __init__(self, backend: Backend, bell: Bell, depth: int, slot_bytes: int, event_fd: int) -> None:
        self.backend_name = backend.name
        self.event_fd = event_fd  # counts completed requests; -1 once it has ended
        self.snapshot = Snapshot()
        self._backend = backend
        self._bell = bell
        self._depth = depth
        self._bounce = BouncePool(depth, slot_bytes)
        self._stopping = False
        self._ended = False
        # In the order of submission. A work is added to _open before it leaves _inbox, and is done before it leaves
        # _open: knows() relies on it.
        self._inbox: dict[Work, None] = {}
        self._open: dict[Work, None] = {}
        self._calls: deque[str] = deque()  # "look": something was cancelled; "all": everything is
        # The thread's alone.
        self._urgent: deque[Work] = deque()
        self._normal: deque[Work] = deque()
        self._operations: dict[
            int, Operation
        ] = {}  # by token; tokens count up, so the order is that of starting
        self._tokens = itertools.count()
        self._retries: list[int] = []
        self._parked: list[int] = []
        self._transfers: list[Transfer] = []
        self._direct: list[bool] = []
        self._ending: list[Work] = []
        self._figures = dict.fromkeys(FIGURES, 0)
        self.latencies = LatencyHistogram()
        self._busy_seconds = 0.0
        self._busy_since: float | None = None
        self._again = 0  # the longest run of EAGAIN this turn, for the back-off

    # ---- for any thread ---------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        """Queue it. Raises ClosedError after stop()."""
        if not self._stopping:
            self._inbox[work] = None
            if not self._ended or self._inbox.pop(work, work) is work:
                # Either the thread will look at its inbox again, or it has taken this one out itself.
                self._bell.ring()
                return
        raise ClosedError("the engine was closed; make a new one")

    def knows(self, work: Work) -> bool:
        """Whether it was submitted and will be, or has been, ended."""
        return work in self._inbox or work in self._open or work.progress.done

    def cancel(self, progress: Progress) -> None:
        """Its pieces not started are dropped, those in flight drain."""
        progress.cancelled = True  # before the call: whoever takes the call sees the mark
        self._calls.append("look")
        self._bell.ring()

    def cancel_all(self) -> None:
        """Cancel all that is queued or in flight; does not wait."""
        self._calls.append("all")
        self._bell.ring()

    def stop(self) -> None:
        """Refuse new work, finish what was accepted, then end the thread; does not wait."""
        self._stopping = True
        self._bell.ring()

    def busy_seconds(self) -> float:
        """Time with at least one piece in flight, up to now."""
        now = self.snapshot
        return now.busy_seconds + (time.monotonic() - now.busy_since if now.busy_since is not None else 0.0)

    def check_integrity(self) -> str:
        """What is wrong, or "" when nothing is."""
        now = self.snapshot
        if now.slots > self._depth:
            return f"{now.slots} bounce slots in use, depth is {self._depth}"
        if now.in_flight > self._depth:
            return f"{now.in_flight} pieces in flight exceed the depth"
        if now.open:
            return ""
        if now.in_flight:
            return f"{now.in_flight} pieces in flight without a request"
        if now.slots:
            return f"{now.slots} bounce slots are missing"
        return "an idle engine counts itself busy" if now.busy_since is not None else ""

    # ---- the thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take new work, drop what was cancelled, fill the backend, tell the waiters, sleep; until stopped."""
        broken = ""
        try:
            while self._turn():
                self._bell.wait()
        except BaseException as error:  # whatever it is, somebody waits for every request
            broken = f"{type(error).__name__}: {error}"
        self._end(broken)

    def end_unstarted(self) -> None:
        """Give everything back where there is no thread to do it."""
        self._end("")

    def _end(self, broken: str) -> None:
        self._stopping = self._ended = True
        self._backend.close()  # nothing is in flight afterwards, whatever went wrong
        self._end_the_rest(broken)
        self._bounce.release()
        event_fd, self.event_fd = self.event_fd, -1
        os.close(event_fd)
        self._bell.close()

    def _turn(self) -> bool:
        """Whether there is, or may come, more to do."""
        stopping = self._stopping  # read before the inbox: what was accepted is found there
        self._again = 0
        for result in self._backend.collect():
            self._complete(result)
        if self._again:
            time.sleep(min(LONGEST_NAP, 2e-5 * self._again))
        self._take_inbox()
        self._drop_cancelled()
        self._fill()
        self._publish()
        return not (stopping and not self._operations and not self._urgent and not self._normal)

    def _take_inbox(self) -> None:
        for work in list(self._inbox):
            self._open[work] = None
            del self._inbox[work]
            self._figures["requests"] += 1
            self._figures["bytes_requested"] += work.progress.nbytes
            (self._urgent if work.urgent else self._normal).append(work)

    def _drop_cancelled(self) -> None:
        calls = {self._calls.popleft() for _ in range(len(self._calls))}
        if not calls:
            return
        if "all" in calls:
            for work in self._open:
                work.progress.cancelled = True
        for queue in (self._urgent, self._normal):
            for _ in range(len(queue)):
                work = queue.popleft()
                if not work.progress.cancelled:
                    queue.append(work)
                    continue
                work.next = len(work.pieces)
                self._end_if_drained(work)

    def _fill(self) -> None:
        retries, self._retries = self._retries, []
        parked, self._parked = self._parked, []
        for token in retries:
            if self._operations[token].work.failing:
                self._end_operation(token)
            else:
                self._issue(token)
        for token in parked:
            if self._operations[token].work.failing:
                self._end_operation(token)
            elif self._must_wait(token):
                self._parked.append(token)
            else:
                self._issue(token)
        for queue in (self._urgent, self._normal):
            while queue:
                work = queue[0]
                while (
                    work.next < len(work.pieces) and not work.failing and len(self._operations) < self._depth
                ):
                    self._start(work)
                if work.next < len(work.pieces) and not work.failing:
                    break  # the depth is reached
                work.next = len(work.pieces)
                queue.popleft()
                self._end_if_drained(work)
        if self._transfers:
            transfers, self._transfers = self._transfers, []
            direct, self._direct = self._direct, []
            self._backend.submit(transfers, direct)

    def _start(self, work: Work) -> None:
        piece = work.pieces[work.next]
        # As many slots as operations: a piece never waits for a slot that another one holds.
        slot = self._bounce.take() if piece.bounced else 0
        if piece.bounced and not slot:
            self._fail(work, self._failure_of(work, piece, errno.ENOMEM))
            return
        token = next(self._tokens)
        operation = self._operations[token] = Operation(work, piece, slot)
        work.next += 1
        work.in_flight += 1
        self._figures["pieces"] += 1
        if work.writing:
            self._prepare_write(operation)
        if work.writing and self._must_wait(token):
            self._parked.append(token)
        else:
            self._issue(token)

    def _prepare_write(self, operation: Operation) -> None:
        """Fill the slot of a bounced write; an edge's block is fetched first, unless it holds only zeros."""
        piece, state = operation.piece, operation.file.writing
        assert state is not None  # Engine.write takes files open for writing only
        fresh = state.touch(piece.span_offset, piece.span_offset + piece.span_length)
        if not operation.slot:
            return
        edge = piece.span_length != piece.length
        operation.fetching = edge and not fresh
        if operation.fetching:
            return
        if edge:
            clear(operation.slot, piece.span_length)
        self._change_block(operation)

    def _must_wait(self, token: int) -> bool:
        """Whether a write that was started earlier overlaps this one's blocks."""
        mine = self._operations[token]
        first, last = mine.piece.span_offset, mine.piece.span_offset + mine.piece.span_length
        return any(
            earlier < token
            and other.work.writing
            and other.file is mine.file
            and other.piece.span_offset < last
            and first < other.piece.span_offset + other.piece.span_length
            for earlier, other in self._operations.items()
        )

    def _issue(self, token: int) -> None:
        """Queue the rest of the operation's transfer, from where it resumes."""
        operation = self._operations[token]
        piece, file = operation.piece, operation.file
        operation.issued = time.monotonic_ns()
        if operation.work.progress.started is None:
            operation.work.progress.started = time.monotonic()  # on Linux perf_counter is the same clock
        start = operation.slot or piece.address - (piece.offset - piece.span_offset)
        self._transfers.append(
            Transfer(
                token,
                operation.work.writing and not operation.fetching,
                file.fd,
                start + operation.resume_at,
                piece.span_length - operation.resume_at,
                piece.span_offset + operation.resume_at,
            )
        )
        self._direct.append(file.direct)

    def _complete(self, completion: Result) -> None:
        token, result = completion
        operation = self._operations[token]
        work, piece = operation.work, operation.piece
        self._figures["bytes_transferred"] += max(result, 0)
        work.progress.transferred += max(result, 0)
        if work.failing:
            return self._end_operation(token)
        if result < 0:
            if -result in (errno.EINTR, errno.EAGAIN) and operation.tries < MAX_TRIES:
                operation.tries += 1
                self._again = max(self._again, operation.tries)
                return self._retry(token)
            self._fail(work, self._failure_of(work, piece, -result))
            return self._end_operation(token)
        self.latencies.add(time.monotonic_ns() - operation.issued)
        arrived = operation.resume_at + result
        # What a read brings behind the wanted bytes is of no interest.
        wanted = piece.span_length if work.writing else piece.offset + piece.length - piece.span_offset
        if arrived >= wanted:
            return self._end_transfer(token)
        self._come_up_short(token, result, arrived)

    def _come_up_short(self, token: int, got: int, arrived: int) -> None:
        """A direct read that ends inside a block is the file's end, or a drive that came up short: ask again."""
        operation = self._operations[token]
        work, piece, file = operation.work, operation.piece, operation.file
        stalled = arrived <= operation.delivered
        if stalled and operation.fetching and file.size_now() <= piece.span_offset + arrived:
            clear(operation.slot + arrived, piece.span_length - arrived)
            return self._end_transfer(token)
        operation.stalls += stalled
        hopeless = operation.stalls >= MAX_STALLS
        if work.writing and hopeless:
            self._fail(work, self._failure_of(work, piece, errno.EIO))
            return self._end_operation(token)
        if not work.writing and (got == 0 or hopeless):
            seen = piece.span_offset + max(arrived, operation.delivered)
            end = min(seen, file.size_now())  # a read behind the end sees only zero
            self._fail(work, ended_early(file.path, piece.offset, piece.length, end, self.backend_name))
            return self._end_operation(token)
        operation.delivered = max(operation.delivered, arrived)
        operation.resume_at = arrived // file.alignment * file.alignment
        self._retry(token)

    def _end_transfer(self, token: int) -> None:
        """All bytes of the span have been moved."""
        operation = self._operations[token]
        piece, state = operation.piece, operation.file.writing
        if state is None:
            if operation.slot:
                copy(piece.address, operation.slot + (piece.offset - piece.span_offset), piece.length)
                self._figures["bounced_bytes"] += piece.length
            return self._end_operation(token)
        if not operation.fetching:
            state.wrote(piece.offset + piece.length)
            return self._end_operation(token)
        self._change_block(operation)
        operation.fetching = False
        operation.resume_at = operation.delivered = operation.stalls = 0
        self._retries.append(token)

    def _change_block(self, operation: Operation) -> None:
        piece = operation.piece
        copy(operation.slot + (piece.offset - piece.span_offset), piece.address, piece.length)
        self._figures["bounced_bytes"] += piece.length

    def _retry(self, token: int) -> None:
        self._figures["retries"] += 1
        self._retries.append(token)

    def _fail(self, work: Work, failure: Failure) -> None:
        """The first failure is the request's; the pieces not yet started are dropped by _fill()."""
        work.failure = work.failure or failure

    def _end_operation(self, token: int) -> None:
        operation = self._operations.pop(token)
        if operation.slot:
            self._bounce.give(operation.slot)
        operation.work.in_flight -= 1
        self._end_if_drained(operation.work)

    def _end_if_drained(self, work: Work) -> None:
        if work.in_flight or work.next < len(work.pieces):
            return
        if work.failure is None and work.progress.cancelled:
            work.failure = self._cancelled(work)
        if work.failure is not None and work.failure.errno != errno.ECANCELED:
            self._figures["errors"] += 1
        self._ending.append(work)

    def _publish(self) -> None:
        """Bring the shared figures up to date, then tell: who sees done sees figures that include it."""
        ending, self._ending = self._ending, []
        now = time.monotonic()
        if self._operations and self._busy_since is None:
            self._busy_since = now
        if not self._operations and self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
            self._busy_since = None
        self.snapshot = Snapshot(
            dict(self._figures),
            self._busy_seconds,
            self._busy_since,
            len(self._operations),
            len(self._open) - len(ending),
            self._bounce.used,
        )
        for work in ending:
            self._tell(work)

    def _tell(self, work: Work) -> None:
        """End the request. Its Request, if any, still holds the keepalive: it does not die on this thread."""
        work.release_claims()
        work.files.clear()  # descriptors first: who sees done may count them
        work.keepalive = None
        work.progress.finish(work.failure)
        del self._open[work]
        count_on(self.event_fd)

    def _end_the_rest(self, broken: str) -> None:
        """End what came too late to be accepted or, if the thread is `broken`, everything."""
        self._operations.clear()
        for work in list(self._inbox):
            self._open[work] = None
            self._inbox.pop(work, None)  # unless its submitter has taken it back, which does no harm
        for work in list(self._open):
            if broken:
                path = work.files[0].path if work.files else ""
                message = (
                    f"{path}: the engine's thread failed ({broken}); close the engine and make another. This is "
                    "a bug in zinfer: please report it"
                )
                work.failure = Failure(message, path, 0, work.progress.nbytes, errno.EIO, self.backend_name)
            work.failure = work.failure or self._cancelled(work)
            self._tell(work)
        self._busy_since = None
        self._publish()

    def _failure_of(self, work: Work, piece: Piece, code: int) -> Failure:
        file, place = work.files[piece.file], (piece.offset, piece.length)
        how = {"writing": work.writing, "direct": file.direct}
        return transfer_failure(file.path, *place, code, self.backend_name, **how)

    def _cancelled(self, work: Work) -> Failure:
        if work.pieces:
            return self._failure_of(work, work.pieces[0], errno.ECANCELED)
        return Failure("an empty request was cancelled", "", 0, 0, errno.ECANCELED, self.backend_name)
