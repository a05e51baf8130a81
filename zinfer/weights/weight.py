"""One weight of the model: what it is, how its bytes are obtained, and its tensor once that has come to stay."""

from __future__ import annotations

import threading
import weakref
from math import prod
from typing import Any

import torch

from zinfer.weights.layout import Layout, lay_out, placements_of
from zinfer.weights.lowering import Placed, Provenance
from zinfer.weights.symbolic import Apply

aten = torch.ops.aten


class Slices(threading.local):
    """Slices of a weight along its first dimension that the calling thread has at hand, by index."""

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}


class Weight:
    """Description and state of one weight; every parameter tied to it shares this object.

        (nvme) --fetch--> in the window --last tensor dies--> (nvme)
           \\------------> resident, while `wants_residence`

    The description never changes. `resident` is set when the weight has come to stay, and None again when it leaves;
    `fetch` refers, weakly, to the read that currently holds the weight in the window, so that readers at the same
    place share it. Both belong to the coordinator and change under its lock.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size | tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        provenance: Provenance,
        *,
        rows_only: bool = False,
        sliced: bool = False,
        allocated: bool = False,
        requires_grad: bool = True,
    ) -> None:
        self.name = name
        self.shape = torch.Size(shape)
        self.stride = stride
        self.dtype = dtype
        self.provenance = provenance
        self.requires_grad = requires_grad  # no gradient ever flows, but torch picks kernels by the flag
        self.rows_only = (
            rows_only  # operators ask for rows, never for all of it: an embedding's alone, or sliced
        )
        self.slices = Slices() if sliced else None  # experts: read one by one, see zinfer.experts
        self.nbytes = prod(shape) * dtype.itemsize
        self.layout: Layout = lay_out(placements_of(provenance), allocated=allocated)
        self.wants_residence = False
        self.resident: torch.Tensor | None = None
        self.fetch: weakref.ref[Any] | None = None

    @property
    def placed(self) -> Placed | None:
        """The placement, or None for a weight that has to be replayed."""
        return self.provenance if isinstance(self.provenance, Placed) else None

    @property
    def row_source(self) -> Placed | None:
        """Where single rows can be read: the placement, or that of a weight that is only cast to its dtype."""
        provenance = self.provenance
        if isinstance(provenance, Placed):
            return provenance
        expression = provenance.expression
        while isinstance(expression, Apply) and expression.func.overloadpacket in (aten.detach, aten.alias):
            expression = expression.args[0]
        if not isinstance(expression, Apply) or expression.func.overloadpacket is not aten._to_copy:
            return None
        node, placed = provenance.leaves[0]
        return placed if expression.args[0] is node else None

    @property
    def read_bytes(self) -> int:
        """Bytes of checkpoint that one fetch reads."""
        return sum(piece.run.length for piece in self.layout.pieces)

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {tuple(self.shape)}, {self.dtype})"
