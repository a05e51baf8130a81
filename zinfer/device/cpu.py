"""The CPU as the compute device: operators read the regions that the drive wrote."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from zinfer.aio import Engine, File
from zinfer.errors import CheckpointChangedError, ClosedError
from zinfer.device.fetch import Fetch
from zinfer.pinned import Pool
from zinfer.weights.layout import PAGE, VECTOR, Layout, lay_out
from zinfer.weights.lowering import Placed, rows_of
from zinfer.weights.symbolic import evaluate
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")

DEPTH = 8  # reads in flight: enough for the drive's full speed, few enough that an urgent one waits ~10 ms
BLOCK_BYTES = 4 << 20
MAX_BOUNCE_SLOT = 1 << 20


def bounce_slot_bytes(budget: int) -> int:
    """Bytes of one of the DEPTH slots through which unaligned pieces pass: at most 1/32 of `budget` in all."""
    share = max(2 * PAGE, min(MAX_BOUNCE_SLOT, budget // (32 * DEPTH)))
    return 1 << (share.bit_length() - 1)  # a power of two


class CpuDevice:
    """Files, engine and the two pools of one model that computes on the CPU.

    `window` holds weights read ahead, `residents` the ones that stay; either may be None when its
    capacity is 0. Methods may be called from any thread; the coordinator's lock orders `start`.
    """

    torch_device = torch.device("cpu")

    def __init__(self, paths: Sequence[str], window_bytes: int, resident_bytes: int, bounce_slot: int) -> None:
        self.engine = Engine("auto", depth=DEPTH, block_bytes=BLOCK_BYTES, bounce_slot_bytes=bounce_slot)
        for backend, reason in self.engine.fallbacks:
            logger.warning("%s is not available (%s); reading through %s", backend, reason, self.engine.backend)
        self.files = {path: File(path) for path in paths}
        for file in self.files.values():
            if not file.direct:
                logger.warning("%s is read through the page cache: %s", file.path, file.direct_reason)
                break  # the reason is the filesystem's, the same for its other shards
        self.window = Pool(window_bytes, page_lock="off") if window_bytes else None
        self.residents = Pool(resident_bytes, page_lock="off") if resident_bytes else None

    def close(self) -> None:
        """Drain every read and give the memory back as soon as the last tensor on it dies."""
        self.engine.close()
        for file in self.files.values():
            file.close()
        for pool in (self.window, self.residents):
            if pool is not None:
                pool.close()

    def start(self, weight: Weight, *, urgent: bool, timeout: float = 0.0) -> Fetch | None:
        """Begin to read `weight`, or None when the window has no room for it within `timeout` seconds."""
        keep = weight.wants_residence and weight.placed is not None
        pool = self.residents if keep else self.window
        if pool is None:
            raise ClosedError(f"no memory was planned for {weight.name!r}")
        region = pool.acquire(weight.layout.nbytes, timeout)
        if region is None:
            return None
        request = self._read(weight.layout, region, region.address, urgent)
        fetch = Fetch(weight, request, lambda: self._tensor_of(weight, region))
        weight.fetch = weakref.ref(fetch)
        return fetch

    def read_rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows (ascending, distinct) of a placed weight, in a tensor of their own."""
        placed = weight.placed
        assert placed is not None
        out = torch.empty((len(rows), *weight.shape[1:]), dtype=weight.dtype)
        at, extents = out.data_ptr(), []
        for run in rows_of(placed, rows):
            extents.append((self.files[run.path], run.offset, run.length, at, False))
            at += run.length
        self.engine.read(extents, out, urgent=True).wait()
        self._refuse_changes({run.path for run in placed.runs})
        return out

    def read_together(self, placements: Sequence[Placed], *, allocated: bool) -> list[torch.Tensor]:
        """Small tensors, read at once into one block of ordinary memory; `allocated` as in lay_out."""
        layout = lay_out(placements, allocated=allocated, unit=VECTOR)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        self._read(layout, block, block.data_ptr(), urgent=True).wait()
        self._refuse_changes({piece.run.path for piece in layout.pieces})
        return [_view(block.numpy(), start, p) for start, p in zip(layout.starts, placements, strict=True)]

    def _read(self, layout: Layout, memory: Any, address: int, urgent: bool) -> Any:
        """Read the pieces of `layout` to `address`, which `memory` owns."""
        extents = [
            (self.files[piece.run.path], piece.run.offset, piece.run.length, address + piece.at, piece.slack)
            for piece in layout.pieces
        ]
        return self.engine.read(extents, memory, urgent=urgent)

    def _tensor_of(self, weight: Weight, region: Any) -> torch.Tensor:
        self._refuse_changes({piece.run.path for piece in weight.layout.pieces})
        provenance = weight.provenance
        if isinstance(provenance, Placed):
            return _view(region, weight.layout.starts[0], provenance)
        tensors = {
            id(node): _view(region, start, placed)
            for (node, placed), start in zip(provenance.leaves, weight.layout.starts, strict=True)
        }
        value = evaluate(provenance.expression, lambda node: tensors.get(id(node)), self.torch_device)
        if weight.wants_residence and value.untyped_storage().data_ptr() in range(
            region.address, region.address + region.nbytes
        ):
            value = value.clone(memory_format=torch.preserve_format)  # a view would hold the window's region for good
        return value

    def _refuse_changes(self, paths: set[str]) -> None:
        for path in paths:
            if self.files[path].changed():
                raise CheckpointChangedError(
                    f"{path}: the file was altered while it was streamed; results after this point could be "
                    "wrong. Restore it, then call zinfer.run again"
                )


def _view(region: Any, start: int, placed: Placed) -> torch.Tensor:
    if not placed.nbytes:
        return torch.empty(placed.shape, dtype=placed.dtype)
    count = placed.nbytes // placed.dtype.itemsize
    return torch.frombuffer(region, dtype=placed.dtype, count=count, offset=start).view(placed.shape)


