"""Serves operators their weights, reads ahead of them, and keeps the resident set."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from zinfer.coordinator.reader import Reader
from zinfer.coordinator.trace import Trace
from zinfer.device.device import Device, Fetching
from zinfer.errors import BudgetError, ClosedError, OutOfMemoryError, ZinferError
from zinfer.weights.shortage import ShortageError
from zinfer.weights.weight import Weight

ROOM_DEADLINE = 60.0  # seconds a demand waits for other threads' operators to give regions back
POLL = 0.1  # seconds the first in line waits for room before it looks at what else there is to drop
TURN = 0.001  # seconds between the others' looks whether it is their turn
IDLE_READER = 2.0  # seconds after which a thread that ran nothing no longer shares the window
FIRST_SHARE = 64  # of a model's bytes, this part is read for the second sweep before the first has ended
LOADING_AHEAD = 512 << 20  # bytes read ahead where no window is needed, because everything stays


class Reliever(Protocol):
    """Who gives memory back when it runs out; see zinfer.relief. Called on any thread, without a lock."""

    def relieve(self, what: str, words: str) -> None:
        """Give memory back: it ran out, as `words` say, in an operator that takes the weight `what`."""

    def exhausted(self, what: str, words: str) -> Exception:
        """What to raise where it ran out again."""


@dataclass
class Counters:
    """What happened so far. Times in seconds, sizes in bytes."""

    hits: int = 0  # uses served by a read started earlier
    misses: int = 0  # uses that had to be read on demand
    wait_seconds: float = 0.0  # operators' threads blocked, on the drive or for room in the window
    row_reads: int = 0
    row_bytes: int = 0
    waits_by_weight: dict[str, float] = field(default_factory=dict)


class Coordinator:
    """Implements WeightSource for the streamed parameters of one model.

    Any thread may call `whole`, `settled` and `rows`; each thread has a Reader of its own, all share the trace,
    the window and the residents. One lock guards them; no thread holds it while it waits for bytes.
    `order` is the first guess at the operator order. `on_resident` is called, under the lock, when a
    weight has become resident.
    """

    def __init__(
        self, device: Device, order: Sequence[Weight], on_resident: Callable[[Weight, torch.Tensor], None]
    ) -> None:
        self.device = device
        self.counters = Counters()
        self._streamed = [weight for weight in order if not weight.rows_only]
        self._streamed_bytes = sum(weight.layout.nbytes for weight in self._streamed)
        self._trace = Trace(self._streamed)
        self._on_resident = on_resident
        self._lock = threading.RLock()
        self._local = threading.local()
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._line: deque[object] = (
            deque()
        )  # tickets of the threads that wait for room, first come first served
        self._closed = False
        self.reliever: weakref.ref[Reliever] | None = None
        device.on_room = weakref.WeakMethod(self._room_came)

    def whole(self, weight: Weight) -> torch.Tensor:
        """The tensor of `weight`, read ahead if the trace foresaw it, else read now, ahead of all else."""
        return self._all_of(weight, foreseen=True)

    def settled(self, weight: Weight) -> torch.Tensor | None:
        """All of `weight`, of which rows are asked for, if it comes to stay with that; None where it does not.

        The trace learns nothing from it: once the weight stays, nobody asks here any more, and where it has to leave,
        rows are asked for again. For want of room nothing is raised, as rows are enough.
        """
        with self._lock:
            self.refuse_closed()
            if weight.resident is not None:
                return weight.resident
            if not self.device.settles(weight):
                return None
        try:
            return self._all_of(weight, foreseen=False)
        except OutOfMemoryError:
            with self._lock:
                self.device.refused(weight)
            return None
        except BudgetError:
            return None

    def _all_of(self, weight: Weight, *, foreseen: bool) -> torch.Tensor:
        """See whole(); `foreseen`: it is one of those that the trace follows."""
        reader = self._reader()
        with self._lock:
            self.refuse_closed()
            resident = weight.resident
            if resident is not None:
                return resident
            reader.touched = time.monotonic()
            fetch = reader.advance(weight) if foreseen else None
            reader.held = None
            if fetch is None:
                self.counters.misses += 1
                self.device.tally.misses += 1
                must_queue = self._line and not self.device.in_place(weight)
                fetch = self._current(weight) or (
                    None if must_queue else self.device.start(weight, urgent=True)
                )
            else:
                self.counters.hits += 1
                self.device.tally.hits += 1
            on_its_way = fetch is not None and (fetch.lifted or (not self._line and self.device.lift(fetch)))
        if fetch is None or not on_its_way:
            started = time.perf_counter()
            unlifted, fetch = [fetch], None
            fetch = self._make_room(weight, unlifted)
            self._waited(weight.name, started)
        try:
            with self._lock:
                self.refuse_closed()
                reader.held = fetch
                if not self._line:
                    self._extend(reader)
            tensor = self._wait(fetch)
        except BaseException as error:
            # Whoever keeps the error (a notebook keeps the last one) must not keep the region with it.
            traceback.clear_frames(error.__traceback__)
            self._give_up(reader, fetch, isinstance(error, ZinferError))
            fetch = None
            raise
        if fetch.settles:
            self._settle(fetch, tensor, reader)
        return tensor

    def done(self, weight: Weight) -> None:
        """The operator that asked for `weight` has ended: its region may be filled anew before the next one asks."""
        reader = self._reader()
        if reader.held is None or reader.held.weight is not weight:
            return
        with self._lock:
            if self._closed or reader.expects(weight):
                return
            reader.held = None
            if not self._line:
                self._extend(reader)

    def rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows of a weight with a row source, read now; all of them where the device finds that cheaper."""
        self.refuse_closed()
        started = time.perf_counter()
        out = self.device.read_rows(weight, rows)
        self._waited(weight.name, started)
        with self._lock:
            self.counters.row_reads += 1
            self.counters.row_bytes += out.nbytes
        return out

    def relieve(self, weight: Weight, words: str) -> None:
        """Memory ran out, as `words` say, in an operator that takes `weight`: give some back. See WeightSource."""
        reliever = self.reliever() if self.reliever is not None else None
        if reliever is not None:
            reliever.relieve(weight.name, words)

    def exhausted(self, weight: Weight, words: str) -> Exception:
        """What to raise where memory ran out again after relieve()."""
        reliever = self.reliever() if self.reliever is not None else None
        return ShortageError(words) if reliever is None else reliever.exhausted(weight.name, words)

    @property
    def read_ahead_bytes(self) -> int:
        """Bytes of weights that were read for operators still to come, or are on their way."""
        with self._lock:
            return sum(reader.ahead_bytes for reader in list(self._readers))

    def drop_ahead(self) -> None:
        """Drop everything that was read ahead, and uses held beyond their operator."""
        with self._lock:
            for reader in list(self._readers):
                reader.forget()

    def load(self, weights: Sequence[Weight], progress: Callable[[int], object]) -> None:
        """Bring `weights`, all meant to stay, to where they stay; `progress` is told bytes as they come."""
        for weight in weights:
            if not self.device.bring(weight):
                Coordinator.whole(self, weight)  # no operator asks here: nothing for a subclass to write down
            progress(weight.nbytes)

    def change_residents(
        self, leave: Sequence[Weight], join: Sequence[Weight], on_leave: Callable[[Weight], None]
    ) -> None:
        """Stream the weights in `leave` from now on, and keep those in `join` from their next use on.

        `on_leave` is called, under the lock, for each that was resident already. Its memory goes back to the kernel
        when the last tensor on it dies: operators that run with it now are not disturbed.
        """
        with self._lock:
            for weight in join:
                weight.wants_residence = True
            for weight in leave:
                self._unsettle(weight, on_leave)
                self.device.release(weight)

    def _unsettle(self, weight: Weight, on_leave: Callable[[Weight], None]) -> None:
        weight.wants_residence = False
        if weight.resident is not None:
            weight.resident = None
            on_leave(weight)
            if not weight.rows_only:
                self._trace.put_back(weight, lambda other: other.resident is not None)

    def renew_memory(
        self,
        leave: Sequence[Weight],
        join: Sequence[Weight],
        places: Sequence[Weight],
        window_bytes: int,
        on_leave: Callable[[Weight], None],
    ) -> bool:
        """Give all weights' memory back, and take it anew: a window, and a place for each of `places`.

        `leave` are all that were to be resident, `join` all that are to be. False, with nothing changed, while tensors
        on the window are in use, by other threads' operators or by callers; look-ahead is dropped even so. Raises
        ClosedError, and BudgetError where the machine refuses the memory.
        """
        with self._lock:
            self.refuse_closed()
            self.drop_ahead()
            if self.device.in_use:
                gc.collect()
                if self.device.in_use:
                    return False
            for weight in leave:
                self._unsettle(weight, on_leave)
            self.device.renew_memory(places, join, window_bytes)
            staying = set(join)
            self.change_residents([weight for weight in leave if weight not in staying], join, on_leave)
            return True

    def close(self) -> None:
        """Drop every read, drain the engine, give the memory back. Streamed uses raise ClosedError after."""
        with self._lock:
            self._closed = True
            self.drop_ahead()
        self.device.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def refuse_closed(self) -> None:
        """Raises ClosedError after close()."""
        if self._closed:
            raise ClosedError("this model was closed; call zinfer.run again to use it")

    def _reader(self) -> Reader:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = Reader(self._trace)
            with self._lock:
                self._readers.add(reader)
        return reader

    def _give_up(self, reader: Reader, fetch: Fetching, failed: bool) -> None:
        """Drop what `reader` was reading, so that the next use reads anew instead of meeting an old failure."""
        with self._lock:
            reader.forget()
            if failed and self._current(fetch.weight) is fetch:
                fetch.weight.fetch = None

    def _current(self, weight: Weight) -> Fetching | None:
        """The read that another reader, or an earlier prediction, already has for `weight`."""
        return weight.fetch() if weight.fetch is not None else None

    def _extend(self, reader: Reader) -> None:
        now = time.monotonic()
        for other in list(self._readers):
            if other is not reader and now - other.touched > IDLE_READER:
                other.forget()  # what it read ahead would only keep room from those that run
        active = sum(1 for other in self._readers if now - other.touched < IDLE_READER)
        reader.extend(
            lambda weight: self._current(weight) or self.device.start(weight, urgent=False),
            (self.device.ahead_bytes or LOADING_AHEAD) // max(1, active),
            len(self._streamed),
            self._streamed_bytes // FIRST_SHARE,
        )
        reader.lift(self.device.lift)

    def _room_came(self) -> None:
        """Called by a thread of the device's: read on, though no operator gave anything back."""
        with self._lock:
            if self._closed or self._line:
                return
            now = time.monotonic()
            for reader in list(self._readers):
                if now - reader.touched < IDLE_READER:
                    self._extend(reader)

    def _make_room(self, weight: Weight, unlifted: list[Fetching | None]) -> Fetching:
        """Take room back from reads that are needed later, until `weight` can come all the way; start it if need be.

        `unlifted`: its read, if there is one, which nobody else but look-ahead may hold.
        """
        ticket = object()
        patience = self.device.patience if len(self._readers) == 1 else ROOM_DEADLINE
        deadline = time.monotonic() + patience
        try:  # before the ticket is in line: a Ctrl-C in between would leave it there for good
            with self._lock:
                self._line.append(ticket)
            return self._wait_in_line(weight, unlifted, ticket, deadline)
        finally:
            with self._lock:
                if ticket in self._line:
                    self._line.remove(ticket)

    def _wait_in_line(
        self, weight: Weight, unlifted: list[Fetching | None], ticket: object, deadline: float
    ) -> Fetching:
        """What `unlifted` has, or one started here, with room.

        All that comes free is the first one's, or large weights starve; so nobody else waits with a read that has room
        on the host alone, which the first may need.
        """
        waits, device, fetch = 0, self.device, unlifted.pop()
        while True:
            late = (
                time.monotonic() > deadline
            )  # asked first: what comes free during the last wait is tried for
            with self._lock:
                self.refuse_closed()
                first = self._line[0] is ticket
                if fetch is None:
                    fetch = self._current(weight) or (device.start(weight, urgent=True) if first else None)
                if not first and fetch is not None and not fetch.lifted:
                    fetch = None
                ready = fetch is not None and (fetch.lifted or (first and device.lift(fetch)))
                dropped = not ready and first and self._drop_one(weight)
            if not ready and not first:
                time.sleep(TURN)
            elif not ready and not dropped:
                # Only tensors that operators or callers hold are left: other threads' come back, and those
                # that nobody can reach any more sit in reference cycles.
                if fetch is None:
                    fetch = device.start(weight, urgent=True, timeout=POLL)
                else:
                    device.lift(fetch, POLL)
                waits += 1
                if waits in (1, 10) and (fetch is None or not fetch.lifted):
                    gc.collect()
            if fetch is not None and fetch.lifted:
                return fetch
            if late:
                raise device.shortage(weight)

    def _drop_one(self, weight: Weight) -> bool:
        """Give up the read that is needed last, over all readers; then uses held beyond their operator."""

        for reader in sorted(self._readers, key=lambda reader: (reader.touched, -len(reader.queue))):
            if reader.drop_farthest():
                return True
        for reader in self._readers:
            if reader.held is not None and reader.held.weight is not weight:
                reader.held = None
                return True
        return False

    def _wait(self, fetch: Fetching) -> torch.Tensor:
        if fetch.done:
            return fetch.wait()
        started = time.perf_counter()
        tensor = fetch.wait()
        self._waited(fetch.weight.name, started)
        return tensor

    def _waited(self, name: str, since: float) -> None:
        """Count the time since `since` (time.perf_counter) as a wait of the calling thread for the weight `name`."""
        waited = time.perf_counter() - since
        self.device.tally.waited += waited
        with self._lock:
            self.counters.wait_seconds += waited
            by_weight = self.counters.waits_by_weight
            by_weight[name] = by_weight.get(name, 0.0) + waited

    def _settle(self, fetch: Fetching, tensor: torch.Tensor, reader: Reader) -> None:
        weight = fetch.weight
        with self._lock:
            # Asked again, under the lock: another thread's cache may have needed the memory meanwhile.
            wanted = weight.wants_residence and fetch.generation == self.device.generation
            if wanted and weight.resident is None and not self._closed:
                weight.resident = tensor
                self._on_resident(weight, tensor)
            reader.held = None
