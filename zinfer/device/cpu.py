"""The CPU as the compute device: operators read the regions that the drive wrote."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch

from zinfer.aio.joint import Waitable
from zinfer.device.fetch import Fetch
from zinfer.device.residents import Residents
from zinfer.device.shards import Shards
from zinfer.errors import BudgetError, CheckpointChangedError, ClosedError
from zinfer.pinned import Pool
from zinfer.pinned.numa import node_for, online_nodes
from zinfer.timeline.recorder import Recorder
from zinfer.timeline.tally import Tally
from zinfer.weights.layout import VECTOR, Layout, lay_out
from zinfer.weights.lowering import Placed, rows_of
from zinfer.weights.symbolic import evaluate
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")

SMALLEST_BOUNCE = 64 << 10
LARGEST_BOUNCE = 8 << 20


def bounce_bytes(budget: int) -> int:
    """Bytes of the buffers through which unaligned pieces pass: a power of two, at most 1/32 of a large `budget`."""
    share = max(SMALLEST_BOUNCE, min(LARGEST_BOUNCE, budget // 32))
    return 1 << (share.bit_length() - 1)


class CpuDevice:
    """Shards, engines and memory of one model that computes on the CPU.

    `bounce`: bytes of buffers for its engines. `window` is the pool that weights are read ahead into (None when
    nothing streams); each weight in `residents` has a place of its own in a second mapping, so that keeping it can
    never fail: `at_once`, or as its pages become present. Any thread may call any method. `tally` counts, thread by
    thread, what is read; `recorder`, if any, is told of every read.
    """

    torch_device = torch.device("cpu")

    def __init__(
        self,
        paths: Sequence[str],
        residents: Sequence[Weight],
        window_bytes: int,
        bounce: int,
        *,
        at_once: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self.tally = Tally()
        self._recorder = recorder
        self.shards = Shards(paths, bounce)
        self.drives = self.shards.drives
        self.window: Pool | None = None
        self.residents: Residents | None = None
        self.generation = 0  # how often memory was divided anew
        self._closed = False
        try:
            self._log_fallbacks()
            self._take_memory(residents, residents, window_bytes, at_once)
        except BaseException:
            self.close()
            raise

    def _log_fallbacks(self) -> None:
        for backend, reason in self.drives.fallbacks:
            logger.warning(
                "%s is not available (%s); reading through %s", backend, reason, self.drives.backend
            )
        buffered: dict[str, str] = {}  # the reason is the filesystem's, the same for its other shards
        for file in self.drives.files.values():
            if not file.direct:
                buffered.setdefault(file.direct_reason, file.path)
        for reason, path in buffered.items():
            logger.warning("%s is read through the page cache: %s", path, reason)

    def _take_memory(
        self, places: Sequence[Weight], wanted: Sequence[Weight], window_bytes: int, at_once: bool
    ) -> None:
        node = node_for([device.numa_node for device in self.drives.devices], online_nodes())
        self.window = Pool(window_bytes, page_lock="off", numa_node=node) if window_bytes else None
        self.residents = Residents(places, wanted, node, at_once=at_once)
        for reason in {pool.numa_reason for pool in self.pools if pool.numa_reason}:
            logger.warning("memory may lie far from the drive, on another NUMA node: %s", reason)

    @property
    def pools(self) -> list[Pool]:
        """The mappings that weights lie in; none after `close`, once the last tensor on them has died."""
        resident = self.residents.pool if self.residents is not None else None
        return [pool for pool in (self.window, resident) if pool is not None and pool.base_address]

    def close(self) -> None:
        """Drain every read and give the memory back as soon as the last tensor on it dies."""
        self._closed = True
        self.drives.close()
        if self.residents is not None:
            self.residents.close()
        if self.window is not None:
            self.window.close()

    def hurry(self) -> None:
        """Get the places of residents ready soon: nobody waits for a first token any more."""
        if self.residents is not None:
            self.residents.hurry()

    def release(self, weight: Weight) -> None:
        """Give the place of `weight`, if it has one, back to the kernel as soon as no tensor is on it."""
        if self.residents is not None and self.residents.has(weight):
            self.residents.release(weight)

    def renew_memory(self, places: Sequence[Weight], wanted: Sequence[Weight], window_bytes: int) -> None:
        """Give the window and all places back, and take new ones, those of `wanted` made present.

        No weight may be resident, and no read into the window under way; what is read into an old place meanwhile
        is good, but does not stay (see Fetch).
        """
        for memory in (self.residents, self.window):
            if memory is not None:
                memory.close()
        self.generation += 1
        self._take_memory(places, wanted, window_bytes, at_once=False)

    def in_place(self, weight: Weight) -> bool:
        """Whether a read of `weight` would go to the place where it stays, and take no room in the window."""
        residents = self.residents
        if residents is None or not weight.wants_residence or not residents.has(weight):
            return False
        window = self.window
        fits = window is not None and weight.layout.nbytes <= window.capacity
        return residents.ready(weight) or not fits

    def start(self, weight: Weight, *, urgent: bool, timeout: float = 0.0) -> Fetch | None:
        """Begin to read `weight`, or None when the window has no room for it within `timeout` seconds."""
        generation, in_place = self.generation, self.in_place(weight)
        if in_place:
            assert self.residents is not None
            memory, address = self.residents.take(weight)
        else:
            window = self.window
            capacity = window.capacity if window is not None else 0
            if window is None or weight.layout.nbytes > capacity:
                raise BudgetError(
                    f"an operator needs all of {weight.name!r}, {weight.layout.nbytes} bytes, but the window holds "
                    f"{capacity}; raise max_memory['cpu'] by {weight.layout.nbytes - capacity} bytes"
                )
            try:
                memory = window.acquire(weight.layout.nbytes, timeout)
            except ClosedError:
                if self._closed:
                    raise
                return None  # memory was divided anew while this thread waited: there is another window now
            if memory is None:
                return None
            address = memory.address
        request = self._read(weight.layout, memory, address, urgent)
        self._note(request, weight.name, "demand" if urgent else "prefetch")
        # A partial, not a closure: frames in a traceback keep their function's closure, and so would keep the region.
        settles = in_place or (weight.placed is None and weight.wants_residence)
        finish = partial(self._tensor_of, weight, memory, address, settles)
        fetch = Fetch(weight, request, finish, in_place=in_place, settles=settles, generation=generation)
        weight.fetch = weakref.ref(fetch)
        return fetch

    def read_rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows (ascending, distinct) of a weight with a row source, in a tensor of their own."""
        placed = weight.row_source
        assert placed is not None
        # One row is what `weight[i]` is in memory: it stands at the same address modulo VECTOR (see layout.py).
        row_bytes = placed.nbytes // placed.shape[0]
        residue = (weight.layout.starts[0] + rows[0] * row_bytes) % VECTOR if len(rows) == 1 else 0
        block = torch.empty(len(rows) * row_bytes + VECTOR, dtype=torch.uint8)
        start = (residue - block.data_ptr()) % VECTOR
        out = _view(block.numpy(), start, replace(placed, shape=(len(rows), *placed.shape[1:])))
        at, extents = out.data_ptr(), []
        for run in rows_of(placed, rows):
            extents.append((run.path, run.offset, run.length, at, False))
            at += run.length
        request = self.shards.read(extents, block, urgent=True)
        self._note(request, weight.name, "rows")
        request.wait()
        self._refuse_changes({run.path for run in placed.runs})
        return _flagged(out.to(weight.dtype), weight.requires_grad)

    def read_together(self, placements: Sequence[Placed], *, allocated: bool) -> list[torch.Tensor]:
        """Small tensors, read at once into one block of ordinary memory; `allocated` as in lay_out."""
        layout = lay_out(placements, allocated=allocated, unit=VECTOR)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        request = self._read(layout, block, block.data_ptr(), urgent=True)
        self._note(request, "small tensors", "load")
        request.wait()
        self._refuse_changes({piece.run.path for piece in layout.pieces})
        with torch.inference_mode(False), torch.no_grad():
            return [
                _view(block.numpy(), start, p) for start, p in zip(layout.starts, placements, strict=True)
            ]

    def _read(self, layout: Layout, memory: Any, address: int, urgent: bool) -> Any:
        """Read the pieces of `layout` to `address`, which `memory` owns."""
        extents = [
            (piece.run.path, piece.run.offset, piece.run.length, address + piece.at, piece.slack)
            for piece in layout.pieces
        ]
        return self.shards.read(extents, memory, urgent=urgent)

    def _note(self, request: Waitable, name: str, kind: str) -> None:
        """Count a read that was started; keeps nothing of the request but when it ran."""
        nbytes = request.nbytes
        self.tally.asked += nbytes
        if self._recorder is not None and nbytes:
            self._recorder.read(name, kind, request.timing)

    def _tensor_of(self, weight: Weight, memory: Any, address: int, settles: bool) -> torch.Tensor:
        """The tensor of `weight` over `memory`, which it keeps alive, or what its conversion makes of it."""
        self._refuse_changes({piece.run.path for piece in weight.layout.pieces})
        provenance, starts = weight.provenance, weight.layout.starts
        # An inference tensor would be of no use to a later pass outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(provenance, Placed):
                value = _view(memory, starts[0], provenance)
            else:
                leaves = {
                    id(node): _view(memory, start, placed)
                    for (node, placed), start in zip(provenance.leaves, starts, strict=True)
                }
                value = evaluate(provenance.expression, partial(_leaf, leaves), self.torch_device)
                inside = 0 <= value.data_ptr() - address < weight.layout.nbytes
                if settles and inside:  # a view would hold the window's region for good
                    value = value.clone(memory_format=torch.preserve_format)
            return _flagged(value, weight.requires_grad)

    def _refuse_changes(self, paths: set[str]) -> None:
        for path in paths:
            if (file := self.shards.changed(path)) is not None:
                raise CheckpointChangedError(
                    f"{file}: the file was altered while it was streamed; results after this point could be "
                    "wrong. Restore it, then call zinfer.run again"
                )


def _flagged(value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """`value` as a leaf with that flag. Detached first: of a view, views (weight.t()) ask their common base."""
    return value.detach().requires_grad_(requires_grad)


def _leaf(leaves: dict[int, torch.Tensor], node: Any) -> torch.Tensor | None:
    return leaves.get(id(node))


def _view(memory: Any, start: int, placed: Placed) -> torch.Tensor:
    if not prod(placed.shape):
        return torch.empty(placed.shape, dtype=placed.dtype)
    count = prod(placed.shape)
    return torch.frombuffer(memory, dtype=placed.dtype, count=count, offset=start).view(placed.shape)
