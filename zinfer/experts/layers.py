"""Which weights of a model hold experts, and what one expert of a layer is: bytes of each, laid out in one slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from zinfer.device.processor import ALIGNMENT
from zinfer.weights.layout import VECTOR, Layout, lay_out, lay_out_apart, round_up
from zinfer.weights.lowering import Placed, rows_of
from zinfer.weights.weight import Weight

ROUTERS = ("gate", "router")  # what transformers calls a router, beside `experts` in one module


def is_dispatched(module: nn.Module) -> bool:
    """Whether `module` holds experts, and is of a class that transformers' experts interface dispatches."""
    return hasattr(type(module), "_apply_gate") and hasattr(type(module).forward, "__wrapped__")


def holds_experts(owner: nn.Module, shape: Sequence[int]) -> bool:
    """Whether `owner`, dispatched as above, has a matrix, or a bias, for each expert in a tensor of that shape."""
    return is_dispatched(owner) and len(shape) > 1 and shape[0] == getattr(owner, "num_experts", None)


def router_beside(block: nn.Module) -> nn.Module | None:
    """What picks among the experts in `block`; None where that is not found."""
    found = (getattr(block, name, None) for name in ROUTERS)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """What picks among dispatched experts of `model`."""
    for block in model.modules():
        if any(is_dispatched(child) for child in block.children()):
            router = router_beside(block)
            if router is not None:
                yield router


def router_of(model: nn.Module, experts: nn.Module) -> nn.Module | None:
    """What picks among `experts`, a module of `model`; None where that is not found."""
    blocks = (block for block in model.modules() if any(child is experts for child in block.children()))
    return next((router for block in blocks if (router := router_beside(block)) is not None), None)


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of one layer: its tensors, in the order of the layer's weights, laid out in one region of memory.

    `number` counts the experts of all layers, `index` those of its own.
    """

    name: str
    index: int
    number: int
    placements: tuple[Placed, ...]
    layout: Layout
    requires_grad: tuple[bool, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.layout.nbytes

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of the checkpoint that it is."""
        return sum(placed.nbytes for placed in self.placements)

    @property
    def paths(self) -> set[str]:
        """The shards that it is read from."""
        return {run.path for placed in self.placements for run in placed.runs}


class ExpertLayer:
    """The experts of one module: `weights` are its streamed parameters, expert after expert in the first dimension.

    `position` among the layers of experts, whose experts are numbered through; this one's from `start`.
    """

    def __init__(self, weights: Sequence[Weight], position: int = 0, start: int = 0) -> None:
        self.weights = tuple(weights)
        self.count = self.weights[0].shape[0]
        self.position = position
        self.start = start

    @cached_property
    def experts(self) -> list[Expert]:
        """All of them, by index."""
        return [self._expert(index) for index in range(self.count)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of host memory that the largest expert takes."""
        return round_up(max(expert.nbytes for expert in self.experts))

    @property
    def device_slot_bytes(self) -> int:
        """The same on a device, which needs no room for the pages around a piece."""
        return max(on_device(expert, residues=True).nbytes for expert in self.experts)

    def _expert(self, index: int) -> Expert:
        placements = tuple(_slice(weight, index) for weight in self.weights)
        return Expert(
            f"{self.weights[0].name}[{index}]",
            index,
            self.start + index,
            placements,
            lay_out(placements),
            tuple(weight.requires_grad for weight in self.weights),
        )


def on_device(expert: Expert, *, residues: bool) -> Layout:
    """Where its tensors stand in a device's memory; `residues` as for lay_out_apart."""
    return lay_out_apart(expert.layout, expert.placements, ALIGNMENT, residues=residues)


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
