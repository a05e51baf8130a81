"""The keys and values of one layer in host memory, position after position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from zinfer.device.processor import ALIGNMENT, Event
from zinfer.kv_offload.space import LARGEST_BLOCK, Space, refuse_growth
from zinfer.weights.layout import round_up

GROWTH_SHARE = 4  # a new block holds this part of the positions that there are, ...
GROWTH_BYTES = 4 << 20  # ... at most so many bytes more than asked for: that is what a layer may leave unused
FEWEST = 16  # positions of a block, where there is room


@dataclass(frozen=True)
class Kind:
    """What one position of a layer is: `rows` sequences, heads of each, elements of a head; of keys, or of values."""

    rows: int
    heads: int
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, states: torch.Tensor) -> Kind:
        """Of states as transformers has them: sequences, heads, positions, elements."""
        rows, heads, _, size = states.shape
        return cls(rows, heads, size, states.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of a position."""
        return self.rows * self.heads * self.size * self.dtype.itemsize

    def states(self, memory: torch.Tensor, positions: int) -> torch.Tensor:
        """The states that `memory` holds, position after position: a view in transformers' order of dimensions."""
        count = memory[: positions * self.nbytes].view(self.dtype)
        return count.view(positions, self.rows, self.heads, self.size).permute(1, 2, 0, 3)

    def stand_in(self, positions: int) -> torch.Tensor:
        """A tensor of that shape without bytes."""
        return torch.empty(self.rows, self.heads, positions, self.size, dtype=self.dtype, device="meta")


@dataclass
class Block:
    """Room for `capacity` positions; those from `first` up to `end` are there."""

    region: Any
    keys: torch.Tensor
    values: torch.Tensor
    capacity: int
    first: int = 0
    end: int = 0


@dataclass(frozen=True)
class Span:
    """Some positions that follow one another in one block, as bytes."""

    region: Any
    keys: torch.Tensor
    values: torch.Tensor
    positions: int


class Positions:
    """One layer's. `age` counts the changes other than growth: what was copied before one is of no use after it.

    Position after position, so that what is new is appended and what is there is copied in large pieces. One thread
    at a time, as for transformers' caches. `written` and `read` are the last copies from and to the device; the
    host touches the bytes once both have ended.
    """

    def __init__(self, space: Space) -> None:
        self.length = 0
        self.age = 0
        self.keys = self.values = Kind(0, 0, 0, torch.uint8)
        self.written: Event | None = None
        self.read: Event | None = None
        self._space = space
        self._blocks: deque[Block] = deque()

    @property
    def width(self) -> int:
        """Bytes of a position, keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def spare_bytes(self) -> int:
        """Bytes that are taken already for positions to come."""
        last = self._blocks[-1] if self._blocks else None
        return 0 if last is None else (last.capacity - last.end) * self.width

    @property
    def in_flight(self) -> list[Event]:
        """The copies that may not have ended."""
        return [event for event in (self.written, self.read) if event is not None and not event.done]

    def spans(self) -> Iterator[Span]:
        """What is there, in order."""
        for block in self._blocks:
            if block.end > block.first:
                yield self._span(block, block.first, block.end)

    def extend(self, count: int) -> list[Span]:
        """Room for `count` positions more, which are there from now on. Raises BudgetError, and nothing changed."""
        made, before = [], self.length
        try:
            while count:
                block = self._blocks[-1] if self._blocks else None
                if block is None or block.end == block.capacity:
                    block = self._block(count)
                    self._blocks.append(block)
                now = min(count, block.capacity - block.end)
                made.append(self._span(block, block.end, block.end + now))
                block.end += now
                self.length += now
                count -= now
        except BaseException:
            self.keep(0, before)
            raise
        return made

    def keep(self, front: int, count: int) -> None:
        """Drop all but `count` positions from the `front`-th on."""
        back = self.length - front - count
        if front or back:
            self.age += 1
        while front:
            block = self._blocks[0]
            gone = min(front, block.end - block.first)
            block.first += gone
            front -= gone
            if block.first == block.end:
                self._blocks.popleft()
        while back:
            block = self._blocks[-1]
            gone = min(back, block.end - block.first)
            block.end -= gone
            back -= gone
            if block.first == block.end:
                self._blocks.pop()
        self.length = count

    def select(self, rows: torch.Tensor) -> None:
        """Replace the sequences by those numbered `rows`, in that order; one may be taken more than once.

        Takes as much memory as it makes, before what was there is given back. Raises BudgetError, and nothing changed.
        """
        if torch.equal(rows, torch.arange(self.keys.rows)):
            return
        twin = self._copy(rows)
        self.keys, self.values, self._blocks = twin.keys, twin.values, twin._blocks
        self.age += 1

    def clear(self) -> None:
        """Forget everything; what comes next may be of another shape."""
        self._blocks.clear()
        self.length = 0
        self.age += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        memo[id(self)] = twin = self._copy(torch.arange(self.keys.rows))
        return twin

    def _copy(self, rows: torch.Tensor) -> Positions:
        """The sequences numbered `rows` in memory of their own."""
        for event in self.in_flight:
            event.wait()
        twin = Positions(self._space)
        twin.keys, twin.values = (replace(kind, rows=len(rows)) for kind in (self.keys, self.values))
        for span in self.spans():
            at = 0
            for made in twin.extend(span.positions):
                for kind, into, memory in (
                    (self.keys, made.keys, span.keys),
                    (self.values, made.values, span.values),
                ):
                    part = memory[at * kind.nbytes : (at + made.positions) * kind.nbytes]
                    target = into.view(made.positions, len(rows), -1)
                    torch.index_select(part.view(made.positions, kind.rows, -1), 1, rows, out=target)
                at += made.positions
        return twin

    def _span(self, block: Block, first: int, end: int) -> Span:
        keys, values = self.keys.nbytes, self.values.nbytes
        return Span(
            block.region,
            block.keys[first * keys : end * keys],
            block.values[first * values : end * values],
            end - first,
        )

    def _block(self, count: int) -> Block:
        """A block for `count` positions and some more, or for fewer where there is no room."""
        more = max(FEWEST, min(self.length // GROWTH_SHARE, GROWTH_BYTES // max(self.width, 1)))
        most = max(1, (LARGEST_BLOCK - ALIGNMENT) // max(self.width, 1))
        wanted = min(max(count, more), most)
        while True:
            values = round_up(wanted * self.keys.nbytes, ALIGNMENT)
            nbytes = values + wanted * self.values.nbytes
            region = self._space.take(nbytes)
            if region is not None:
                with torch.inference_mode(False):
                    memory = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
                return Block(region, memory[: wanted * self.keys.nbytes], memory[values:], wanted)
            if wanted == 1:
                raise refuse_growth(self._space, nbytes)
            wanted = min(count, wanted - 1) if wanted > count else wanted // 2
