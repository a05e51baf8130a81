"""How many bytes each tier has, and what goes where within them: one answer for `zinfer.run` and `zinfer.plan`.

Nothing is allocated here. What is free is asked of the machine and of the processor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zinfer.device.processor import Processor
from zinfer.errors import BudgetError
from zinfer.parts import Held, Parts, PartsOnDevice, least_budget
from zinfer.planner.memory import free_memory, total_memory
from zinfer.planner.placement import ROWS_WINDOW, Placement, all_resident, place, smallest
from zinfer.planner.tiers import Tiers, place_on_tiers

logger = logging.getLogger("zinfer")

CACHE_SHARE = 4  # where key-value caches are in host memory, this part of its budget is kept for them
EXPERTS_AT_ONCE = 16  # for so many there is room even where weights of every token have to stream
EXPERT_SHARE = 4  # ... if they take no more than this part of what weights may take
KERNELS, KERNELS_SHARE = 320 << 20, 8  # bytes; or this part of what is free, if that is less
HEADROOM = 512 << 20  # bytes of free memory left to the libraries' own pages and what torch allocates unasked
HEADROOM_SHARE = (
    16  # ... or this part of it, if that is less: residency.py makes room for caches and activations
)


def default_budget() -> int:
    """Bytes zinfer allocates at most where the user sets no ceiling: what is free now, less headroom."""
    return less_headroom(free_memory())


def less_headroom(free: int) -> int:
    """What zinfer may take of `free` bytes."""
    return max(free - min(HEADROOM, free // HEADROOM_SHARE), 0)


def less_kernels(free: int) -> int:
    """What a mixture has of `free` bytes beside torch on a CPU, which keeps a kernel for each number of rows it meets.

    The experts of a long prompt get any number of rows each, in products of several shapes: up to 1024 kernels, of half
    a megabyte as measured.
    """
    return free - min(KERNELS, free // KERNELS_SHARE)


def host_budget(ceiling: int | None, spare: int) -> int:
    """Bytes of host memory to be used where `spare` can be had. Raises BudgetError for a ceiling above the machine."""
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


def device_budget(processor: Processor, ceiling: int | None) -> int:
    """Bytes that may be allocated on the device. Raises BudgetError for a ceiling above what it has."""
    free, total = processor.free(), processor.memory()[1]
    key = f"max_memory[{processor.number}]"
    if ceiling is not None and ceiling > total:
        raise BudgetError(
            f"{key} is {ceiling} bytes, but {processor.name} has {total}; ask for at most {free}, what is free now"
        )
    if ceiling is not None and ceiling > free:
        logger.warning(
            "%s is %d bytes, of which %d are free on %s now; using those", key, ceiling, free, processor.name
        )
    return (less_headroom(free) if ceiling is None else min(ceiling, free)) - processor.overhead


def place_on_host(parts: Parts, held: Sequence[Held], offload: str) -> Placement:
    """Where the weights go that the CPU computes with. Raises BudgetError with the smallest budget that works."""
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
    if not parts.footprints:
        return Placement(frozenset(), 0, 0, 0)
    available = budget - parts.fixed
    return place(parts.footprints, available - cpu_reserve(parts, available))


def cpu_reserve(parts: Parts, available: int) -> int:
    """Bytes of `available` that are kept for experts on a CPU, before other weights are placed.

    Where not all experts fit, tables of rows do not stay: reading a row takes less time than the expert that fits in
    the table's place saves.
    """
    if not parts.layers:
        return 0
    others = [item for item in parts.footprints if not item.sliced]
    reserve = expert_reserve(parts.largest_expert, available, smallest(parts.footprints))
    if parts.expert_bytes <= available - all_resident(others):
        return reserve
    tables = sum(item.resident for item in others if item.rows_only and item.window > ROWS_WINDOW)
    return max(reserve, available - max(all_resident(others) - tables, smallest(parts.footprints)))


def expert_reserve(nbytes: int, available: int, least: int) -> int:
    """Bytes of `available` that are kept for experts of `nbytes` each, read one by one, before others are placed.

    Few: what every token needs comes first, an expert's memory pays only when the router picks it again. Other weights
    take `least` bytes.
    """
    wanted = min(EXPERTS_AT_ONCE * nbytes, available // EXPERT_SHARE)
    return max(nbytes, min(wanted, available - least))


def expert_slots(
    parts: Parts, there: PartsOnDevice, tiers: Tiers, budget: int, *, kv_offload: bool
) -> tuple[int, int]:
    """How many experts have room beside `tiers`: in host memory, and on a device of which `budget` bytes are used.

    Caches that go to the host have their part of it, and so have weights that may have to leave the device for others.
    """
    if not parts.layers:
        return 0, 0
    left = parts.budget - parts.bounce - tiers.host_bytes - tiers.host_window - tiers.conversions
    left -= parts.budget // CACHE_SHARE if kv_offload else 0
    left -= min(left // EXPERT_SHARE, sum(parts.weights[index].layout.nbytes for index in tiers.device))
    taken = there.small_bytes + tiers.device_bytes + tiers.device_window + tiers.device_conversions
    return max(parts.expert_slots(left), 1), max(there.expert_slots(budget - taken), 1)


def tiers_within(
    parts: Parts, there: PartsOnDevice, offload: str, budget: int, processor: Processor, *, kv_offload: bool
) -> Tiers:
    """Where the weights go with a device of its own memory.

    Raises BudgetError with the budget that would do, of the tier that is too small.
    """
    key = f"max_memory[{processor.number}]"
    needed = there.needed(offload)
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
    try:
        return divide_tiers(parts, there, offload, budget, kv_offload=kv_offload)
    except BudgetError as error:
        needed = (error.smallest or 0) + parts.bounce
        raise BudgetError(
            f"the host's budget is {parts.budget} bytes, but offload={offload!r} needs {needed} there: raise "
            f"max_memory['cpu'] to that, or {key}{_shortage(needed)}",
            needed,
        ) from error


def divide_tiers(
    parts: Parts, there: PartsOnDevice, offload: str, budget: int, *, kv_offload: bool = False
) -> Tiers:
    """place_on_tiers with `budget` bytes of the device, and the host's budget of `parts`; small tensors come first.

    Raises what that raises: with bytes for weights and an expert that is read by itself.
    """
    drive, host = offload in ("auto", "nvme"), parts.budget - parts.bounce
    on_device = budget - there.small_bytes
    expert = parts.largest_expert
    on_device -= expert_reserve(there.largest_expert, on_device, smallest(there.footprints)) if expert else 0

    def placed(host: int) -> Tiers:
        # Of the host, other weights need least what passes to the device: the largest of them.
        passing = max((footprint.window for footprint in there.footprints if not footprint.sliced), default=0)
        return place_on_tiers(
            there.footprints, on_device, host - expert_reserve(expert, host, 2 * passing), drive=drive
        )

    if kv_offload:
        try:
            return placed(host - parts.budget // CACHE_SHARE)
        except BudgetError as error:
            host = min(host, (error.smallest or host) + expert)  # caches get what is left
    try:
        return placed(host)
    except BudgetError as error:
        raise BudgetError(str(error), (error.smallest or 0) + expert) from error


def _shortage(needed: int) -> str:
    spare = default_budget()
    return f" (but only {spare} bytes are free now: end other programs first)" if needed > spare else ""
