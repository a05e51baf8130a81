"""Turn a model with symbolic parameters into one that streams them within a memory budget."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from zinfer.coordinator.coordinator import Coordinator
from zinfer.coordinator.recorded import RecordedCoordinator
from zinfer.device.attached import AttachedDevice
from zinfer.device.cpu import CpuDevice
from zinfer.device.device import Device
from zinfer.device.host import bounce_bytes
from zinfer.device.processor import ALIGNMENT, Processor
from zinfer.errors import BudgetError, OptionError
from zinfer.planner.memory import free_memory, total_memory
from zinfer.planner.placement import Footprint, Placement, all_resident, place, smallest
from zinfer.planner.tiers import Tiers, place_on_tiers
from zinfer.timeline.recorder import Recorder
from zinfer.weights.layout import VECTOR, lay_out, placements_of, round_up
from zinfer.weights.loading import parameter_slots
from zinfer.weights.lowering import Placed, Provenance, Replayed, provenance_of
from zinfer.weights.parameter import StreamedParameter
from zinfer.weights.symbolic import SymbolicTensor, evaluate
from zinfer.weights.weight import Weight

logger = logging.getLogger("zinfer")

SMALL_BYTES = 1 << 20  # a tensor below this is read once and kept: streaming it costs more than it saves
SMALL_SHARE = 1024  # ... unless the budget itself is small: then below budget / SMALL_SHARE
CACHE_SHARE = 4  # where key-value caches are in host memory, this part of its budget is kept for them
# Modules that torch runs as one operator over several matrices, or through a fused kernel that it only takes for
# plain parameters: their own weights are kept in memory.
ONE_OPERATOR = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
HEADROOM = 512 << 20  # bytes of free memory left to the libraries' own pages and what torch allocates unasked
HEADROOM_SHARE = (
    16  # ... or this part of it, if that is less: residency.py makes room for caches and activations
)


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
    in_one_operator: bool  # owned by, or below, a module in ONE_OPERATOR

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.dtype.itemsize

    def stays(self, threshold: int) -> bool:
        """Whether it is read once and kept: buffers, vectors (norms, biases), and what is below `threshold` bytes.

        Vectors stay whatever their size, so that an operator never needs a streamed matrix and its bias at once;
        so do those of the modules in ONE_OPERATOR.
        """
        vector = sum(size > 1 for size in self.tensor.shape) < 2
        return self.nbytes < threshold or vector or self.in_one_operator or not self.slots[0].is_parameter


class Parts:
    """What a budget of `budget` bytes makes of the tensors `held`: which are small and kept, which are weights."""

    def __init__(self, held: Sequence[Held], budget: int, allocated: bool) -> None:
        threshold = min(SMALL_BYTES, budget // SMALL_SHARE)
        self.budget = budget
        self.allocated = allocated
        self.small = [item for item in held if item.stays(threshold)]
        self.large = [item for item in held if not item.stays(threshold)]
        self.weights = [_weight(item, allocated) for item in self.large]
        self.footprints = [_footprint(weight) for weight in self.weights]
        self.bounce = bounce_bytes(budget)
        self.small_bytes = _small_bytes(self.small)
        self.fixed = self.small_bytes + self.bounce

    def needed(self, offload: str) -> int:
        """The fewest bytes that hold what this division keeps in memory at once."""
        if not self.footprints:
            return self.fixed
        least = all_resident if offload in ("cpu", "none") else smallest
        return self.fixed + least(self.footprints)


@dataclass(frozen=True)
class Account:
    """Where the budget of a tier went, in bytes. `ceiling` bounds the sum of the others and of the key-value caches.

    `free` is what the tier had when the plan was made, less headroom: those and activations have to fit there.
    """

    ceiling: int
    free: int
    residents: int
    window: int
    conversions: int
    small: int
    bounce: int


@dataclass
class Streaming:
    """A model's weights, made to stream: what the runtime handle is built on.

    `placement` and `account` are those of the tier that computes; `host` is the host's where that is another.
    """

    coordinator: Coordinator
    weights: list[Weight]
    footprints: list[Footprint]  # of each weight
    placement: Placement
    account: Account
    slots: list[list[Slot]]  # of each weight
    parameters: list[StreamedParameter]  # of each weight
    host: Account | None = None

    @property
    def loaded(self) -> bool:
        """Whether any weight has become resident."""
        return any(weight.resident is not None for weight in self.weights)

    def unsettle(self, weight: Weight) -> None:
        """Put the streamed parameter of `weight` back where it is used."""
        index = self.weights.index(weight)
        for slot in self.slots[index]:
            slot.fill(self.parameters[index])

    def install(self) -> None:
        """Put the streamed parameters in their slots, in place of what is there."""
        for places, parameter in zip(self.slots, self.parameters, strict=True):
            for slot in places:
                slot.fill(parameter)

    def share(self, memo: dict[int, Any]) -> None:
        """Make copy.deepcopy(..., memo) put a streamed parameter where a resident weight is."""
        for places, parameter in zip(self.slots, self.parameters, strict=True):
            memo[id(places[0].tensor)] = copy.deepcopy(parameter, memo)


def gather(model: nn.Module) -> list[Held]:
    """Every distinct symbolic tensor of `model`, in registration order, with all slots tied to it."""
    held: dict[int, Held] = {}
    single = {
        part for module in model.modules() if isinstance(module, ONE_OPERATOR) for part in module.modules()
    }
    for owner, attribute, name, tensor, is_parameter in parameter_slots(model):
        if isinstance(tensor, SymbolicTensor):
            if id(tensor) not in held:
                held[id(tensor)] = Held(tensor, [], provenance_of(tensor.expression), owner in single)
            held[id(tensor)].slots.append(Slot(owner, attribute, name, is_parameter))
    return list(held.values())


@dataclass(frozen=True)
class Target:
    """Who computes, None for the CPU, and the ceilings that the user set on host and device, in bytes.

    `kv_offload`: key-value caches are to be in the host's memory.
    """

    processor: Processor | None = None
    host: int | None = None
    device: int | None = None
    kv_offload: bool = False


@dataclass
class Opened:
    """A device with memory for a model's weights, and how that is divided: see Streaming."""

    device: Device
    placement: Placement
    account: Account
    host: Account | None = None


def stream(
    model: nn.Module,
    *,
    offload: str,
    target: Target,
    progress: bool,
    allocated: bool = False,
    recorder: Recorder | None = None,
) -> Streaming:
    """Give every symbolic tensor of `model` its place: small and kept, resident, or streamed.

    `offload` as for zinfer.run. `target`: where it computes, within which ceilings; what is free where none are set.
    `allocated`: the model was live, its tensors not mapped from these files (see layout.py). `recorder`, if any, is
    told what happens.
    Nothing is read before the plan stands. Raises BudgetError with the smallest ceiling that works.
    """
    free = default_budget()  # asked once, before anything is allocated
    held = gather(model)
    parts = Parts(held, _budget(target.host, free), allocated)
    paths = sorted({run.path for item in held for p in placements_of(item.provenance) for run in p.runs})
    processor = target.processor
    if processor is None:
        opened = _open_cpu(parts, held, offload, paths, free, recorder)
    else:
        opened = _open_attached(parts, offload, paths, free, recorder, processor, target)
    device, weights = opened.device, parts.weights
    try:
        if processor is not None:
            _move_rest(model, device.torch_device)
        _read_small(device, parts.small, allocated)
        slots = [item.slots for item in parts.large]
        told = device, _order(weights, model), _settler(slots, weights)
        coordinator = Coordinator(*told) if recorder is None else RecordedCoordinator(*told, recorder)
        parameters = [StreamedParameter(weight, coordinator, device.torch_device) for weight in weights]
        streaming = Streaming(
            coordinator,
            weights,
            parts.footprints,
            opened.placement,
            opened.account,
            slots,
            parameters,
            opened.host,
        )
        streaming.install()
        if offload in ("cpu", "none"):
            total = sum(weight.nbytes for weight in weights)
            with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
                coordinator.load(weights, bar.update)
    except BaseException:
        device.close()
        raise
    return streaming


def _open_cpu(
    parts: Parts, held: Sequence[Held], offload: str, paths: list[str], free: int, recorder: Recorder | None
) -> Opened:
    placement = _place(parts, held, offload)
    for index in placement.residents:
        parts.weights[index].wants_residence = True
    residents = [weight for weight in parts.weights if weight.wants_residence and weight.placed is not None]
    in_memory = offload in ("cpu", "none")
    device = CpuDevice(
        paths, residents, placement.window_bytes, parts.bounce, at_once=in_memory, recorder=recorder
    )
    account = Account(
        ceiling=parts.budget,
        free=free,
        residents=placement.resident_bytes,
        window=placement.window_bytes,
        conversions=placement.transient_bytes,
        small=parts.small_bytes,
        bounce=parts.bounce,
    )
    return Opened(device, placement, account)


def _open_attached(
    parts: Parts,
    offload: str,
    paths: list[str],
    free: int,
    recorder: Recorder | None,
    processor: Processor,
    target: Target,
) -> Opened:
    budget = _device_budget(processor, target.device)
    small = sum(round_up(item.nbytes, ALIGNMENT) for item in parts.small)
    tiers = _tiers(parts, offload, budget, small, processor, target.kv_offload)
    for index in tiers.device:
        parts.weights[index].wants_residence = True
    processor.limit(budget)
    device = AttachedDevice(
        processor,
        paths,
        [parts.weights[index] for index in sorted(tiers.host)],
        tiers.host_window,
        tiers.device_window,
        parts.bounce,
        spare=_spare(parts, tiers, target),
        recorder=recorder,
    )
    placement = Placement(tiers.device, tiers.device_bytes, tiers.device_window, tiers.device_conversions)
    on_device = Account(
        ceiling=budget,
        free=budget,
        residents=tiers.device_bytes,
        window=tiers.device_window,
        conversions=tiers.device_conversions,
        small=small,
        bounce=0,
    )
    on_host = Account(
        ceiling=parts.budget,
        free=free,
        residents=tiers.host_bytes,
        window=tiers.host_window,
        conversions=tiers.conversions,
        small=0,
        bounce=parts.bounce,
    )
    return Opened(device, placement, on_device, on_host)


def _spare(parts: Parts, tiers: Tiers, target: Target) -> int:
    """Bytes of the host's budget for weights that have to leave the device; none where caches are to have them."""
    planned = tiers.host_bytes + tiers.host_window + tiers.conversions + parts.bounce
    return 0 if target.kv_offload else max(parts.budget - planned, 0)


def _device_budget(processor: Processor, ceiling: int | None) -> int:
    """Bytes that may be allocated on the device. Raises BudgetError for a ceiling above what it has."""
    free, total = processor.memory()
    key = f"max_memory[{processor.torch_device.index or 0}]"
    if ceiling is not None and ceiling > total:
        raise BudgetError(
            f"{key} is {ceiling} bytes, but {processor.name} has {total}; ask for at most {free}, what is free now"
        )
    if ceiling is not None and ceiling > free:
        logger.warning(
            "%s is %d bytes, of which %d are free on %s now; using those", key, ceiling, free, processor.name
        )
    return (less_headroom(free) if ceiling is None else min(ceiling, free)) - processor.overhead


def _tiers(
    parts: Parts, offload: str, budget: int, small: int, processor: Processor, kv_offload: bool
) -> Tiers:
    """Where the weights go. Raises BudgetError with the budget that would do, of the tier that is too small."""
    key = f"max_memory[{processor.torch_device.index or 0}]"
    footprints = parts.footprints
    least = all_resident if offload == "none" else smallest
    needed = small + (least(footprints) if footprints else 0)
    if needed > budget:
        what = (
            "offload='none' keeps the whole model on the device"
            if offload == "none"
            else "the largest operator and the small tensors have to be on the device at once"
        )
        raise BudgetError(
            f"{processor.name} has {budget} bytes for zinfer, but {what}: the smallest {key} that works is "
            f"{needed + processor.overhead} bytes",
            needed + processor.overhead,
        )
    drive, host = offload in ("auto", "nvme"), parts.budget - parts.bounce
    try:
        if kv_offload:
            try:
                return place_on_tiers(
                    footprints, budget - small, host - parts.budget // CACHE_SHARE, drive=drive
                )
            except BudgetError as error:
                host = min(host, error.smallest or host)  # caches get what is left
        return place_on_tiers(footprints, budget - small, host, drive=drive)
    except BudgetError as error:
        needed = (error.smallest or 0) + parts.bounce
        raise BudgetError(
            f"the host's budget is {parts.budget} bytes, but offload={offload!r} needs {needed} there: raise "
            f"max_memory['cpu'] to that, or {key}{_shortage(needed)}",
            needed,
        ) from error


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what is in memory already, such as buffers that a model computes, to where it computes."""
    moved: dict[int, torch.Tensor] = {}
    for owner, attribute, _, tensor, is_parameter in list(parameter_slots(model)):
        if isinstance(tensor, SymbolicTensor) or tensor.device == device:
            continue
        if id(tensor) not in moved:
            there = tensor.detach().to(device)
            moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
        (owner._parameters if is_parameter else owner._buffers)[attribute] = moved[id(tensor)]  # type: ignore[assignment]


def default_budget() -> int:
    """Bytes zinfer allocates at most where the user sets no ceiling: what is free now, less headroom."""
    return less_headroom(free_memory())


def less_headroom(free: int) -> int:
    """What zinfer may take of `free` bytes."""
    return max(free - min(HEADROOM, free // HEADROOM_SHARE), 0)


def _budget(ceiling: int | None, spare: int) -> int:
    if ceiling is None:
        return spare
    if ceiling > total_memory():
        raise BudgetError(
            f"max_memory['cpu'] is {ceiling} bytes, but this machine (or its memory cgroup) has {total_memory()}; "
            f"ask for at most {spare}, what is free now"
        )
    if ceiling > spare:
        logger.warning(
            "max_memory['cpu'] is %.2f GiB, of which %.2f GiB are free now less headroom; using those",
            ceiling / 2**30,
            spare / 2**30,
        )
    return min(ceiling, spare)


def _weight(item: Held, allocated: bool) -> Weight:
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
        rows_only=rows_only,
        allocated=allocated,
        requires_grad=tensor.requires_grad,
    )


def _footprint(weight: Weight) -> Footprint:
    if weight.placed is not None:
        return Footprint(weight.layout.nbytes, weight.layout.nbytes, rows_only=weight.rows_only)
    # A replay holds, besides the leaves in the window, its result and at worst one intermediate copy.
    return Footprint(round_up(weight.nbytes), weight.layout.nbytes, transient=2 * round_up(weight.nbytes))


def _small_bytes(small: Sequence[Held]) -> int:
    return lay_out([p for item in small for p in placements_of(item.provenance)], unit=VECTOR).nbytes


def least_budget(parts: Parts, held: Sequence[Held], offload: str) -> int:
    """The fewest bytes that `held` needs; where that is more than parts.budget, the smallest budget that works."""
    needed = parts.needed(offload)
    if needed > parts.budget:
        # A larger budget keeps more tensors and has larger buffers: go up until one fits what it keeps.
        while (more := Parts(held, needed, parts.allocated).needed(offload)) > needed:
            needed = more
    return needed


def _place(parts: Parts, held: Sequence[Held], offload: str) -> Placement:
    budget, needed = parts.budget, least_budget(parts, held, offload)
    if needed > budget:
        what = (
            f"offload={offload!r} keeps the whole model in memory"
            if offload in ("cpu", "none")
            else "the largest operator and the small tensors have to be in memory at once"
        )
        remedy = "; offload='nvme' streams what does not fit" if offload in ("cpu", "none") else ""
        raise BudgetError(
            f"the budget is {budget} bytes, but {what}: the smallest max_memory['cpu'] that works is "
            f"{needed} bytes{remedy}{_shortage(needed)}",
            needed,
        )
    return (
        place(parts.footprints, budget - parts.fixed) if parts.footprints else Placement(frozenset(), 0, 0, 0)
    )


def _shortage(needed: int) -> str:
    spare = default_budget()
    return f" (but only {spare} bytes are free now: end other programs first)" if needed > spare else ""


def _order(weights: Sequence[Weight], model: nn.Module) -> list[Weight]:
    """First guess at the operator order: registration order, fused experts read slice by slice left out."""
    eager_experts = getattr(getattr(model, "config", None), "_experts_implementation", None) == "eager"
    return [weight for weight in weights if not (eager_experts and len(weight.shape) == 3)]


def _settler(
    slots: Sequence[list[Slot]], weights: Sequence[Weight]
) -> Callable[[Weight, torch.Tensor], None]:
    """What puts a plain parameter where a weight has become resident."""
    places = {id(weight): there for there, weight in zip(slots, weights, strict=True)}

    def settle(weight: Weight, tensor: torch.Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=weight.requires_grad)
        for slot in places[id(weight)]:
            slot.fill(parameter)

    return settle


def _replay(provenance: Replayed, tensors: Iterator[torch.Tensor], device: torch.device) -> torch.Tensor:
    leaves = {id(node): next(tensors) for node, _ in provenance.leaves}
    return evaluate(provenance.expression, lambda node: leaves.get(id(node)), device)


def _read_small(device: Device, small: Sequence[Held], allocated: bool) -> None:
    placements = [placed for item in small for placed in placements_of(item.provenance)]
    tensors = iter(device.read_together(placements, allocated=allocated))
    for item in small:
        if isinstance(item.provenance, Placed):
            value = next(tensors)
        else:
            value = _replay(item.provenance, tensors, device.torch_device)
        value = value.to(device.torch_device)
        if item.slots[0].is_parameter:
            value = nn.Parameter(value, requires_grad=item.tensor.requires_grad)
        for slot in item.slots:
            slot.fill(value)


def check_offload(offload: str) -> None:
    """Raises OptionError for anything but the four modes."""
    if offload not in ("auto", "nvme", "cpu", "none"):
        raise OptionError(f"offload={offload!r}; choose 'auto', 'nvme', 'cpu' or 'none'")
