"""What a sweep costs on a machine: pure functions on plain data.

    t_sweep = max( drive bytes / drive, bytes to the device / PCIe, compute )
    compute = sum over operators of max( flops / rate at M rows, bytes / bandwidth ) + time to start one

The first term of each kind is the design's bound; the second is the roofline (Williams, Waterman, Patterson 2009),
an operator at a time. The three overlap, since reads run ahead of the operators, so that the largest one is the time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from zinfer.planner.hardware import Hardware

MOST_BATCH = 1 << 20  # no batch above it is tried


@dataclass(frozen=True)
class Operator:
    """`count` operators that are alike: `rows` of the left operand (M), `flops` and bytes moved by each.

    `kind`: "matmul" for products with weights, "attention" for the fused one, "copy" for what only moves bytes.
    """

    kind: str
    dtype: str
    rows: float
    flops: float
    nbytes: float
    count: int = 1


@dataclass(frozen=True)
class PassWork:
    """One forward pass. `asks`: (index of a weight, share of it that operators ask for), rows of tables left out."""

    operators: tuple[Operator, ...]
    asks: tuple[tuple[int, float], ...]

    @property
    def flops(self) -> float:
        """Floating-point operations of the pass."""
        return sum(operator.flops * operator.count for operator in self.operators)


@dataclass(frozen=True)
class Work:
    """What a model does for one batch: the pass over the prompt, that of one new token, and the memory both take.

    `cache_bytes`: keys, values and states at the full length; `activation_bytes`: the most that other tensors
    take at once. Both grow in proportion to `batch`.
    """

    batch: int
    prefill: PassWork
    decode: PassWork
    cache_bytes: int
    activation_bytes: int

    def cache(self, batch: int) -> int:
        """Bytes that the cache takes with `batch` sequences, rounded up."""
        return -(-self.cache_bytes * batch // self.batch)


@dataclass(frozen=True)
class Bounds:
    """Seconds that each resource is busy in one sweep."""

    drive: float
    pcie: float
    compute: float

    @property
    def seconds(self) -> float:
        """The sweep's: all three work at the same time."""
        return max(self.drive, self.pcie, self.compute)

    @property
    def bottleneck(self) -> str:
        """`drive`, `pcie` or `compute`."""
        return max(("drive", "pcie", "compute"), key=lambda name: getattr(self, name))


def compute_seconds(operators: Sequence[Operator], hardware: Hardware) -> float:
    """Seconds of arithmetic and of memory traffic, whichever is more for each operator, and of starting them.

    A device computes while the host starts the operators after; the CPU does one after the other.
    """
    starting = sum(operator.count for operator in operators) * hardware.operator_seconds
    working = sum(
        operator.count
        * max(
            operator.flops / hardware.flop_rate(operator.dtype, operator.rows) if operator.flops else 0.0,
            operator.nbytes / hardware.bandwidth(operator.kind),
        )
        for operator in operators
    )
    return max(starting, working) if hardware.has_device else starting + working


def moved_bytes(asks: Sequence[tuple[int, float]], sizes: Sequence[int], kept: Container[int]) -> float:
    """Bytes of the weights that a pass asks for and that are not among those `kept` at its end of the way."""
    return sum(sizes[index] * share for index, share in asks if index not in kept)


def sweep(
    work: PassWork,
    sizes: Sequence[int],
    hardware: Hardware,
    *,
    device: Container[int] = (),
    host: Container[int] = (),
) -> Bounds:
    """Bounds of a pass; `sizes`: bytes read for each weight, `device` and `host`: those resident there.

    Where the CPU computes, residents are all `host` and nothing crosses PCIe.
    """
    above_drive = [index for index, _ in work.asks if index in device or index in host]
    crossing = moved_bytes(work.asks, sizes, device) if hardware.has_device else 0.0
    return Bounds(
        drive=moved_bytes(work.asks, sizes, frozenset(above_drive)) / hardware.drive_read,
        pcie=crossing / hardware.host_to_device if crossing else 0.0,
        compute=compute_seconds(work.operators, hardware),
    )


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch for which `fits`, which must not be true again above one that does not fit; 0 for none.

    MOST_BATCH means that or more: nothing above it is tried.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_BATCH and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_BATCH + 1)  # taken not to fit: the search ends there
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
