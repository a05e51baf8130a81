"""A device opened for a model: what its weights run on, and how the memory there is divided among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zinfer.budgets import CACHE_SHARE, device_budget, expert_slots, place_on_host, tiers_within
from zinfer.device.attached import MEMORY, AttachedDevice
from zinfer.device.cpu import CpuDevice
from zinfer.device.device import Device
from zinfer.device.moved import Spare
from zinfer.device.processor import Processor
from zinfer.experts.cache import ExpertCache
from zinfer.experts.on_device import DeviceExperts
from zinfer.experts.source import ExpertSource
from zinfer.parts import Account, Held, Parts, PartsOnDevice
from zinfer.planner.placement import Footprint, Placement
from zinfer.timeline.recorder import Recorder


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
    """A device with memory for a model's weights, what each takes there, and how it is divided: see Streaming."""

    device: Device
    footprints: list[Footprint]
    placement: Placement
    account: Account
    host: Account | None = None
    experts: ExpertSource | None = None
    host_experts: ExpertCache | None = None


def open_cpu(
    parts: Parts, held: Sequence[Held], offload: str, paths: list[str], free: int, recorder: Recorder | None
) -> Opened:
    """The CPU, which computes in host memory. `free`: what of that there is, less headroom. Raises BudgetError."""
    placement = place_on_host(parts, held, offload)
    for index in placement.residents:
        parts.weights[index].wants_residence = True
    residents = [weight for weight in parts.weights if weight.wants_residence and weight.placed is not None]
    in_memory = offload in ("cpu", "none")
    slots = 0
    if parts.layers:
        slots = parts.expert_slots(parts.budget - parts.fixed - placement.total_bytes)
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
        key="cpu",
        experts=slots * parts.largest_expert,
    )
    cache = None
    if slots:
        try:
            cache = ExpertCache(device, parts.expert_layers, slots, parts.largest_expert)
        except BaseException:
            device.close()
            raise
    return Opened(device, parts.footprints, placement, account, experts=cache, host_experts=cache)


def open_attached(
    parts: Parts,
    offload: str,
    paths: list[str],
    free: int,
    recorder: Recorder | None,
    processor: Processor,
    target: Target,
) -> Opened:
    """`processor`, with a tier of its own, one in host memory, and the drive. Raises BudgetError."""
    budget = device_budget(processor, target.device)
    there = PartsOnDevice(parts, processor.allocated)
    tiers = tiers_within(parts, there, offload, budget, processor, kv_offload=target.kv_offload)
    for index in tiers.device:
        parts.weights[index].wants_residence = True
    slots = expert_slots(parts, there, tiers, budget, kv_offload=target.kv_offload)
    experts = slots[0] * parts.largest_expert
    planned = tiers.host_bytes + tiers.host_window + tiers.conversions + parts.bounce + experts
    device = AttachedDevice(
        processor,
        paths,
        [parts.weights[index] for index in sorted(tiers.host)],
        tiers.host_window,
        tiers.device_window,
        parts.bounce,
        limit=budget,
        spare=_spare(parts, parts.budget - planned, tiers.device, target),
        recorder=recorder,
    )
    placement = Placement(tiers.device, tiers.device_bytes, tiers.device_window, tiers.device_conversions)
    on_device = Account(
        ceiling=budget,
        free=budget,
        residents=tiers.device_bytes,
        window=tiers.device_window,
        conversions=tiers.device_conversions,
        small=there.small_bytes,
        bounce=0,
        key=processor.number,
        overhead=processor.overhead,
        experts=slots[1] * there.largest_expert,
    )
    on_host = Account(
        ceiling=parts.budget,
        free=free,
        residents=tiers.host_bytes,
        window=tiers.host_window,
        conversions=tiers.conversions,
        small=0,
        bounce=parts.bounce,
        key="cpu",
        experts=experts,
    )
    below = above = None
    if parts.layers:
        try:
            below = _host_experts(device, parts, slots[0])
            above = DeviceExperts(device, parts.expert_layers, slots[1], there.largest_expert, below)
        except BaseException:
            if below is not None:
                below.close()
            device.close()
            raise
    return Opened(device, there.footprints, placement, on_device, on_host, above, below)


def _host_experts(device: AttachedDevice, parts: Parts, slots: int) -> ExpertCache:
    """`slots` experts in page-locked memory, where the device has that."""
    lock: Literal["auto", "off"] = "auto" if device.processor.page_locks else "off"
    with device.processor.current():
        cache = ExpertCache(device, parts.expert_layers, slots, parts.largest_expert, lock)
    device.page_locks.check([cache.pool], MEMORY, None)
    return cache


def _spare(parts: Parts, left: int, on_device: frozenset[int], target: Target) -> Spare:
    """What weights that leave the device can have of the `left` bytes of the host's budget.

    Where caches go to host memory, those keep their part of the budget, and all that no weight could ever ask for.
    """
    if not target.kv_offload:
        return Spare(left)
    most = sum(parts.weights[index].layout.nbytes for index in on_device)
    return Spare(min(left - parts.budget // CACHE_SHARE, most), CACHE_SHARE)
