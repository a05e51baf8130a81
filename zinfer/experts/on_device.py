"""Experts in a device's own memory, above those in host memory: copied when a router picks them, kept if they fit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing

import numpy as np
import torch

from zinfer.device.arena import Arena, Lease
from zinfer.device.assembly import Move, at_slab_edges
from zinfer.device.attached import AttachedDevice
from zinfer.device.host import flagged
from zinfer.device.processor import Event
from zinfer.errors import BudgetError, ClosedError, OutOfMemoryError
from zinfer.experts.cache import PATIENCE, TURN, ExpertCache
from zinfer.experts.eviction import Uses
from zinfer.experts.layers import Expert, ExpertLayer, on_device
from zinfer.experts.source import Landed


class There:
    """One expert on the device, or on its way. `users`: passes that compute with it now."""

    __slots__ = ("arena", "event", "expert", "lease", "tensors", "users")

    def __init__(self, expert: Expert, arena: Arena, lease: Lease, event: Event) -> None:
        self.expert, self.arena, self.event = expert, arena, event
        self.lease: Lease | None = lease
        self.tensors: list[torch.Tensor] = []
        self.users = 1


class DeviceExperts:
    """At most `count` experts of `layers` on `device`, of `slot_bytes` each there, from those `below` in host memory.

    Any thread may call any method; one lock guards it. What the device has is used there, the rest comes from below, is
    copied as it lands, and stays until another needs its memory: that whose next use is expected last leaves. Operators
    wait for copies on the device, never on the host; memory is used anew in the order of the device's work, see Arena.
    """

    def __init__(
        self,
        device: AttachedDevice,
        layers: Sequence[ExpertLayer],
        count: int,
        slot_bytes: int,
        below: ExpertCache,
    ) -> None:
        self._device = device
        self.below = below
        self.slot_bytes = slot_bytes
        self._nbytes = max(layer.device_slot_bytes for layer in layers)
        self._residues = device.processor.keeps_residue
        self._lock = threading.RLock()
        self._there: dict[int, There] = {}
        self._uses = Uses([layer.count for layer in layers])
        self._free: deque[Arena] = deque()  # of one slot each; tensors on it may be alive still
        self._arenas = 0
        self._most = self.allowed = count
        self._closed = False
        self.hits = 0  # experts that were picked and on the device

    @property
    def limit(self) -> int:
        """Bytes of the device that experts may take now."""
        return self.allowed * self.slot_bytes

    @property
    def count(self) -> int:
        """Experts that are on the device."""
        return len(self._there)

    def arrivals(
        self, layer: ExpertLayer, picked: Sequence[int], then: Callable[[], object] | None = None
    ) -> Generator[Landed, None, None]:
        """See ExpertSource; the calling thread's stream follows the copies."""
        self._device.enter()
        held: list[There] = []
        with self._lock:
            self._refuse_closed()
            self._uses.visited(layer.position, [layer.start + index for index in picked])
            for index in picked:
                there = self._there.get(layer.start + index)
                if there is not None:
                    there.users += 1
                    held.append(there)
            self.hits += len(held)
        present = {there.expert.index for there in held}
        try:
            with closing(
                self.below.arrivals(layer, [i for i in picked if i not in present], then)
            ) as landing:
                if held:
                    yield self._followed(held)
                    self._done(held)
                for group in landing:
                    # Many may have landed where few have room.
                    for expert, tensors in group:
                        held.append(self._copy(layer, expert, tensors))
                        yield self._followed(held)
                        self._done(held)
        finally:
            self._done(held)

    def needs(self, picks: int) -> None:
        """See ExpertSource. On the device, those that do not fit together take turns."""
        self.below.needs(picks)

    @property
    def notes(self) -> list[str]:
        """See ExpertSource."""
        return self.below.notes

    def curious(self, picks: int, layer: ExpertLayer) -> bool:
        """See ExpertSource."""
        return self.below.curious(picks, layer)

    def foresee(self, layer: ExpertLayer, guessed: Iterable[int], before: ExpertLayer) -> None:
        """See ExpertSource. What is guessed is read to host memory, where it is not on the device."""
        with self._lock:
            absent = [index for index in guessed if layer.start + index not in self._there]
        self.below.foresee(layer, absent, before)

    def resize(self, limit: int) -> None:
        """See ExpertSource."""
        with self._lock:
            self.allowed = max(1, min(limit // self.slot_bytes, self._most))
            while self._arenas > self.allowed:
                if not self._free and not self._evict(0):
                    return  # in use; whoever returns it sees that there are too many
                self._drop()

    def close(self) -> None:
        """Drop all, and those below; memory goes back as soon as the last tensor on it dies."""
        with self._lock:
            self._closed = True
            self._there.clear()
            while self._free:
                self._drop()
        self.below.close()

    def _followed(self, held: Sequence[There]) -> Landed:
        landed = []
        for there in held:
            assert there.lease is not None
            self._device.follow(there.event, there.lease)
            landed.append((there.expert, list(there.tensors)))
        return landed

    def _done(self, held: list[There]) -> None:
        with self._lock:
            while held:
                there = held.pop()
                there.users -= 1
                if not there.users and (self._closed or self._arenas > self.allowed):
                    self._forget(there)
                    if self._free:
                        self._drop()

    def _copy(self, layer: ExpertLayer, expert: Expert, tensors: Sequence[torch.Tensor]) -> There:
        """Bring `expert` from host memory, where `tensors` are; another thread's copy of it does as well."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                self._refuse_closed()
                known = self._there.get(expert.number)
                if known is not None:
                    known.users += 1
                    return known
                found = self._room(layer)
                if found is not None:
                    try:
                        return self._start(expert, tensors, *found)
                    except BaseException:
                        self._free.append(found[0])
                        raise
            if time.monotonic() > deadline:
                raise BudgetError(
                    f"{expert.name} needs {self.slot_bytes} bytes of the {self.limit} that experts may take on "
                    f"{self._device.name}, which other threads or the caller hold; raise "
                    f"max_memory[{self._device.processor.number}] by {self.slot_bytes} bytes"
                )
            time.sleep(TURN)

    def _start(self, expert: Expert, tensors: Sequence[torch.Tensor], arena: Arena, lease: Lease) -> There:
        layout = on_device(expert, residues=self._residues)
        moves: list[Move] = []
        made: list[torch.Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for tensor, start, placed, trained in zip(
                tensors, layout.starts, expert.placements, expert.requires_grad, strict=True
            ):
                target = lease.bytes[start : start + placed.nbytes]
                source = tensor.detach().reshape(-1).view(torch.uint8)
                moves += at_slab_edges(target, source, self.below.pool)
                whole = target.view(placed.dtype).view(placed.shape).unsqueeze(0)
                made.append(flagged(whole, trained)[0])  # a view of a leaf, as `weight[index]` is
            event = self._device.copy_now(moves, lease, expert.name, [list(tensors)])
        there = self._there[expert.number] = There(expert, arena, lease, event)
        there.tensors = made
        return there

    def _room(self, layer: ExpertLayer) -> tuple[Arena, Lease] | None:
        """A slot, which another expert has to leave where there is no free one; None while all are in use."""
        while True:
            for _ in range(len(self._free)):
                free = self._free.popleft()
                lease = free.acquire(self._nbytes)
                if lease is not None:
                    return free, lease
                self._free.append(free)
            if self._arenas < self.allowed:
                made = self._device.own_arena(self._nbytes)
                if made is not None:
                    self._arenas += 1
                    self._free.append(made)
                    continue
                if not self._arenas:
                    raise OutOfMemoryError(
                        f"{self._device.name} tried to allocate {self._nbytes} bytes for an expert, and has not got "
                        "them: end what else uses its memory"
                    )
                self.allowed = self._arenas  # until memory is divided again
            if not self._evict(layer.position):
                return None

    def _evict(self, layer: int) -> bool:
        """Give up the expert that is expected to be used last, while the layer at that position runs; whether any."""
        idle = [number for number, there in self._there.items() if not there.users]
        if not idle:
            return False
        self._forget(self._there[self._uses.latest(np.array(idle), layer)[0]])
        return True

    def _forget(self, there: There) -> None:
        if self._there.get(there.expert.number) is there:
            del self._there[there.expert.number]
            there.tensors.clear()
            there.lease = None
            self._free.append(there.arena)

    def _drop(self) -> None:
        self._free.popleft().close()
        self._arenas -= 1

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("this model was closed; call zinfer.run again to use it")
