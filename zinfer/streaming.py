"""Turn a model with symbolic parameters into one that streams them within a memory budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from zinfer.budgets import default_budget, host_budget, less_kernels
from zinfer.coordinator.coordinator import Coordinator
from zinfer.coordinator.recorded import RecordedCoordinator
from zinfer.device.device import Device
from zinfer.errors import OptionError, OutOfMemoryError
from zinfer.experts.cache import ExpertCache
from zinfer.experts.forward import (
    can_stream_experts,
    follow_each_other,
    use_streamed_experts,
)
from zinfer.experts.source import ExpertSource
from zinfer.opening import Target, open_attached, open_cpu
from zinfer.parts import Account, Held, Parts, Slot, gather
from zinfer.planner.placement import Footprint, Placement
from zinfer.timeline.recorder import Recorder
from zinfer.weights.layout import placements_of
from zinfer.weights.loading import parameter_slots
from zinfer.weights.lowering import Placed, Replayed
from zinfer.weights.parameter import StreamedParameter
from zinfer.weights.shortage import in_short, ran_out
from zinfer.weights.symbolic import SymbolicTensor, evaluate
from zinfer.weights.weight import Weight


@dataclass
class Streaming:
    """A model's weights, made to stream: what the runtime handle is built on.

    `placement` and `account` are those of the tier that computes; `host` is the host's where that is another.
    """

    coordinator: Coordinator
    weights: list[Weight]
    footprints: list[Footprint]  # of each weight, where it computes
    placement: Placement
    account: Account
    slots: list[list[Slot]]  # of each weight
    parameters: list[StreamedParameter]  # of each weight
    host: Account | None = None
    experts: ExpertSource | None = None  # where it computes
    host_experts: ExpertCache | None = None

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


def stream(
    model: nn.Module,
    *,
    offload: str,
    target: Target,
    progress: bool,
    allocated: bool = False,
    recorder: Recorder | None = None,
    by_expert: bool = False,
) -> Streaming:
    """Give every symbolic tensor of `model` its place: small and kept, resident, or streamed.

    `offload` as for zinfer.run. `target`: where it computes, within which ceilings; what is free where none are set.
    `allocated`: the model was live, its tensors not mapped from these files (see layout.py). `recorder`, if any, is
    told what happens. `by_expert`: experts are read one by one, where the model's class lets them be.
    Nothing is read before the plan stands. Raises BudgetError with the smallest ceiling that works, and
    OutOfMemoryError where the memory that the plan counts with is not there.
    """
    free = default_budget()  # asked once, before anything is allocated
    by_expert = by_expert and can_stream_experts(model)
    if by_expert and target.processor is None:
        free = less_kernels(free)
    held = gather(model, by_expert=by_expert)
    parts = Parts(held, host_budget(target.host, free), allocated, by_expert=by_expert)
    paths = sorted({run.path for item in held for p in placements_of(item.provenance) for run in p.runs})
    processor = target.processor
    if processor is None:
        opened = open_cpu(parts, held, offload, paths, free, recorder)
    else:
        opened = open_attached(parts, offload, paths, free, recorder, processor, target)
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
            opened.footprints,
            opened.placement,
            opened.account,
            slots,
            parameters,
            opened.host,
            opened.experts,
            opened.host_experts,
        )
        streaming.install()
        if parts.layers:
            use_streamed_experts(model)
        if opened.experts is not None:
            follow_each_other(model, parts.layers, opened.experts)
        if offload in ("cpu", "none"):
            total = sum(weight.nbytes for weight in weights)
            with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
                coordinator.load(weights, bar.update)
    except BaseException as error:
        if opened.experts is not None:
            opened.experts.close()
        device.close()
        if ran_out(error) and not isinstance(error, OutOfMemoryError):
            key = "cpu" if processor is None else processor.number
            raise OutOfMemoryError(
                f"memory on {device.name} ran out while the model was brought there ({in_short(str(error))}): end what "
                f"else uses it, or lower max_memory[{key!r}]"
            ) from error
        raise
    return streaming


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
