"""Experts in host memory: a slot for each, read when a router picks it, kept as long as there is room."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Literal

import numpy as np
import torch

from zinfer.device.host import Host, flagged, view_of
from zinfer.errors import BudgetError, ClosedError
from zinfer.experts.eviction import Uses
from zinfer.experts.layers import Expert, ExpertLayer
from zinfer.experts.lookahead import Trust
from zinfer.experts.slots import Slots
from zinfer.experts.source import Landed
from zinfer.pinned import Pool

logger = logging.getLogger("zinfer")

PATIENCE = 30.0  # seconds to wait for a slot that others hold
TURN = 0.001  # seconds between two looks for one
LOOK_EVERY = 0.0002  # seconds between looks which of several experts has landed
CROWD = 2  # where more than one in so many of a layer are named, that is no guess
SELDOM = 8  # where guesses do not pay, one in so many is made
AHEAD_SHARE = 2  # of the slots, one in so many may hold guesses


class Slot:
    """One expert, on its way or there. `users`: passes that want it now; nobody else may have its memory meanwhile."""

    __slots__ = ("expert", "guessed", "memory", "request", "tensors", "users")

    def __init__(self, expert: Expert, memory: Any, request: Any, *, guessed: bool) -> None:
        self.expert = expert
        self.memory: Any = memory
        self.request: Any = request
        self.tensors: list[torch.Tensor] | None = None
        self.users = 0
        self.guessed = guessed  # and not yet picked


@dataclass
class Counters:
    """Since the start: experts that were asked for and there, or not; bytes read for those; seconds waited.

    `hits` were there before they were asked for or guessed; `misses` were not, and `foreseen` is how many of them were
    read, or being read, because they had been guessed. `guessed_bytes` were read for guesses that were wrong.
    """

    hits: int = 0
    misses: int = 0
    foreseen: int = 0
    read_bytes: int = 0
    guessed_bytes: int = 0
    evictions: int = 0
    wait_seconds: float = 0.0


class ExpertCache:
    """At most `count` experts of `layers`, of at most `slot_bytes` each, read through `host`. `page_lock` as for Pool.

    Any thread may call any method; one lock guards it.

        absent --picked, or guessed--> reading --landed--> there --evicted--> absent
                                              (users > 0: neither evicted nor given back)

    Those leave first whose next use is expected last: see eviction.py. Where one layer's experts do not fit together,
    they pass through: those that were computed with make room for the next.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[ExpertLayer],
        count: int,
        slot_bytes: int,
        page_lock: Literal["auto", "off"] = "off",
    ) -> None:
        self._host = host
        self._lock = threading.RLock()
        self._slots: dict[int, Slot] = {}  # by the experts' numbers
        self._uses = Uses([layer.count for layer in layers])
        self._idle = np.zeros(
            sum(layer.count for layer in layers), dtype=bool
        )  # there or coming, without users
        # By thread and position of the layer: numbers that were named and absent; and whether most of them were.
        self._guesses: dict[tuple[int, int], tuple[set[int], bool]] = {}
        self._cancelled: list[Any] = []  # reads of wrong guesses: what the drive has begun has to end
        self._unasked = 0  # guesses left out since the last one
        self._served = 0  # times that a pass was done with an expert
        self._needed = 0  # experts at once, where that was more than have room
        self.trust = Trust()
        self.looks_ahead = True
        self.allowed = count  # slots
        self._memory = Slots(count, slot_bytes, page_lock, host.numa_node)
        self.slot_bytes = self._memory.nbytes
        self._closed = False
        self.counters = Counters()

    @property
    def pool(self) -> Pool:
        """Where the slots lie."""
        return self._memory.pool

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return len(self._idle)

    @property
    def limit(self) -> int:
        """Bytes that experts may take now."""
        return self.allowed * self.slot_bytes

    @property
    def count(self) -> int:
        """Experts that are there or on their way."""
        return len(self._slots)

    def arrivals(
        self, layer: ExpertLayer, picked: Sequence[int], then: Callable[[], object] | None = None
    ) -> Generator[Landed, None, None]:
        """See ExpertSource; those that have landed together come together."""
        arriving = self._arriving(layer, deque(layer.experts[index] for index in picked), then)
        next(arriving)  # now, and not when the first is asked for
        return arriving

    def _arriving(
        self, layer: ExpertLayer, waiting: deque[Expert], then: Callable[[], object] | None
    ) -> Generator[Landed, None, None]:
        """Request all, yield nothing; then yield what lands."""
        held: list[Slot] = []
        try:
            with self._lock:
                self._refuse_closed()
                self._learn(layer, {expert.number for expert in waiting})
                for expert in [expert for expert in waiting if expert.number in self._slots]:
                    waiting.remove(expert)
                    self._take(expert, held)
                self._request(layer, waiting, held)
            if then is not None and not waiting:
                then()
            yield []
            while held or waiting:
                if not held:
                    self._wait_for_room(layer, waiting, held)
                landed = self._landed(held)
                yield [(slot.expert, self._tensors(slot)) for slot in landed]
                with self._lock:
                    for slot in landed:
                        held.remove(slot)
                        self._done(slot)
                    landed.clear()
                    self._request(layer, waiting, held)
        finally:
            with self._lock:
                for slot in held:
                    self._done(slot)

    def needs(self, picks: int) -> None:
        """See ExpertSource."""
        with self._lock:
            if picks <= self.allowed or picks <= self._needed:
                return
            self._needed = picks
            (note,) = self.notes
        logger.warning("%s; the report counts what follows", note)

    @property
    def notes(self) -> list[str]:
        """See ExpertSource."""
        needed, allowed = self._needed, self.allowed
        if needed <= allowed:
            return []
        return [
            f"a token takes {needed} experts of a layer, and {allowed} have room in host memory, so that none stays "
            "for the next token: raise max_memory['cpu']"
        ]

    def curious(self, picks: int, layer: ExpertLayer) -> bool:
        """See ExpertSource."""
        if not self.looks_ahead:
            return False
        if self.trust.share is None or self.trust.pays or CROWD * picks > layer.count:
            return True
        with self._lock:
            self._unasked = (self._unasked + 1) % SELDOM
            return self._unasked == 0

    def foresee(self, layer: ExpertLayer, guessed: Iterable[int], before: ExpertLayer) -> None:
        """See ExpertSource.

        What is guessed is read after everything that is asked for. A guess takes the slot of an expert that is
        expected to be used later than all others, but none that was picked or guessed.
        """
        with self._lock:
            if self._closed:
                return
            absent = [layer.experts[index] for index in guessed if 0 <= index < layer.count]
            crowd = CROWD * len(absent) > layer.count  # a long prompt: most will be picked, whoever is right
            named = {expert.number for expert in absent}
            absent = [expert for expert in absent if expert.number not in self._slots]
            self._forget_the_ended()
            self._guesses[get_ident(), layer.position] = {expert.number for expert in absent}, crowd
            if not self.looks_ahead or not (crowd or self.trust.pays):
                return
            room = self.allowed // AHEAD_SHARE
            protected = named | self._guessed
            victims = self._victims(before.position, protected)
            for expert in absent[:room]:
                memory = self._room(victims)
                if memory is None:
                    return
                self._start(expert, memory, urgent=False)

    def resize(self, limit: int) -> None:
        """See ExpertSource."""
        with self._lock:
            allowed = max(1, min(limit // self.slot_bytes, self._memory.count))
            if allowed == self.allowed:
                return
            self.allowed = allowed
            victims = self._victims(0, set())
            while len(self._slots) > allowed and (victim := next(victims, None)) is not None:
                self._evict(victim)
            self._memory.allow(allowed)

    def close(self) -> None:
        """Drop every expert and give the memory back as soon as the last tensor on it dies."""
        with self._lock:
            self._closed = True
            self._slots.clear()
            self._cancelled.clear()
            self._idle[:] = False
        self._memory.close()

    def _learn(self, layer: ExpertLayer, numbers: set[int]) -> None:
        """`layer` runs, and picked `numbers`: what was guessed of it was right or wrong."""
        self._uses.visited(layer.position, sorted(numbers))
        found = self._guesses.pop((get_ident(), layer.position), None)
        if found is None:
            return
        guesses, crowd = found
        if not crowd:
            self.trust.note(len(guesses & numbers), len(guesses))
        for number in guesses - numbers - self._guessed:
            slot = self._slots.get(number)
            if slot is not None and slot.guessed and not slot.users and not slot.request.done:
                slot.request.cancel()
                self._cancelled.append(slot.request)
                self.counters.read_bytes -= (
                    slot.request.nbytes
                )  # what was read all the same comes back in the end
                self.counters.guessed_bytes -= slot.request.nbytes
                self._evict(slot)

    @property
    def _guessed(self) -> set[int]:
        """Numbers that are named for layers still to run."""
        return set().union(*(numbers for numbers, _ in self._guesses.values()))

    def _forget_the_ended(self) -> None:
        """Drop what threads named that have ended."""
        alive = {thread.ident for thread in threading.enumerate()}
        for key in [key for key in self._guesses if key[0] not in alive]:
            del self._guesses[key]

    def _wait_for_room(self, layer: ExpertLayer, waiting: deque[Expert], held: list[Slot]) -> None:
        """Other threads compute with all there is, or somebody keeps tensors: ask again and again."""
        deadline, served = time.monotonic() + PATIENCE, self._served
        while not held:
            if served != self._served:  # others compute: one's turn will come
                deadline, served = time.monotonic() + PATIENCE, self._served
            if time.monotonic() > deadline:
                self._refuse(waiting[0])
            time.sleep(TURN)
            with self._lock:
                self._refuse_closed()
                self._request(layer, waiting, held)

    def _request(self, layer: ExpertLayer, waiting: deque[Expert], held: list[Slot]) -> None:
        """Take or start those `waiting`, until there is no room."""
        victims: Iterator[Slot] | None = None
        while waiting:
            expert = waiting[0]
            if expert.number in self._slots:  # another thread has asked for it meanwhile
                self._take(waiting.popleft(), held)
                continue
            if victims is None:
                self._refuse_closed()
                victims = self._victims(layer.position, set())
            memory = self._room(victims)
            if memory is None:
                return
            slot = self._start(waiting.popleft(), memory, urgent=True)
            del memory
            self._use(slot, held)
            self.counters.misses += 1

    def _start(self, expert: Expert, memory: tuple[memoryview, int], *, urgent: bool) -> Slot:
        view, address = memory
        request = self._host.read(expert.layout, view, address, urgent=urgent)
        self._host.note(request, expert.name, "demand" if urgent else "prefetch")
        self.counters.read_bytes += request.nbytes
        if not urgent:
            self.counters.guessed_bytes += request.nbytes  # until it is picked
        slot = self._slots[expert.number] = Slot(expert, view, request, guessed=not urgent)
        self._idle[expert.number] = True
        return slot

    def _take(self, expert: Expert, held: list[Slot]) -> None:
        slot = self._slots[expert.number]
        if slot.guessed:
            slot.guessed = False
            self.counters.misses += 1
            self.counters.foreseen += 1
            self.counters.guessed_bytes -= expert.read_bytes
        else:
            self.counters.hits += 1
        self._use(slot, held)

    def _use(self, slot: Slot, held: list[Slot]) -> None:
        slot.users += 1
        self._idle[slot.expert.number] = False
        held.append(slot)

    def _room(self, victims: Iterator[Slot]) -> tuple[memoryview, int] | None:
        for request in [request for request in self._cancelled if request.done]:
            self._cancelled.remove(request)
            moved = min(request.timing.transferred or 0, request.nbytes)
            self.counters.read_bytes += moved
            self.counters.guessed_bytes += moved
        while (room := self._memory.take()) is None:
            victim = next(victims, None)
            if victim is None:
                return None
            self._evict(victim)
            del victim
        return room

    def _victims(self, layer: int, protected: set[int]) -> Iterator[Slot]:
        """Whom to evict while the layer at that position runs, one after the other; guesses last of all."""
        idle = np.flatnonzero(self._idle)
        later: list[int] = []
        guesses = self._guessed
        for number in self._uses.latest(idle, layer):
            if number in protected:
                continue
            if number in guesses:
                later.append(number)
            elif self._idle[number]:
                yield self._slots[number]
        for number in later:
            if self._idle[number]:
                yield self._slots[number]

    def _evict(self, slot: Slot) -> None:
        del self._slots[slot.expert.number]
        self._idle[slot.expert.number] = False
        self.counters.evictions += 1
        if slot.tensors is not None:
            slot.tensors.clear()  # the list may still be a caller's, and would keep the memory
        slot.memory = slot.request = None

    def _done(self, slot: Slot) -> None:
        slot.users -= 1
        self._served += 1
        if slot.users or self._slots.get(slot.expert.number) is not slot:
            return
        self._idle[slot.expert.number] = True
        failed = (
            slot.tensors is None and slot.request.done
        )  # whoever asks next reads anew, and meets no old failure
        if failed or len(self._slots) > self.allowed:
            self._evict(slot)

    def _landed(self, held: list[Slot]) -> list[Slot]:
        """Those of `held` that are there, waiting for the first to land if none is."""
        started = None
        while True:
            requests = [
                slot.request for slot in held
            ]  # another thread may find one landed, and drop the request
            there = [
                slot for slot, request in zip(held, requests, strict=True) if request is None or request.done
            ]
            if there:
                if started is not None:
                    self.counters.wait_seconds += time.perf_counter() - started
                return there
            if started is None:
                started = time.perf_counter()
            requests[0].wait(LOOK_EVERY)

    def _tensors(self, slot: Slot) -> list[torch.Tensor]:
        if slot.tensors is None:
            request = slot.request
            if request is not None:
                request.wait()
            self._host.refuse_changes(slot.expert.paths)
            with self._lock:
                if slot.tensors is None:
                    slot.tensors = _views(slot.expert, slot.memory)
                    slot.request = None
        return slot.tensors

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("this model was closed; call zinfer.run again to use it")

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
