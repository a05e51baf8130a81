"""The way of one cache's layers to the device and back: one layer's room there, filled ahead of the operators."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from zinfer.device.arena import Arena, Lease
from zinfer.device.processor import ALIGNMENT, Event, Processor
from zinfer.kv_offload.positions import Positions
from zinfer.kv_offload.space import Space
from zinfer.timeline.recorder import Recorder
from zinfer.weights.layout import round_up

SLACK_SHARE = 16  # room for this part of a layer more, so that a new position seldom needs another arena
SLACK_BYTES = 4096  # ... or for so many bytes, if that is more
PATIENCE = 5.0  # seconds until memory that is not given back is left to whoever holds it
INTO, BACK = "into", "back"  # the arenas: of the layer that comes, and of the positions that go


def slack(nbytes: int) -> int:
    """Bytes of room beyond `nbytes`."""
    return max(nbytes // SLACK_SHARE, SLACK_BYTES)


def working_bytes(largest: int) -> int:
    """Bytes on the device for a cache whose largest layer has `largest`: what comes, and what is computed with."""
    return 2 * largest + 2 * slack(largest) if largest else 0


@dataclass
class Arrival:
    """A layer on its way to the device: what it was when the copy was started, and the memory."""

    positions: Positions
    age: int
    length: int
    lease: Lease
    event: Event

    @property
    def current(self) -> bool:
        """Whether nothing changed since."""
        return self.positions.age == self.age and self.positions.length == self.length


class Lane:
    """Brings layers to `processor`, each while the operators of the one added before it run, and back.

        update of layer n: stored positions, in an arena, and new ones are joined, in memory of torch's
            -> that arena is free: layer n + 1 comes there; the new positions go to host memory through another

    So the device has one layer that operators compute with, and one that comes, or goes. After the last layer comes
    the first, for the next token, where the pass was a short one: after a long one, what goes back takes its room.
    One thread at a time, as for transformers' caches.
    """

    def __init__(self, processor: Processor, space: Space, recorder: Recorder | None) -> None:
        self._order: list[Positions] = []
        self._processor = processor
        self._space = space
        self._recorder = recorder
        self._arenas: dict[str, Arena] = {}
        self._ahead: Arrival | None = None

    def add(self) -> Positions:
        """One layer more, after those that there are."""
        self._order.append(Positions(self._space))
        return self._order[-1]

    def bring(self, positions: Positions, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of `positions`, which what the calling thread's stream is given from now on can read.

        `new` positions will go back. The next layer can come only once both tensors are dropped.
        """
        self._room(BACK, self._widest * new)
        arrival, self._ahead = self._ahead, None
        if arrival is None or arrival.positions is not positions or not arrival.current:
            arrival = None  # its memory is free from here on
            arrival = self._start(positions, PATIENCE)
            if arrival is None:  # somebody keeps what is in the arena: an error's traceback, perhaps
                del self._arenas[INTO]
                arrival = self._start(positions, PATIENCE)
        assert arrival is not None
        self._processor.follow(arrival.event)
        arrival.lease.used_on(self._processor.stream())
        memory, values = arrival.lease.bytes, _values_at(positions, positions.length)
        return (
            positions.keys.states(memory, positions.length),
            positions.values.states(memory[values:], positions.length),
        )

    def send(self, positions: Positions, keys: torch.Tensor, values: torch.Tensor, new: int) -> None:
        """Append these states, of the last of `new` positions; their copy runs on. Raises BudgetError."""
        processor, count = self._processor, keys.shape[-2]
        start = _values_at(positions, count)
        nbytes = start + count * positions.values.nbytes
        lease = self._room(BACK, max(nbytes, self._widest * new)).acquire(nbytes, PATIENCE)
        if lease is None:
            del self._arenas[BACK]
            lease = self._room(BACK, nbytes).acquire(nbytes)
            assert lease is not None
        for event in lease.after:
            processor.follow(event)
        stream = processor.stream()
        lease.used_on(stream)
        with torch.no_grad():
            positions.keys.states(lease.bytes, count).copy_(keys)
            positions.values.states(lease.bytes[start:], count).copy_(values)
        moves, regions, at = [], [], 0
        for span in positions.extend(count):
            moves.append((span.keys, _part(lease.bytes, at * positions.keys.nbytes, span.keys)))
            moves.append((span.values, _part(lease.bytes, start + at * positions.values.nbytes, span.values)))
            regions.append(span.region)
            at += span.positions
        positions.written = processor.copy_cache(
            moves, [processor.fence(stream), *positions.in_flight], back=True
        )
        lease.copied(positions.written)
        self._space.hold(positions.written, regions)

    def go_on(self, positions: Positions, new: int) -> None:
        """`positions` was updated with `new` positions: start to bring what comes after it."""
        index = self._order.index(positions) + 1
        following = self._order[index % len(self._order)]
        wraps = index == len(self._order)
        if following.length and not (wraps and new * SLACK_SHARE > following.length):
            self._ahead = self._start(following, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lane:
        twin = Lane(self._processor, self._space, self._recorder)
        memo[id(self)] = twin
        twin._order = [copy.deepcopy(one, memo) for one in self._order]
        return twin

    @property
    def _widest(self) -> int:
        """Bytes of a position, and what alignment may add."""
        return max(one.width for one in self._order) + ALIGNMENT

    def _start(self, positions: Positions, timeout: float) -> Arrival | None:
        length, start = positions.length, _values_at(positions, positions.length)
        nbytes = start + length * positions.values.nbytes
        lease = self._room(INTO, max(_bytes(one) for one in self._order)).acquire(nbytes, timeout)
        if lease is None:
            return None
        moves, regions, at = [], [], 0
        for span in positions.spans():
            moves.append((_part(lease.bytes, at * positions.keys.nbytes, span.keys), span.keys))
            moves.append((_part(lease.bytes, start + at * positions.values.nbytes, span.values), span.values))
            regions.append(span.region)
            at += span.positions
        event = self._processor.copy_cache(moves, [*lease.after, *positions.in_flight], back=False)
        lease.copied(event)
        positions.read = event
        self._space.hold(event, regions)
        if self._recorder is not None:
            self._recorder.copying(f"cache of layer {self._order.index(positions)}", event)
        return Arrival(positions, positions.age, length, lease, event)

    def _room(self, which: str, nbytes: int) -> Arena:
        """The arena called `which`; another one in its place where it is too small for `nbytes`, or far too large."""
        arena = self._arenas.get(which)
        if arena is not None and nbytes <= arena.capacity <= 2 * (nbytes + slack(nbytes)):
            return arena
        if arena is not None:
            whole = self._arenas.pop(which).acquire(arena.capacity, PATIENCE)
            for event in [] if whole is None else whole.after:
                event.wait()  # so that its memory is free before more is taken
            arena.close()
            del arena, whole
        self._arenas[which] = Arena(self._processor, nbytes + slack(nbytes))
        return self._arenas[which]


def _values_at(positions: Positions, count: int) -> int:
    """Where the values of `count` positions begin, after their keys."""
    return round_up(count * positions.keys.nbytes, ALIGNMENT)


def _bytes(positions: Positions) -> int:
    return _values_at(positions, positions.length) + positions.length * positions.values.nbytes


def _part(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    return memory[at : at + like.nbytes]
