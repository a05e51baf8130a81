"""What fits where, for a plan: budgets, chunks, activations, tiers, and refusals with a number that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from zinfer.budgets import HEADROOM, HEADROOM_SHARE, cpu_reserve, divide_tiers, expert_slots, less_headroom
from zinfer.device.cuda import allocated_by_torch
from zinfer.device.processor import Processor
from zinfer.errors import BudgetError
from zinfer.parts import Held, Parts, PartsOnDevice, least_budget
from zinfer.planner.chunks import prefill_chunk
from zinfer.planner.cost import Work
from zinfer.planner.hardware import Hardware
from zinfer.planner.placement import smallest
from zinfer.planner.tiers import Tiers, beside_caches, place_on_cpu

DEVICE_HEADROOM = 1 << 30  # bytes of a device left to its context, workspaces and the allocator


@dataclass(frozen=True)
class Attached:
    """A device of this machine, and the bytes of it that a run has, its overhead taken off."""

    processor: Processor
    budget: int

    @property
    def number(self) -> int:
        """That by which max_memory names it."""
        return self.processor.number


@dataclass
class Task:
    """What placement depends on besides the batch. `free`: bytes of host memory that can be had.

    `there`: the device of this machine that computes; None for the CPU, and for that of other hardware.
    `foreseen`: bytes that a run foresees for the activations of a batch, its prompt whole. `estimate`: the same with
    chunks of so many tokens; None: no prompt is cut. `by_expert`: experts are read one by one; `expert_slots`: how many
    of them stay in host memory and on the device where place() was asked last.
    """

    held: Sequence[Held]
    work: Work
    hardware: Hardware
    ceilings: dict[str | int, int]
    offload: str
    free: int
    there: Attached | None
    prompt: int
    foreseen: Callable[[int], int]
    estimate: Callable[[int, int], int] | None = None
    divided: dict[int, Parts] = field(default_factory=dict)
    tiers: dict[tuple[int, int], Tiers] = field(default_factory=dict)
    by_expert: bool = False
    expert_slots: tuple[int, int] = (0, 0)

    def budgets(self) -> tuple[int, int]:
        """Bytes for the host and for the device."""
        spare = less_headroom(self.free)
        host = min(self.ceilings.get("cpu", spare), spare)
        if self.there is not None:
            return host, self.there.budget
        if self.hardware.has_device:
            return host, self.ceilings.get(0, max(self.hardware.device_memory - DEVICE_HEADROOM, 0))
        return host, 0

    def on_device(self, parts: Parts) -> PartsOnDevice:
        """What `parts` take on the device; published ones are GPUs."""
        allocated = allocated_by_torch if self.there is None else self.there.processor.allocated
        return PartsOnDevice(parts, allocated)

    def parts(self, host: int) -> Parts:
        """What a host budget makes of the tensors; kept, since many batches are tried with one budget."""
        if host not in self.divided:
            self.divided[host] = Parts(self.held, max(host, 1), allocated=False, by_expert=self.by_expert)
        return self.divided[host]

    def chunk(self, batch: int) -> int:
        """Tokens that a run would prefill at once; see zinfer.prefill."""
        if self.estimate is None:
            return self.prompt
        host, device = self.budgets()
        parts = self.parts(host)
        cache = self.work.cache(batch)
        if self.hardware.has_device:
            room = device - self.on_device(parts).needed(self.offload) - cache
        else:
            room = less_headroom(self.free) - parts.needed(self.offload) - cache
        return prefill_chunk(self.prompt, room, partial(self.estimate, batch))

    def activations(self, batch: int) -> int:
        """Bytes that activations take with `batch` sequences, in chunks where the prompt is cut.

        On a device at hand as a run foresees them.
        """
        tokens, whole = self.chunk(batch), self.prompt
        if self.there is not None:
            return (
                self.foreseen(batch) if tokens == whole or not self.estimate else self.estimate(batch, tokens)
            )
        needed = -(-self.work.activation_bytes * batch * tokens // (self.work.batch * whole))
        # Where not even the smallest chunk fits, a run's estimate is above what there is room for.
        return (
            needed if tokens == whole or self.estimate is None else max(needed, self.estimate(batch, tokens))
        )

    def memory(self, batch: int) -> int:
        """Bytes that cache and activations take with `batch` sequences."""
        return self.work.cache(batch) + self.activations(batch)

    def place(self, batch: int) -> tuple[Parts, Tiers]:
        """Raises BudgetError where that batch, or even one operator, does not fit, with the budget that would do."""
        host, device = self.budgets()
        if self.hardware.has_device:
            return self._place_on_tiers(host, device, batch)
        return self._place_on_cpu(host, batch)

    def _place_on_cpu(self, host: int, batch: int) -> tuple[Parts, Tiers]:
        memory, cache = self.memory(batch), self.work.cache(batch)
        parts = self.parts(host)
        streams = self.offload not in ("cpu", "none")  # else all stays, and caches lie beside the budget
        least = self._least(host, cache if streams else 0)
        if least > host:
            self._refuse_beyond_host(least)
            self._place_on_cpu(least, batch)  # raises where that would not do either
            raise BudgetError(
                f"the budget is {host} bytes; the smallest max_memory['cpu'] that works is {least} bytes with "
                f"offload={self.offload!r}",
                least,
            )
        taken = parts.fixed + memory
        available = host - parts.fixed
        left = less_headroom(self.free) - taken
        needed = smallest(parts.footprints) + parts.largest_expert if parts.footprints and streams else 0
        if left < needed:
            raise BudgetError(
                f"cache and activations take {memory} bytes: with the weights that have to be in memory at once, "
                f"{_with_headroom(taken + needed)} bytes would have to be free, and {self.free} are; make batch or "
                "prompt smaller"
            )
        within = min(available - cache, left) if streams else available
        reserve = cpu_reserve(parts, available)
        # As a run has it: experts make room for caches first.
        beside = max(within - reserve, smallest(parts.footprints)) if parts.layers else within
        tiers = place_on_cpu(parts.footprints, available - reserve, beside, batch if streams else 1)
        taken = tiers.host_bytes + tiers.host_window + tiers.conversions
        self.expert_slots = max(parts.expert_slots(within - taken), 1 if parts.layers else 0), 0
        return parts, tiers

    def _least(self, host: int, cache: int) -> int:
        """The smallest host budget that works with a cache of that size; larger ones have larger buffers."""
        needed = host
        while (more := least_budget(self.parts(needed), self.held, self.offload) + cache) > needed:
            needed = more
        return needed if needed > host else more

    def _refuse_beyond_host(self, needed: int) -> None:
        """Raises BudgetError, without a budget that works, where the host does not have `needed` bytes."""
        machine = self.hardware
        stream = "" if self.offload in ("auto", "nvme") else ", stream with offload='nvme'"
        if needed > less_headroom(machine.host_memory):
            raise BudgetError(
                f"{needed} bytes of host memory are needed with offload={self.offload!r}, and {machine.name} has "
                f"{machine.host_memory}, of which zinfer takes {less_headroom(machine.host_memory)} at most: no "
                f"max_memory['cpu'] works there; make batch or prompt smaller{stream}, or plan for a larger "
                "machine"
            )
        if needed > less_headroom(self.free):
            raise BudgetError(
                f"{needed} bytes of host memory are needed with offload={self.offload!r}, for which "
                f"{_with_headroom(needed)} would have to be free, and {self.free} are: end other programs first, or "
                "make batch or prompt smaller"
            )

    def _place_on_tiers(self, host: int, device: int, batch: int) -> tuple[Parts, Tiers]:
        """As place(); a larger host budget keeps more small tensors on the device, so both are looked at together."""
        least = host
        while True:
            parts = self.parts(least)
            self._check_device(parts, least, device, batch, alone=least == host)
            try:
                tiers = self._divide(parts, device, batch)
            except BudgetError as error:
                least = (error.smallest or 0) + parts.bounce  # more than it was, as too little was available
                self._refuse_beyond_host(least)
                continue
            if least == host:
                return parts, tiers
            raise BudgetError(
                f"the host's budget is {host} bytes with offload={self.offload!r}: the smallest max_memory['cpu'] that "
                f"works is {least} bytes",
                least,
            )

    def _check_device(self, parts: Parts, host: int, device: int, batch: int, *, alone: bool) -> None:
        """Raises BudgetError where the device cannot hold what has to be there at once.

        `alone`: `host` is the budget that was given, so that the device's is the only one to change.
        """
        needed = self.on_device(parts).needed(self.offload) + self.memory(batch)
        if needed <= device:
            return
        there, overhead, most = "max_memory[0]", 0, self.hardware.device_memory
        if self.there is not None:
            there, overhead = f"max_memory[{self.there.number}]", self.there.processor.overhead
            most = max(self.there.processor.free(), device + overhead)
        weights = "the whole model" if self.offload == "none" else "the largest operator"
        what = f"cache, activations, small tensors and {weights} take {needed} bytes of the device"
        if needed + overhead > most:
            raise BudgetError(
                f"{what}, and {self.hardware.name} has {most}: no {there} works there; make batch or prompt smaller, "
                "or plan for a larger device"
            )
        try:
            self._place_on_tiers(host, needed, batch)
        except BudgetError as error:
            raise BudgetError(
                f"{what}, whose budget is {device}; and with {there} that large, {error}"
            ) from error
        if not alone:
            raise BudgetError(
                f"{what}, whose budget is {device}: max_memory['cpu'] of {host} and {there} of {needed + overhead} "
                "bytes work"
            )
        raise BudgetError(
            f"{what}, whose budget is {device}: the smallest {there} that works is {needed + overhead} bytes",
            needed + overhead,
        )

    def _divide(self, parts: Parts, device: int, batch: int) -> Tiers:
        """The tiers with `device` bytes there, caches and activations included.

        On the device at hand residents leave for them, as in a run; elsewhere their room is kept from the start.
        """
        there, memory = self.on_device(parts), self.memory(batch)
        if self.there is None or self.offload == "none":
            tiers = divide_tiers(parts, there, self.offload, device - memory)
            self.expert_slots = expert_slots(parts, there, tiers, device - memory, kv_offload=False)
            return tiers
        key = parts.budget, device
        if key not in self.tiers:
            self.tiers[key] = divide_tiers(parts, there, self.offload, device)
        within = device - there.small_bytes - memory
        tiers = self.tiers[key]
        slots = expert_slots(parts, there, tiers, device, kv_offload=False)
        planned = tiers.host_bytes + tiers.host_window + tiers.conversions + parts.bounce
        planned += slots[0] * parts.largest_expert
        expert = there.largest_expert  # experts make room for caches first
        tiers = beside_caches(there.footprints, tiers, within - expert, max(parts.budget - planned, 0))
        taken = tiers.device_bytes + tiers.device_window + tiers.device_conversions
        self.expert_slots = slots[0], max(there.expert_slots(within - taken), 1 if expert else 0)
        return tiers

    def fits(self, batch: int) -> bool:
        """Whether `place` finds a placement."""
        try:
            self.place(batch)
        except BudgetError:
            return False
        return True


def _with_headroom(needed: int) -> int:
    """Bytes that have to be free for less_headroom() to leave `needed` of them."""
    return needed + min(HEADROOM, -(-needed // (HEADROOM_SHARE - 1)))
