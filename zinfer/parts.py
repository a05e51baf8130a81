"""What a model's tensors are to zinfer: which are small and kept, which are weights, and what each of those costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from zinfer.device.host import bounce_bytes
from zinfer.device.processor import ALIGNMENT
from zinfer.experts.layers import ExpertLayer, holds_experts, routers
from zinfer.planner.placement import Footprint, all_resident, smallest
from zinfer.weights.layout import VECTOR, lay_out, placements_of, round_up
from zinfer.weights.loading import parameter_slots
from zinfer.weights.lowering import Placed, Provenance, provenance_of
from zinfer.weights.symbolic import SymbolicTensor
from zinfer.weights.weight import Weight

SMALL_BYTES = 1 << 20  # a tensor below this is read once and kept: streaming it costs more than it saves
SMALL_SHARE = 1024  # ... unless the budget itself is small: then below budget / SMALL_SHARE
# Modules that torch runs as one operator over several matrices, or through a fused kernel that it only takes for
# plain parameters: their own weights are kept in memory.
ONE_OPERATOR = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Slot:
    """A place in the model that holds a symbolic tensor: `owner._parameters[attribute]`, or a buffer."""

    owner: nn.Module
    attribute: str
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> torch.Tensor:
        """What is there."""
        table = self.owner._parameters if self.is_parameter else self.owner._buffers
        return table[self.attribute]  # type: ignore[return-value]

    def fill(self, tensor: torch.Tensor) -> None:
        """Put `tensor` there."""
        if isinstance(self.owner, nn.RNNBase) and isinstance(tensor, nn.Parameter):
            setattr(self.owner, self.attribute, tensor)  # it keeps a list of its weights besides
            return
        table = self.owner._parameters if self.is_parameter else self.owner._buffers
        table[self.attribute] = tensor  # type: ignore[assignment]


@dataclass
class Held:
    """One distinct symbolic tensor, all the slots tied to it, and how to get its bytes."""

    tensor: SymbolicTensor
    slots: list[Slot]
    provenance: Provenance
    stays_whole: bool  # owned by, or below, a module in ONE_OPERATOR, or a mixture's router

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.dtype.itemsize

    def stays(self, threshold: int) -> bool:
        """Whether it is read once and kept: buffers, vectors (norms, biases), and what is below `threshold` bytes.

        Vectors stay whatever their size, so that an operator never needs a streamed matrix and its bias at once;
        so do those of the modules in ONE_OPERATOR, and of routers, which guess ahead.
        """
        vector = sum(size > 1 for size in self.tensor.shape) < 2
        return self.nbytes < threshold or vector or self.stays_whole or not self.slots[0].is_parameter


def is_sliced(item: Held) -> bool:
    """Whether each index of its first dimension is an expert whose bytes can be read by themselves."""
    dispatched = len(item.slots) == 1 and holds_experts(item.slots[0].owner, item.tensor.shape)
    return dispatched and isinstance(item.provenance, Placed)


class Parts:
    """What a budget of `budget` bytes makes of the tensors `held`: which are small and kept, which are weights."""

    def __init__(
        self, held: Sequence[Held], budget: int, allocated: bool, *, by_expert: bool = False
    ) -> None:
        threshold = min(SMALL_BYTES, budget // SMALL_SHARE)
        self.budget = budget
        self.allocated = allocated
        self.small = [item for item in held if item.stays(threshold)]
        self.large = [item for item in held if not item.stays(threshold)]
        self.by_expert = by_expert
        self.weights = [_weight(item, allocated, by_expert and is_sliced(item)) for item in self.large]
        self.layers = _expert_layers(self.large, self.weights)
        self.footprints = [_footprint(weight) for weight in self.weights]
        self.bounce = bounce_bytes(budget)
        self.small_bytes = _small_bytes(self.small)
        self.fixed = self.small_bytes + self.bounce
        self.largest_expert = max((layer.slot_bytes for layer, _ in self.layers), default=0)
        self.sliced_bytes = sum(weight.nbytes for weight in self.weights if weight.slices is not None)
        self.expert_bytes = self.largest_expert * sum(layer.count for layer, _ in self.layers)

    @property
    def expert_layers(self) -> list[ExpertLayer]:
        """Those whose experts are read one by one."""
        return [layer for layer, _ in self.layers]

    def expert_slots(self, room: int) -> int:
        """How many experts `room` bytes hold, at most all."""
        return min(self.expert_bytes, room) // self.largest_expert if self.layers else 0

    def needed(self, offload: str) -> int:
        """The fewest bytes that hold what this division keeps in memory at once."""
        if not self.footprints:
            return self.fixed
        least = all_resident if offload in ("cpu", "none") else smallest
        return self.fixed + least(self.footprints) + self.largest_expert


class PartsOnDevice:
    """What Parts take on a device with memory of its own, where a block of n bytes takes `allocated(n)`.

    Each resident is a block, and so is each result of a conversion.
    """

    def __init__(self, parts: Parts, allocated: Callable[[int], int]) -> None:
        self.largest_expert = max(
            (allocated(layer.device_slot_bytes) for layer, _ in parts.layers), default=0
        )
        self.experts = sum(layer.count for layer, _ in parts.layers)
        self.footprints = [
            replace(
                footprint,
                resident=allocated(footprint.resident),
                transient=2 * allocated(footprint.transient // 2) if footprint.transient else 0,
            )
            for footprint in parts.footprints
        ]
        self.small_bytes = sum(round_up(allocated(item.nbytes), ALIGNMENT) for item in parts.small)

    def needed(self, offload: str) -> int:
        """The fewest bytes that hold what has to be on the device at once."""
        if not self.footprints:
            return self.small_bytes
        least = all_resident if offload == "none" else smallest
        return self.small_bytes + least(self.footprints) + self.largest_expert

    def expert_slots(self, room: int) -> int:
        """How many experts `room` bytes hold, at most all."""
        return min(self.experts, room // self.largest_expert) if self.largest_expert else 0


@dataclass(frozen=True)
class Account:
    """Where the budget of a tier went, in bytes. `ceiling` bounds the sum of the others and of the key-value caches.

    `free` is what the tier had when the plan was made, less headroom: those and activations have to fit there.
    `experts`: what those may take that are read one by one. The user sets the ceiling as max_memory[`key`]; of what is
    given there, `overhead` is not in it.
    """

    ceiling: int
    free: int
    residents: int
    window: int
    conversions: int
    small: int
    bounce: int
    key: int | str
    overhead: int = 0
    experts: int = 0

    @property
    def option(self) -> str:
        """What the user calls the ceiling."""
        return f"max_memory[{self.key!r}]"

    def given(self, ceiling: int) -> int:
        """What the user has to give for a ceiling of so many bytes."""
        return ceiling + self.overhead


def gather(model: nn.Module, *, by_expert: bool = False) -> list[Held]:
    """Every distinct symbolic tensor of `model`, in registration order, with all slots tied to it.

    `by_expert`: experts are to be read one by one.
    """
    held: dict[int, Held] = {}
    whole = [module for module in model.modules() if isinstance(module, ONE_OPERATOR)]
    single = {
        part for module in [*whole, *(routers(model) if by_expert else ())] for part in module.modules()
    }
    for owner, attribute, name, tensor, is_parameter in parameter_slots(model):
        if isinstance(tensor, SymbolicTensor):
            if id(tensor) not in held:
                held[id(tensor)] = Held(tensor, [], provenance_of(tensor.expression), owner in single)
            held[id(tensor)].slots.append(Slot(owner, attribute, name, is_parameter))
    return list(held.values())


def _expert_layers(items: Sequence[Held], weights: Sequence[Weight]) -> list[tuple[ExpertLayer, nn.Module]]:
    """The experts that are read one by one, module after module, and the modules."""
    owners: dict[int, nn.Module] = {}
    by_owner: dict[int, list[Weight]] = {}
    for item, weight in zip(items, weights, strict=True):
        if weight.slices is not None:
            owner = item.slots[0].owner
            owners[id(owner)] = owner
            by_owner.setdefault(id(owner), []).append(weight)
    layers: list[tuple[ExpertLayer, nn.Module]] = []
    start = 0
    for position, (key, mine) in enumerate(by_owner.items()):
        layers.append((ExpertLayer(mine, position, start), owners[key]))
        start += mine[0].shape[0]
    return layers


def _weight(item: Held, allocated: bool, sliced: bool) -> Weight:
    tensor = item.tensor
    rows_only = all(isinstance(slot.owner, nn.Embedding) for slot in item.slots) and isinstance(
        item.provenance, Placed
    )
    return Weight(
        item.slots[0].name,
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        item.provenance,
        rows_only=rows_only or sliced,
        sliced=sliced,
        allocated=allocated,
        requires_grad=tensor.requires_grad,
    )


def _footprint(weight: Weight) -> Footprint:
    sliced = weight.slices is not None
    if weight.placed is not None:
        rows_only = weight.rows_only and not sliced
        return Footprint(weight.layout.nbytes, weight.layout.nbytes, rows_only=rows_only, sliced=sliced)
    # A replay holds, besides the leaves in the window, its result and at worst one intermediate copy.
    return Footprint(round_up(weight.nbytes), weight.layout.nbytes, transient=2 * round_up(weight.nbytes))


def _small_bytes(small: Sequence[Held]) -> int:
    return lay_out([p for item in small for p in placements_of(item.provenance)], unit=VECTOR).nbytes


def least_budget(parts: Parts, held: Sequence[Held], offload: str) -> int:
    """The fewest bytes that `held` needs; where that is more than parts.budget, the smallest budget that works."""
    needed = parts.needed(offload)
    if needed > parts.budget:
        # A larger budget keeps more tensors and has larger buffers: go up until one fits what it keeps.
        while (
            more := Parts(held, needed, parts.allocated, by_expert=parts.by_expert).needed(offload)
        ) > needed:
            needed = more
    return needed
