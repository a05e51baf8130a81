"""A pretend accelerator: memory apart and threads that copy to it, on the CPU, so that every machine can try the path.

It computes on the CPU, at once, but behaves as a GPU does where that matters: copies run on threads of their own, as
late and in such an order as a script says; memory that was given back counts as in use until a scripted moment
later, and must not have changed by then; after that it is poisoned. A copy knows addresses, as a GPU's queue does: it
keeps neither side alive but for the block on the device, which an allocator would. A runtime that recycles memory too
early is caught by a difference in the bytes, here or in the results.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from zinfer.device.processor import ALIGNMENT, POISON, Event
from zinfer.errors import OutOfMemoryError

URGENT, ORDINARY = "urgent", "ordinary"
INTO, BACK = "into", "back"
Delay = Callable[
    [str], float
]  # seconds to wait before an "urgent", "ordinary", "into" or "back" copy runs, or a "fence" is reached


def no_delay(kind: str) -> float:
    """Nothing is late."""
    return 0.0


class StagedEvent:
    """See Event. An error that kept it from being reached is raised by wait()."""

    timed = True

    def __init__(self, transferred: int | None = None) -> None:
        self.transferred = transferred
        self.started: float | None = None
        self.finished: float | None = None
        self._reached = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has been reached."""
        return self._reached.is_set()

    def wait(self) -> None:
        """Block the calling thread until it has been reached."""
        self._reached.wait()

    def reach(self, started: float | None = None) -> None:
        """It has been reached now."""
        self.started, self.finished = started, time.perf_counter()
        self._reached.set()


class StagedProcessor:
    """`nbytes` of memory apart, for one model. `delay` scripts how late things are; `check`: look for races.

    `races` lists what was found, and `peak` is the most bytes that were allocated at once, for tests. Copies of one
    urgency run one after the other.
    """

    torch_device = torch.device("cpu")
    name = "staged"
    page_locks = False
    overhead = 0
    keeps_residue = True

    def __init__(self, nbytes: int, *, delay: Delay = no_delay, check: bool = False) -> None:
        self.races: list[str] = []
        self._total = nbytes
        self._limit: int | None = None
        self._allocated = self._claimed = self.peak = 0
        self._delay = delay
        self._check = check
        self._lock = threading.RLock()
        self._closed = False
        self._jobs: dict[str, queue.SimpleQueue[Callable[[], None] | None]] = {}
        self._copying: list[tuple[StagedEvent, list[Span]]] = []
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()  # by address

    def current(self) -> AbstractContextManager[Any]:
        """See Processor. There is nothing to choose."""
        return nullcontext()

    def memory(self) -> tuple[int, int]:
        """Bytes that can be allocated now, and all there are."""
        return max(0, self._total - self._claimed - self._allocated), self._total

    def free(self) -> int:
        """See Processor."""
        return self.memory()[0]

    def claim(self, nbytes: int) -> None:
        """Another process has taken `nbytes` of the memory, which this one cannot allocate; 0: it has ended."""
        with self._lock:
            self._claimed = nbytes

    @property
    def left(self) -> int:
        """Bytes that this process can still allocate, within its limit."""
        with self._lock:
            most = self._total - self._claimed
            return max(0, (most if self._limit is None else min(self._limit, most)) - self._allocated)

    def limit(self, nbytes: int | None) -> None:
        """See Processor."""
        self._limit = nbytes

    def block(self, nbytes: int) -> Any:
        """See Processor."""
        with self._lock:
            if nbytes > self.left:
                raise OutOfMemoryError(
                    f"the staged device has {self.left} of {self._total} bytes left; tried to allocate {nbytes} bytes"
                )
            self._allocated += nbytes
            self.peak = max(self.peak, self._allocated)
        block = Block(nbytes)
        weakref.finalize(block, self._freed, nbytes).atexit = False
        self._blocks[torch.frombuffer(block, dtype=torch.uint8).data_ptr()] = block
        return block

    def allocated(self, nbytes: int) -> int:
        """See Processor. There is no rounding."""
        return nbytes

    def reclaim(self) -> None:
        """See Processor. What was given back is held by the thread that plays the fences until then."""
        event = StagedEvent()
        with self._lock:
            if self._closed:
                return
            self._worker("fence").put(event.reach)
        event.wait()

    def over(self, block: Any, start: int, nbytes: int) -> tuple[torch.Tensor, Any]:
        """See Processor."""
        view = memoryview(block)[start : start + nbytes]
        with torch.inference_mode(False):
            return torch.frombuffer(view, dtype=torch.uint8), view

    def stream(self) -> Any:
        """See Processor."""
        return None

    def copy(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, urgent: bool
    ) -> Event:
        """See Processor."""
        return self._start(moves, after, URGENT if urgent else ORDINARY)

    def copy_cache(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, back: bool
    ) -> Event:
        """See Processor."""
        return self._start(moves, after, BACK if back else INTO)

    def _start(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], kind: str
    ) -> Event:
        spans = [Span(target.data_ptr(), source.data_ptr(), source.nbytes) for target, source in moves]
        held = [block for span in spans for block in self._blocks_of(span)]
        event = StagedEvent(sum(span.nbytes for span in spans))
        with self._lock:
            self._copying = [*(one for one in self._copying if not one[0].done), (event, spans)]
        self._worker(kind).put(partial(self._copy, spans, held, tuple(after), kind, event))
        return event

    def _blocks_of(self, span: Span) -> list[Block]:
        """Those that it reads or writes: what an allocator would not give away before the copy has run."""
        return [
            block
            for start, block in list(self._blocks.items())
            if start <= span.target < start + len(block) or start <= span.source < start + len(block)
        ]

    def follow(self, event: Event) -> None:
        """See Processor. Operators run in the calling thread, which has to wait itself."""
        event.wait()

    def fence(self, stream: Any) -> Event:
        """See Processor. Operators have run when they return."""
        event = StagedEvent()
        event.reach()
        return event

    def used(self, tensor: torch.Tensor, stream: Any) -> None:
        """See Processor. Operators have run when they return."""

    def retire(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> list[Event]:
        """See Processor. As if a kernel still read it: reached late, and then nothing may have changed."""
        if not streams or self._closed:
            return []
        event = StagedEvent()
        tensor = self.over(block, start, nbytes)[0]
        # What a copy still writes to was dropped before anybody could read it: nothing to look at.
        before = None if self._in_a_copy(tensor, "target") else self._sum(tensor)
        self._worker("fence").put(partial(self._retire, [tensor], before, event))
        return [event]

    def let_go(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> None:
        """See Processor. Whatever waits for the fence holds the memory."""
        self.retire(block, start, nbytes, streams)

    def close(self) -> None:
        """See Processor."""
        with self._lock:
            self._closed = True  # what is given back from here on is not used anew
            for jobs in self._jobs.values():
                jobs.put(None)
            self._jobs.clear()

    def _worker(self, kind: str) -> queue.SimpleQueue[Callable[[], None] | None]:
        with self._lock:
            jobs = self._jobs.get(kind)
            if jobs is None:
                jobs = self._jobs[kind] = queue.SimpleQueue()
                threading.Thread(target=_work, args=(jobs,), name=f"staged-{kind}", daemon=True).start()
            return jobs

    def _copy(
        self,
        spans: Sequence[Span],
        held: list[Block],
        after: Sequence[Event],
        kind: str,
        event: StagedEvent,
    ) -> None:
        for earlier in after:
            earlier.wait()
        self._sleep(kind)
        started = time.perf_counter()
        for span in spans:
            ctypes.memmove(span.target, span.source, span.nbytes)
        held.clear()
        event.reach(started)

    def _retire(self, held: list[torch.Tensor], before: int | None, event: StagedEvent) -> None:
        self._sleep("fence")
        tensor = held.pop()
        self._look(tensor, before)
        if before is not None and not self._in_a_copy(tensor, "source"):
            tensor.fill_(POISON)
        del tensor
        event.reach()

    def _in_a_copy(self, tensor: torch.Tensor, side: Literal["source", "target"]) -> bool:
        """Whether a copy that has not run reads from it ("source") or writes to it.

        Of the first the next holder is told apart from fences: see Lease.copied.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        with self._lock:
            return any(
                start < getattr(span, side) + span.nbytes and getattr(span, side) < end
                for event, spans in self._copying
                if not event.done
                for span in spans
            )

    def _look(self, tensor: torch.Tensor, before: int | None) -> None:
        if before is not None and self._sum(tensor) != before:
            self.races.append(f"{tensor.nbytes} bytes were written while operators could still read them")

    def _sum(self, tensor: torch.Tensor) -> int | None:
        return zlib.crc32(tensor.numpy().tobytes()) if self._check else None

    def _sleep(self, kind: str) -> None:
        seconds = self._delay(kind)
        if seconds > 0:
            time.sleep(seconds)

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self._allocated -= nbytes


class Span(NamedTuple):
    """One copy in numbers: addresses, and how many bytes."""

    target: int
    source: int
    nbytes: int


class Block(mmap.mmap):
    """Memory of a staged device: a buffer of ordinary memory, aligned to ALIGNMENT."""

    def __new__(cls, nbytes: int) -> Block:
        """At least `nbytes` bytes, zero."""
        return super().__new__(cls, -1, max(nbytes, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
