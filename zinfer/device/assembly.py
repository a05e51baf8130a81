"""What a weight's bytes become on a device: where its tensors stand there, what is copied, and what is made of it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch

from zinfer.device.arena import Lease
from zinfer.device.cpu import leaf_among
from zinfer.device.host import flagged
from zinfer.device.processor import ALIGNMENT, Event, Processor
from zinfer.device.streams import Streams
from zinfer.pinned import Pool
from zinfer.weights.layout import Layout, lay_out_apart, placements_of
from zinfer.weights.lowering import Placed
from zinfer.weights.symbolic import evaluate
from zinfer.weights.weight import Weight

Move = tuple[torch.Tensor, torch.Tensor]  # target on the device, source in host memory; bytes of one length


class Assembly:
    """Of weights on `processor`. Any thread may call any method."""

    def __init__(self, processor: Processor, streams: Streams) -> None:
        self._processor = processor
        self._streams = streams
        self._layouts: dict[Weight, Layout] = {}

    def layout(self, weight: Weight) -> Layout:
        """Where the tensors that `weight` is made of stand in its memory on the device."""
        layout = self._layouts.get(weight)
        if layout is None:
            placements, residues = placements_of(weight.provenance), self._processor.keeps_residue
            layout = lay_out_apart(weight.layout, placements, ALIGNMENT, residues=residues)
            self._layouts[weight] = layout
        return layout

    def row_residue(self, weight: Weight, rows: list[int]) -> int:
        """One row stands at the same address modulo ALIGNMENT as `weight[i]` of a weight on the device."""
        placed = weight.placed
        if placed is None or len(rows) != 1:
            return 0
        at = self.layout(weight).starts[0] + rows[0] * (placed.nbytes // placed.shape[0])
        return 0 if at % placed.dtype.itemsize else at % ALIGNMENT

    def moves(self, weight: Weight, memory: Any, pool: Pool | None, target: torch.Tensor) -> list[Move]:
        """What to copy of `memory`, a buffer in `pool` that holds `weight`, to `target`, bytes on the device."""
        placements = placements_of(weight.provenance)
        moves: list[Move] = []
        for here, there, placed in zip(
            weight.layout.starts, self.layout(weight).starts, placements, strict=True
        ):
            if placed.nbytes:
                source = torch.frombuffer(memory, dtype=torch.uint8, count=placed.nbytes, offset=here)
                moves += at_slab_edges(target[there : there + placed.nbytes], source, pool)
        return moves

    def tensor_of(self, weight: Weight, lease: Lease, settles: bool) -> tuple[torch.Tensor, Event | None]:
        """The tensor of `weight` over `lease`, or what its conversion makes of it and when that is made."""
        provenance, starts = weight.provenance, self.layout(weight).starts
        placements = placements_of(provenance)
        with torch.inference_mode(False), torch.no_grad():
            tensors = [_tensor(lease.bytes, *place) for place in zip(starts, placements, strict=True)]
            if isinstance(provenance, Placed):
                return flagged(tensors[0], weight.requires_grad), None
            leaves = {id(node): tensor for (node, _), tensor in zip(provenance.leaves, tensors, strict=True)}
            value = evaluate(provenance.expression, partial(leaf_among, leaves), self._processor.torch_device)
            made = flagged(value, weight.requires_grad)
            if (
                settles
            ):  # a plain parameter then, which nobody hands to the streams; of leases, arenas take care
                self._streams.share(made)
            return made, self._processor.fence(self._processor.stream())


def at_slab_edges(target: torch.Tensor, source: torch.Tensor, pool: Pool | None) -> list[Move]:
    """The copy in parts: each slab of a pool is a registration of its own with the driver (see Pool)."""
    if pool is None:
        return [(target, source)]
    step = pool.slab_bytes
    edge = step - (source.data_ptr() - pool.base_address) % step
    cuts = [0, *range(edge, source.nbytes, step), source.nbytes]
    return [(target[a:b], source[a:b]) for a, b in pairwise(cuts)]


def _tensor(memory: torch.Tensor, start: int, placed: Placed) -> torch.Tensor:
    return memory[start : start + placed.nbytes].view(placed.dtype).view(placed.shape)
