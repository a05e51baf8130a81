"""Experts in host memory: a slot for each, read when a router picks it, kept as long as there is room."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zinfer.device.host import Host, flagged, view_of
from zinfer.errors import BudgetError, ClosedError
from zinfer.experts.layers import Expert
from zinfer.experts.slots import Slots
from zinfer.pinned import Pool

PATIENCE = 30.0  # seconds to wait for a slot that others hold
TURN = 0.001  # seconds between two looks for one
LOOK_EVERY = 0.0002  # seconds between looks which of several experts has landed


class Slot:
    """One expert, on its way or there. `users`: passes that want it now; nobody else may have its memory meanwhile."""

    __slots__ = ("expert", "memory", "request", "tensors", "users")

    def __init__(self, expert: Expert, memory: Any, request: Any) -> None:
        self.expert = expert
        self.memory: Any = memory
        self.request: Any = request
        self.tensors: list[torch.Tensor] | None = None
        self.users = 1


class Counters:
    """Since the start: experts that were asked for and there, or not; bytes read for those; seconds waited."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.read_bytes = 0
        self.evictions = 0
        self.wait_seconds = 0.0


class ExpertCache:
    """At most `count` experts of at most `slot_bytes`, read through `host`.

    Any thread may call any method; one lock guards it.

        absent --picked--> reading --landed--> there --evicted--> absent
                                        (users > 0: neither evicted nor given back)

    The least recently used leaves first. Where one layer's experts do not fit together, they pass through: those that
    were computed with make room for the next.
    """

    def __init__(self, host: Host, count: int, slot_bytes: int) -> None:
        self._host = host
        self._lock = threading.RLock()
        self._experts: OrderedDict[Expert, Slot] = OrderedDict()  # the least recently used first
        self.allowed = count  # slots
        self._memory = Slots(count, slot_bytes)
        self._closed = False
        self.counters = Counters()

    @property
    def pool(self) -> Pool:
        """Where the slots lie."""
        return self._memory.pool

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self._memory.nbytes

    @property
    def limit(self) -> int:
        """Bytes that experts may take now."""
        return self.allowed * self.slot_bytes

    @property
    def count(self) -> int:
        """Experts that are there or on their way."""
        return len(self._experts)

    def arrivals(self, wanted: Sequence[Expert]) -> Iterator[tuple[Expert, list[torch.Tensor]]]:
        """Each of `wanted` with its tensors, in the order of landing; valid until the next one is asked for.

        All that are missing are requested at once, as far as there is room. Raises DriveError,
        CheckpointChangedError, ClosedError, and BudgetError where not even one has room.
        """
        held: list[Slot] = []
        waiting = deque(wanted)
        try:
            with self._lock:
                self._request(waiting, held, first=True)
            while held or waiting:
                if not held:
                    self._wait_for_room(waiting, held)
                slot = self._landed(held)
                yield slot.expert, self._tensors(slot)
                held.remove(slot)
                with self._lock:
                    self._done(slot)
                    self._request(waiting, held)
        finally:
            with self._lock:
                for slot in held:
                    self._done(slot)

    def _wait_for_room(self, waiting: deque[Expert], held: list[Slot]) -> None:
        """Other threads compute with all there is, or somebody keeps tensors: ask again and again."""
        deadline = time.monotonic() + PATIENCE
        while not held:
            if time.monotonic() > deadline:
                self._refuse(waiting[0])
            time.sleep(TURN)
            with self._lock:
                self._request(waiting, held)

    def resize(self, limit: int) -> None:
        """Take at most `limit` bytes from now on, or those of one slot; memory that is not needed goes back."""
        with self._lock:
            allowed = max(1, min(limit // self.slot_bytes, self._memory.count))
            if allowed == self.allowed:
                return
            self.allowed = allowed
            while len(self._experts) > allowed and (victim := self._victim()) is not None:
                self._evict(victim)
            self._memory.allow(allowed)

    def close(self) -> None:
        """Drop every expert and give the memory back as soon as the last tensor on it dies."""
        with self._lock:
            self._closed = True
            self._experts.clear()
        self._memory.close()

    def _request(self, waiting: deque[Expert], held: list[Slot], *, first: bool = False) -> None:
        """Take or start those `waiting`, until there is no room. `first`: those that are there come first."""
        if self._closed:
            raise ClosedError("this model was closed; call zinfer.run again to use it")
        if first:
            for expert in [expert for expert in waiting if expert in self._experts]:
                waiting.remove(expert)
                self._take(expert, held)
        while waiting:
            expert = waiting[0]
            if expert in self._experts:  # another thread has asked for it meanwhile
                self._take(waiting.popleft(), held)
                continue
            room = self._make_room()
            if room is None:
                return
            waiting.popleft()
            memory, address = room
            request = self._host.read(expert.layout, memory, address, urgent=True)
            self._host.note(request, expert.name, "demand")
            slot = self._experts[expert] = Slot(expert, memory, request)
            del memory, room
            held.append(slot)
            self.counters.misses += 1
            self.counters.read_bytes += request.nbytes

    def _take(self, expert: Expert, held: list[Slot]) -> None:
        slot = self._experts[expert]
        slot.users += 1
        self._experts.move_to_end(expert)
        held.append(slot)
        self.counters.hits += 1

    def _make_room(self) -> tuple[memoryview, int] | None:
        while (room := self._memory.take()) is None:
            victim = self._victim()
            if victim is None:
                return None
            self._evict(victim)
        return room

    def _victim(self) -> Expert | None:
        return next((expert for expert, slot in self._experts.items() if not slot.users), None)

    def _evict(self, expert: Expert) -> None:
        slot = self._experts.pop(expert)
        self.counters.evictions += 1
        if slot.tensors is not None:
            slot.tensors.clear()  # the list may still be a caller's, and would keep the memory
        slot.memory = slot.request = None

    def _done(self, slot: Slot) -> None:
        slot.users -= 1
        failed = slot.tensors is None and slot.request is not None and slot.request.done
        if failed and not slot.users and self._experts.get(slot.expert) is slot:
            # Nobody has seen its bytes: whoever asks next reads anew rather than meet an old failure.
            self._evict(slot.expert)

    def _landed(self, held: list[Slot]) -> Slot:
        """One of `held` that is there, waiting for the first to land if none is."""
        started = None
        while True:
            for slot in held:
                if slot.tensors is not None or slot.request.done:
                    if started is not None:
                        self.counters.wait_seconds += time.perf_counter() - started
                    return slot
            if started is None:
                started = time.perf_counter()
            held[0].request.wait(LOOK_EVERY)

    def _tensors(self, slot: Slot) -> list[torch.Tensor]:
        if slot.tensors is None:
            slot.request.wait()
            self._host.refuse_changes(slot.expert.paths)
            with self._lock:
                if slot.tensors is None:
                    slot.tensors = _views(slot.expert, slot.memory)
                    slot.request = None
        return slot.tensors

    def _refuse(self, expert: Expert) -> None:
        raise BudgetError(
            f"{expert.name} needs {expert.nbytes} bytes of the {self.limit} that experts may take, which other "
            f"threads or the caller hold; raise max_memory['cpu'] by {expert.nbytes} bytes"
        )


def _views(expert: Expert, memory: Any) -> list[torch.Tensor]:
    """Its tensors. Each is a view of a leaf, as `weight[index]` is in memory: torch chooses kernels by that."""
    found = []
    with torch.inference_mode(False), torch.no_grad():
        for placed, start, trained in zip(
            expert.placements, expert.layout.starts, expert.requires_grad, strict=True
        ):
            found.append(flagged(view_of(memory, start, placed).unsqueeze(0), trained)[0])
    return found
