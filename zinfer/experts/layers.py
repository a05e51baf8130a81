"""Which weights of a model hold experts, and what one expert of a layer is: bytes of each, laid out in one slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from zinfer.weights.layout import VECTOR, Layout, lay_out
from zinfer.weights.lowering import Placed, rows_of
from zinfer.weights.weight import Weight


def holds_experts(owner: nn.Module, shape: Sequence[int]) -> bool:
    """Whether `owner`, whose class transformers' experts interface dispatches, has a matrix for each expert here."""
    count = getattr(owner, "num_experts", None)
    dispatched = hasattr(type(owner), "_apply_gate") and hasattr(type(owner).forward, "__wrapped__")
    return dispatched and len(shape) == 3 and shape[0] == count


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of one layer: its tensors, in the order of the layer's weights, laid out in one region of memory."""

    name: str
    index: int
    placements: tuple[Placed, ...]
    layout: Layout
    requires_grad: tuple[bool, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.layout.nbytes

    @property
    def paths(self) -> set[str]:
        """The shards that it is read from."""
        return {run.path for placed in self.placements for run in placed.runs}


class ExpertLayer:
    """The experts of one module: `weights` are its streamed parameters, expert after expert in the first dimension."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self.count = self.weights[0].shape[0]

    @cached_property
    def experts(self) -> list[Expert]:
        """All of them, by index."""
        return [self._expert(index) for index in range(self.count)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest expert."""
        return max(expert.nbytes for expert in self.experts)

    def _expert(self, index: int) -> Expert:
        placements = tuple(_slice(weight, index) for weight in self.weights)
        return Expert(
            f"{self.weights[0].name}[{index}]",
            index,
            placements,
            lay_out(placements),
            tuple(weight.requires_grad for weight in self.weights),
        )


def _slice(weight: Weight, index: int) -> Placed:
    """Where `weight[index]` lies. In memory it stands where the whole tensor's address puts it: see layout.py."""
    placed = weight.placed
    assert placed is not None
    row_bytes = placed.nbytes // placed.shape[0]
    return replace(
        placed,
        runs=tuple(rows_of(placed, [index])),
        shape=placed.shape[1:],
        residue=(weight.layout.starts[0] + index * row_bytes) % VECTOR,
    )
