"""Which weight lives where between uses: device, host or nvme. Pure functions on plain data.

What is resident on the device crosses neither PCIe nor the drive's cable, what is resident in host memory only PCIe.
Both bounds fall with every byte on the device, and the drive's with every byte in host memory, so the device is
filled first, then the host, each evenly over the sweep: no other choice predicts a shorter sweep, but for what is
left over because weights do not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zinfer.errors import BudgetError
from zinfer.planner.placement import Footprint, Placement, all_resident, divided, place, smallest


@dataclass(frozen=True)
class Tiers:
    """Indices of the weights resident on each tier, and bytes; what is in neither set streams from nvme."""

    device: frozenset[int]
    host: frozenset[int]
    device_bytes: int
    device_window: int
    device_conversions: int
    host_bytes: int
    host_window: int
    conversions: int


def place_on_cpu(weights: Sequence[Footprint], available: int, within: int, rows: int = 1) -> Tiers:
    """The placement of zinfer.run, which computes on the CPU: made for `available` bytes, cut to what caches leave.

    `rows`: sequences at once, as for place().
    Raises BudgetError with the fewest bytes `within` that work.
    """
    found = Placement(frozenset(), 0, 0, 0)
    if weights:
        found = divided(weights, place(weights, available), within, rows)
    return Tiers(
        frozenset(), found.residents, 0, 0, 0, found.resident_bytes, found.window_bytes, found.transient_bytes
    )


def place_on_tiers(
    weights: Sequence[Footprint], device_available: int, host_available: int, *, drive: bool = True
) -> Tiers:
    """Fill the device with residents, then the host; both windows are of bytes that pass through.

    What goes to the device passes through the host's window, whether it is to stay or not. Conversions are made on the
    device: the host keeps what they are made from.

    Rows-only tables stay off the device unless all fits, as rows are copied when they are asked for. Without
    `drive`, everything that is not on the device has to be in host memory.
    Raises BudgetError with the smallest number of bytes that works on the tier that is too small.
    """
    if not weights:
        return Tiers(frozenset(), frozenset(), 0, 0, 0, 0, 0, 0)
    try:
        top = place(weights, device_available)
    except BudgetError as error:
        raise BudgetError(
            f"the device has {device_available} bytes for weights, too few: {smallest(weights)} would do",
            smallest(weights),
        ) from error
    left = [index for index in range(len(weights)) if index not in top.residents]
    through = max((weights[index].window for index in top.residents), default=0)
    below = [replace(weights[index], resident=weights[index].window, transient=0) for index in left]
    needed = smallest(below, through) if drive else all_resident(below, through)
    if needed > host_available:
        raise BudgetError(
            f"the host has {max(host_available, 0)} bytes for weights, too few: {needed} would do", needed
        )
    bottom = place(below, host_available, through=through)
    return Tiers(
        device=top.residents,
        host=frozenset(left[index] for index in bottom.residents),
        device_bytes=top.resident_bytes,
        device_window=top.window_bytes,
        device_conversions=top.transient_bytes,
        host_bytes=bottom.resident_bytes,
        host_window=bottom.window_bytes,
        conversions=bottom.transient_bytes,
    )


def beside_caches(weights: Sequence[Footprint], tiers: Tiers, within: int, spare: int = 0) -> Tiers:
    """`tiers` in a run whose caches and activations leave `within` bytes of the device.

    Residents there go to host memory as far as `spare` bytes that nothing was planned for go, else back to the drive,
    as in residency.py and AttachedDevice.release.
    Raises BudgetError with the fewest bytes `within` that work.
    """
    if not weights:
        return tiers
    first = Placement(tiers.device, tiers.device_bytes, tiers.device_window, tiers.device_conversions)
    top = divided(weights, first, within)
    moved, left = set[int](), spare
    for index in sorted(tiers.device - top.residents):
        if weights[index].window <= left:
            moved.add(index)
            left -= weights[index].window
    return replace(
        tiers,
        device=top.residents,
        host=(tiers.host | moved) - top.residents,
        device_bytes=top.resident_bytes,
        device_window=top.window_bytes,
        device_conversions=top.transient_bytes,
        host_bytes=tiers.host_bytes + spare - left,
    )
