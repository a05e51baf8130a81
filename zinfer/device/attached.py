"""A device with memory of its own: weights go from the drive to host memory, and from there to the device."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from zinfer.device.arena import Arena, Lease
from zinfer.device.assembly import Assembly, Move
from zinfer.device.copies import Copies
from zinfer.device.host import Host, flagged
from zinfer.device.lifted import LiftedFetch
from zinfer.device.moved import Moved, Spare
from zinfer.device.page_locks import PageLocks
from zinfer.device.processor import Event, Processor
from zinfer.device.refusals import Refusals
from zinfer.device.rows import Rows
from zinfer.device.streams import Streams
from zinfer.errors import BudgetError, OutOfMemoryError
from zinfer.pinned import Pool
from zinfer.timeline.recorder import Recorder
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")

MEMORY = "host memory"  # what the report calls it
WHOLE_SHARE = 4  # of a table in host memory: where more than this part is looked up, all of it is copied


class Kept(NamedTuple):
    """Memory that a weight lies in on the host, and its mapping, at whose slab edges copies are cut."""

    memory: Any
    pool: Pool | None


class AttachedDevice(Host):
    """A Host, and a window on `processor` that weights pass through; residents there have memory of their own.

    Tiers: a weight that `wants_residence` comes to stay on the device; one in `on_host` stays in a page-locked place
    in host memory and is copied at each use; the others come from the drive each time. Reads fill the host's window
    and copies the device's, both ahead of the operators: threads of its own start each copy as its read lands.
    A weight that has to leave the device stays in host memory from its next use on, as far as what is `spare` goes.
    `limit`: the bytes that may be allocated on the device from now on until it is closed, or dropped; None: as many as
    it has. Any thread may call any method.
    """

    patience = 10.0  # copies and their threads give memory back, when they come to it

    def __init__(
        self,
        processor: Processor,
        paths: Sequence[str],
        on_host: Sequence[Weight],
        host_window: int,
        device_window: int,
        bounce: int,
        *,
        limit: int | None = None,
        spare: Spare | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.processor = processor
        self.torch_device = processor.torch_device
        self.name = processor.name
        self._kept: dict[Weight, Kept] = {}  # weights that have come to stay in host memory
        self._bringing = threading.RLock()
        self.page_locks = PageLocks(processor)
        self._refusals = Refusals(processor.name)
        self._streams = Streams(processor)
        self._assembly = Assembly(processor, self._streams)
        self._arena: Arena | None = None
        self._copies: Copies | None = None
        lock: Literal["auto", "off"] = "auto" if processor.page_locks else "off"
        spare = spare or Spare(0)
        self.spare_bytes = spare.nbytes  # of the host's, for weights that leave the device
        self._moved = Moved(processor, spare, self._kept, lock)
        self._rows = Rows(processor, lock)
        holder = object()  # of the limit: the processor may have other devices
        self._lift_limit = weakref.finalize(self, processor.limit, None, holder)
        self._lift_limit.atexit = False
        try:
            if limit is not None:
                processor.limit(limit, holder)
            with processor.current():  # memory is page-locked through it
                super().__init__(paths, on_host, host_window, bounce, page_lock=lock, recorder=recorder)
        except BaseException:
            self._lift_limit()
            raise
        try:
            self._arena = Arena(processor, device_window) if device_window else None
            self.page_locks.check(self.pools, MEMORY, self._arena)
            self._copies = Copies(partial(_tell, weakref.ref(self)), processor.current)
            # Threads hold what they work with: where nobody closes, they have to end with the device.
            weakref.finalize(self, _end, self._copies, processor).atexit = False
        except BaseException:
            self.close()
            raise

    @property
    def fallbacks(self) -> list[str]:
        """As Host.fallbacks."""
        return [
            *super().fallbacks,
            *self.page_locks.notes,
            *self._refusals.notes,
            *self._moved.notes,
        ]

    @property
    def pools(self) -> list[Pool]:
        """As Host.pools."""
        return [*super().pools, *self._moved.pools]

    @property
    def ahead_bytes(self) -> int:
        """Bytes of weights that can be on their way at once; 0 where nothing streams."""
        host = self.window.capacity if self.window is not None else 0
        return host + (self._arena.capacity if self._arena is not None else 0)

    @property
    def window_bytes(self) -> int:
        """See Device."""
        return self._arena.capacity if self._arena is not None else 0

    @property
    def in_use(self) -> int:
        """Bytes of the device's window that hold a weight, or are being copied into."""
        return self._arena.in_use if self._arena is not None else 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights that have come to stay in host memory."""
        return sum(weight.nbytes for weight in list(self._kept) if not weight.wants_residence)

    def close(self) -> None:
        """Drain every read and copy, and give the memory back as soon as the last tensor on it dies."""
        super().close()
        if self._copies is not None:
            self._copies.close()
        if self._arena is not None:
            self._arena.close()
        self._kept.clear()
        self._moved.close()
        self._rows.close()
        self._lift_limit()
        self.processor.close()

    def release(self, weight: Weight) -> None:
        """Find `weight` a place in host memory. That on the device is its own, and goes with the last tensor on it."""
        pool = None if self.in_place(weight) else self._moved.give_place(weight)
        if pool is not None:
            self.page_locks.check([pool], MEMORY, self._arena)

    def enter(self) -> None:
        """The calling thread runs operators from now on."""
        self._streams.enter()

    def renew_memory(self, places: Sequence[Weight], wanted: Sequence[Weight], window_bytes: int) -> None:
        """Give the device's window back and take another one. Nobody may use it; the host's memory stays as it is."""
        if self._arena is not None:
            self._arena.close()
        self._arena = None
        self.reclaim()
        self.generation += 1
        self._arena = Arena(self.processor, window_bytes) if window_bytes else None

    def reclaim(self) -> None:
        """See Processor."""
        self.processor.reclaim()

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now."""
        return self.processor.memory()[0]

    def in_place(self, weight: Weight) -> bool:
        """Whether a fetch of `weight` would take no room in the host's window."""
        return self._moved.pool(weight) is not None or (
            self.residents is not None and self.residents.has(weight)
        )

    def settles(self, weight: Weight) -> bool:
        """See Device."""
        return weight.wants_residence and (self.in_place(weight) or self.has_window_for(weight))

    def start(self, weight: Weight, *, urgent: bool, timeout: float = 0.0) -> LiftedFetch | None:
        """Begin to bring `weight` to the device, or None when the host's window has no room within `timeout`.

        The fetch goes on to the device once `lift` has found room for it there.
        """
        generation, request = self.generation, None
        there = self._kept.get(weight)
        in_place = there is not None
        if there is None:
            place = self._place(weight, timeout)
            if place is None:
                return None
            there, address = place
            in_place = there.pool is not self.window
            request = self.read(weight.layout, there.memory, address, urgent)
            self.note(request, weight.name, "demand" if urgent else "prefetch")
        fetch = LiftedFetch(
            weight,
            request,
            there.memory,
            partial(self._start_copy, weight, there.pool, in_place and request is not None),
            self._copying,
            partial(self._assembly.tensor_of, weight),
            self._follow,
            in_place=in_place,
            settles=weight.wants_residence,
            generation=generation,
        )
        weight.fetch = weakref.ref(fetch)
        return fetch

    def _place(self, weight: Weight, timeout: float) -> tuple[Kept, int] | None:
        """Memory on the host to read `weight` to, and its address; None when there is none within `timeout` seconds."""
        moved = self._moved.pool(weight)  # asked once: it may be taken away meanwhile
        if moved is None and self.residents is not None and self.residents.has(weight):
            view, address = self.residents.take(weight)
            return Kept(view, self.residents.pool), address
        if moved is None:
            pool, memory = self.window, self.window_room(weight, timeout)
        else:
            pool, memory = moved, moved.acquire(weight.layout.nbytes, timeout)
        return None if memory is None else (Kept(memory, pool), memory.address)

    def _pool_of(self, weight: Weight) -> Pool | None:
        """The mapping that `weight` is read into now."""
        moved = self._moved.pool(weight)
        if moved is not None:
            return moved
        if self.residents is not None and self.residents.has(weight):
            return self.residents.pool
        return self.window

    def _keep(self, weight: Weight, there: Kept) -> None:
        """`weight` stays `there`, unless it lost the place while it came. See Moved, which takes no lock either."""
        self._kept[weight] = there
        # Asked afterwards: who takes a place away, or closes, empties `_kept` after that. So one of both finds it.
        if self._closed or self._pool_of(weight) is not there.pool:
            self._kept.pop(weight, None)

    def bring(self, weight: Weight) -> bool:
        """Read `weight` to its place in host memory and wait for it, if it has one; whether it has."""
        if not self.in_place(weight) or weight.wants_residence:
            return False
        with self._bringing:  # who comes second finds it there
            if weight not in self._kept:
                place = self._place(weight, self.patience)
                if place is None:
                    return False
                there, address = place
                request = self.read(weight.layout, there.memory, address, urgent=True)
                self.note(request, weight.name, "demand")
                request.wait()
                self.refuse_changes({piece.run.path for piece in weight.layout.pieces})
                self._keep(weight, there)
        return True

    def lift(self, fetch: LiftedFetch, timeout: float = 0.0) -> bool:
        """Find room on the device for `fetch`, from where on it goes there by itself; whether there was any.

        A weight that was to stay, and has no memory for it, goes through the window from then on. Raises
        OutOfMemoryError where it does not fit there either: not before memory is divided anew.
        """
        with fetch.lifting:
            if fetch.lease is not None:
                return True
            weight = fetch.weight
            nbytes = self._assembly.layout(weight).nbytes
            lease = self._own_memory(nbytes) if fetch.settles else None
            if lease is None:
                arena = self._arena
                if arena is None or nbytes > arena.capacity:
                    raise OutOfMemoryError(
                        f"{self.processor.name} tried to allocate {nbytes} bytes for {weight.name!r}, and the window "
                        f"there holds {self.window_bytes}: end what else uses its memory"
                    )
                if fetch.settles:
                    fetch.settles = False
                    self.refused(weight)
                lease = arena.acquire(nbytes, timeout)
            elif fetch.settles:
                self._refusals.came_back(weight)
            if lease is None:
                return False
            fetch.lease = lease
        if self._copies is not None:
            self._copies.add(fetch)
        return True

    def own_arena(self, nbytes: int) -> Arena | None:
        """Memory of its own on the device, for what any operator may read; None where there is not enough."""
        try:
            return Arena(self.processor, nbytes, self._streams.known)
        except BudgetError:
            return None

    def _own_memory(self, nbytes: int) -> Lease | None:
        """Memory of its own on the device for a weight that is to stay; None where there is not enough."""
        own = self.own_arena(nbytes)
        lease = own.acquire(nbytes) if own is not None else None
        if own is not None:
            own.close()
        return lease

    def refused(self, weight: Weight) -> None:
        """See Device: it streams from now on, and what it would have taken counts as lost (see residency.py)."""
        weight.wants_residence = False
        self.refused_bytes = self._refusals.add(weight, self._assembly.layout(weight).nbytes)

    def shortage(self, weight: Weight) -> BudgetError:
        """What to raise where `weight` waited for room in vain."""
        host = self.window.in_use if self.window is not None else 0
        return BudgetError(
            f"{weight.name!r} needs {self._assembly.layout(weight).nbytes} bytes of the window on "
            f"{self.processor.name}, but {self.in_use} of its {self.window_bytes} bytes (and {host} of the host's) are "
            "held by tensors still in use (an operator that takes several weights, or views kept by the caller); raise "
            f"max_memory by {weight.layout.nbytes} bytes"
        )

    def read_rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """As Host.read_rows, on the device; of a table in host memory all rows, where many are asked for.

        A weight that has a place in host memory is read to it whole, once. Nobody waits for the copies: they are
        followed on the device.
        """
        if self.in_place(weight):
            self.bring(weight)
        kept, source = self._kept.get(weight), weight.row_source
        residue = self._assembly.row_residue(weight, rows)
        if kept is None or source is None or not source.nbytes:
            found = self._rows.copied(super().read_rows(weight, rows), residue)
            return flagged(found, weight.requires_grad)
        many = len(rows) > max(1, source.shape[0] // WHOLE_SHARE)
        table = self._table(weight, kept) if many and weight.placed is not None else None
        if table is not None:
            return table
        found = self._rows.gathered(kept.memory, weight.layout.starts[0], source, rows, residue)
        with torch.inference_mode(False), torch.no_grad():
            return flagged(found.to(weight.dtype), weight.requires_grad)

    def _table(self, weight: Weight, kept: Kept) -> torch.Tensor | None:
        """All of `weight`, which lies in `kept`, in the device's window; None where that has no room now."""
        arena, nbytes = self._arena, self._assembly.layout(weight).nbytes
        lease = arena.acquire(nbytes) if arena is not None and nbytes <= arena.capacity else None
        if lease is None:
            return None
        event, sources = self._start_copy(weight, kept.pool, False, kept.memory, lease, True)
        self._copying(event, sources)
        self._follow(event, lease, None)
        return self._assembly.tensor_of(weight, lease, settles=False)[0]

    def _start_copy(
        self, weight: Weight, pool: Pool | None, stays: bool, memory: Any, lease: Lease, urgent: bool
    ) -> tuple[Event, list[Any]]:
        """Start to copy `weight` from `memory`; it stays there afterwards, or that goes back once it was copied.

        What has to be kept until the event comes with it.
        """
        self.refuse_changes({piece.run.path for piece in weight.layout.pieces})
        if stays:
            self._keep(weight, Kept(memory, pool))
        with torch.inference_mode(False), torch.no_grad():
            moves = self._assembly.moves(weight, memory, pool, lease.bytes)
            event = self._move(moves, lease, weight.name, urgent)
        return event, [memory, pool]  # the pool too: it counts as used until then

    def _move(self, moves: Sequence[Move], lease: Lease, name: str, urgent: bool) -> Event:
        event = self.processor.copy(moves, lease.after, urgent=urgent)
        lease.copied(event)
        if self._recorder is not None:
            self._recorder.copying(name, event)
        return event

    def copy_now(self, moves: Sequence[Move], lease: Lease, name: str, sources: list[Any]) -> Event:
        """Copy what is called `name` into `lease`, ahead of weights; `sources` are kept until that is done."""
        event = self._move(moves, lease, name, urgent=True)
        self._copying(event, sources)
        return event

    def follow(self, event: Event, lease: Lease) -> None:
        """The calling thread's operators read what is in `lease` from `event` on."""
        self._follow(event, lease, None)

    def _copying(self, event: Event, sources: list[Any]) -> None:
        if self._copies is not None:
            self._copies.started(event, sources)

    def _follow(self, event: Event, lease: Lease, made: torch.Tensor | None) -> None:
        """The calling thread's operators read what is in `lease`, or what a conversion `made` of it."""
        self.processor.follow(event)
        stream = self._streams.enter()
        lease.used_on(stream)
        if made is not None:
            self.processor.used(made, stream)


def _tell(device: weakref.ref[AttachedDevice]) -> None:
    """Room came free on the host."""
    owner = device()
    listener = owner.on_room() if owner is not None and owner.on_room is not None else None
    if listener is not None:
        listener()


def _end(copies: Copies, processor: Processor) -> None:
    copies.close()
    processor.close()
