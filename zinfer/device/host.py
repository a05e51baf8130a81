"""The host's side of a device: shards, engines, the window that is read ahead into, and places of what stays."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch

from zinfer.aio.joint import Waitable
from zinfer.device.residents import Residents
from zinfer.device.shards import Shards
from zinfer.errors import BudgetError, CheckpointChangedError, ClosedError
from zinfer.pinned import Pool
from zinfer.pinned.numa import node_for, online_nodes
from zinfer.timeline.recorder import Recorder
from zinfer.timeline.tally import Tally
from zinfer.weights.layout import VECTOR, Layout, lay_out
from zinfer.weights.lowering import Placed, rows_of
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")

SMALLEST_BOUNCE = 64 << 10
LARGEST_BOUNCE = 8 << 20


def bounce_bytes(budget: int) -> int:
    """Bytes of the buffers through which unaligned pieces pass: a power of two, at most 1/32 of a large `budget`."""
    share = max(SMALLEST_BOUNCE, min(LARGEST_BOUNCE, budget // 32))
    return 1 << (share.bit_length() - 1)


class Host:
    """Shards, engines and host memory of one model: what every device reads through.

    `bounce`: bytes of buffers for its engines. `window` is the pool that weights are read ahead into (None when
    nothing streams); each weight in `places` has a place of its own in a second mapping, so that keeping it can
    never fail: `at_once`, or as its pages become present. `page_lock` as for Pool. Any thread may call any method.
    `tally` counts, thread by thread, what is read; `recorder`, if any, is told of every read.
    """

    refused_bytes = 0

    def __init__(
        self,
        paths: Sequence[str],
        places: Sequence[Weight],
        window_bytes: int,
        bounce: int,
        *,
        at_once: bool = True,
        page_lock: Literal["auto", "off"] = "off",
        recorder: Recorder | None = None,
    ) -> None:
        self.tally = Tally()
        self._notes: list[str] = []
        self.on_room: weakref.WeakMethod[Callable[[], None]] | None = (
            None  # called when a device gave room back
        )
        self._recorder = recorder
        self._page_lock: Literal["auto", "off"] = page_lock
        self.shards = Shards(paths, bounce)
        self.drives = self.shards.drives
        self.window: Pool | None = None
        self.residents: Residents | None = None
        self.numa_node: int | None = None  # near the drives
        self.generation = 0  # how often memory was divided anew
        self._closed = False
        try:
            self._log_fallbacks()
            self._take_memory(places, places, window_bytes, at_once)
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
        node = self.numa_node = node_for([device.numa_node for device in self.drives.devices], online_nodes())
        self.window = Pool(window_bytes, page_lock=self._page_lock, numa_node=node) if window_bytes else None
        self.residents = Residents(places, wanted, node, at_once=at_once, page_lock=self._page_lock)
        for reason in {pool.numa_reason for pool in self.pools if pool.numa_reason}:
            logger.warning("memory may lie far from the drive, on another NUMA node: %s", reason)

    @property
    def fallbacks(self) -> list[str]:
        """What does not run as it should, for the report."""
        return list(self._notes)

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

    def reclaim(self) -> None:
        """Nothing: what is given back here goes to the kernel at once."""

    def hurry(self) -> None:
        """Get the places of residents ready soon: nobody waits for a first token any more."""
        if self.residents is not None:
            self.residents.hurry()

    def has_window_for(self, weight: Weight) -> bool:
        """Whether the window can hold `weight`, once it has room."""
        return self.window is not None and weight.layout.nbytes <= self.window.capacity

    def window_room(self, weight: Weight, timeout: float) -> Any | None:
        """A region of the window for `weight`, or None when there is none within `timeout` seconds."""
        window = self.window
        capacity = window.capacity if window is not None else 0
        if window is None or weight.layout.nbytes > capacity:
            raise BudgetError(
                f"an operator needs all of {weight.name!r}, {weight.layout.nbytes} bytes, but the window holds "
                f"{capacity}; raise max_memory['cpu'] by {weight.layout.nbytes - capacity} bytes"
            )
        try:
            return window.acquire(weight.layout.nbytes, timeout)
        except ClosedError:
            if self._closed:
                raise
            return None  # memory was divided anew while this thread waited: there is another window now

    def read_rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows (ascending, distinct) of a weight with a row source, in a tensor of their own on the CPU."""
        placed = weight.row_source
        assert placed is not None
        # One row is what `weight[i]` is in memory: it stands at the same address modulo VECTOR (see layout.py).
        row_bytes = placed.nbytes // placed.shape[0]
        residue = (weight.layout.starts[0] + rows[0] * row_bytes) % VECTOR if len(rows) == 1 else 0
        block = torch.empty(len(rows) * row_bytes + VECTOR, dtype=torch.uint8)
        start = (residue - block.data_ptr()) % VECTOR
        out = view_of(block.numpy(), start, replace(placed, shape=(len(rows), *placed.shape[1:])))
        at, extents = out.data_ptr(), []
        for run in rows_of(placed, rows):
            extents.append((run.path, run.offset, run.length, at, False))
            at += run.length
        request = self.shards.read(extents, block, urgent=True)
        self.note(request, weight.name, "rows")
        request.wait()
        self.refuse_changes({run.path for run in placed.runs})
        return flagged(out.to(weight.dtype), weight.requires_grad)

    def read_together(self, placements: Sequence[Placed], *, allocated: bool) -> list[torch.Tensor]:
        """Small tensors, read at once into one block of ordinary memory; `allocated` as in lay_out."""
        layout = lay_out(placements, allocated=allocated, unit=VECTOR)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        request = self.read(layout, block, block.data_ptr(), urgent=True)
        self.note(request, "small tensors", "load")
        request.wait()
        self.refuse_changes({piece.run.path for piece in layout.pieces})
        with torch.inference_mode(False), torch.no_grad():
            return [
                view_of(block.numpy(), start, p) for start, p in zip(layout.starts, placements, strict=True)
            ]

    def read(self, layout: Layout, memory: Any, address: int, urgent: bool) -> Any:
        """Read the pieces of `layout` to `address`, which `memory` owns."""
        extents = [
            (piece.run.path, piece.run.offset, piece.run.length, address + piece.at, piece.slack)
            for piece in layout.pieces
        ]
        return self.shards.read(extents, memory, urgent=urgent)

    def note(self, request: Waitable, name: str, kind: str) -> None:
        """Count a read that was started; keeps nothing of the request but when it ran."""
        nbytes = request.nbytes
        self.tally.asked += nbytes
        if self._recorder is not None and nbytes:
            self._recorder.read(name, kind, request.timing)

    def refuse_changes(self, paths: set[str]) -> None:
        """Raises CheckpointChangedError if a shard of `paths` may hold other bytes than at open."""
        for path in paths:
            if (file := self.shards.changed(path)) is not None:
                raise CheckpointChangedError(
                    f"{file}: the file was altered while it was streamed; results after this point could be "
                    "wrong. Restore it, then call zinfer.run again"
                )


def flagged(value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """`value` as a leaf with that flag. Detached first: of a view, views (weight.t()) ask their common base."""
    return value.detach().requires_grad_(requires_grad)


def view_of(memory: Any, start: int, placed: Placed) -> torch.Tensor:
    """The tensor that lies `start` bytes into `memory`, a buffer, which it keeps alive."""
    if not prod(placed.shape):
        return torch.empty(placed.shape, dtype=placed.dtype)
    count = prod(placed.shape)
    return torch.frombuffer(memory, dtype=placed.dtype, count=count, offset=start).view(placed.shape)
