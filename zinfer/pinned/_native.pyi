"""Pinned host memory: one contiguous mapping, handed out in regions that return by themselves."""

from typing import Literal, TypedDict, type_check_only

def online_nodes(path: str = "/sys/devices/system/node/online") -> list[int]:
    """The NUMA nodes online, ascending, from a list as the kernel writes it; [0] where it writes none."""

@type_check_only
class Stats(TypedDict):
    """Counts since the start, and the regions out now."""

    acquires: int
    """Regions handed out."""
    releases: int
    """Regions returned."""
    refusals: int
    """Calls of `acquire` that returned None."""
    waits: int
    """Calls of `acquire` that had to wait."""
    peak_in_use: int
    """Bytes."""
    regions: int
    """Out now."""

class Region:
    """A run of a pool's memory; made by `Pool.acquire` only.

    Supports the buffer protocol (writable, one dimension of `nbytes` bytes), so
    `torch.frombuffer(region, dtype=..., count=..., offset=...)` makes a tensor over it without a copy. The
    run returns to the pool when this object and every view of it (memoryview, tensor, view of a tensor) is
    gone, on whatever thread that happens. The bytes are whatever the last holder left.

    In a forked child the memory is not mapped: taking a view raises BufferError, from ClosedError; touching
    a view taken before the fork ends the child with SIGSEGV.
    """

    @property
    def address(self) -> int:
        """Address of the first byte; a multiple of 4096."""

    @property
    def nbytes(self) -> int:
        """Bytes of the run: what was asked for, rounded up to a multiple of 4096."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The whole run as writable unsigned bytes."""

class Pool:
    """One private anonymous mapping of `capacity` bytes, mapped, touched and page-locked once.

    Its addresses are one range, in slabs of `slab_bytes` that are advised, bound and page-locked one by one.
    A region may straddle a slab's edge, at `base_address + n * slab_bytes`; a CUDA copy must not, because each
    slab is a registration of its own: split it there.

    Any thread may call anything. The memory outlives every region. In a forked child `close` does nothing
    and everything but `capacity` and `slab_bytes` raises `zinfer.errors.ClosedError`.
    """

    def __init__(
        self,
        capacity: int,
        *,
        page_lock: Literal["auto", "on", "off"] = "auto",
        huge_pages: bool = True,
        touch_threads: int | None = None,
        numa_node: int | None = None,
        slab_bytes: int = 1 << 30,
    ) -> None:
        """Map and touch `capacity` bytes, rounded up to a multiple of 4096.

        `page_lock`: "auto" registers the memory, slab by slab, with the CUDA runtime where there is one and a
        device; the first refusal ends it, `locked_bytes` stay locked and `page_lock_reason` says why not all.
        "on" undoes what was locked and raises instead; "off" does not try.
        `huge_pages`: ask for 2-MiB pages (from 2 MiB of capacity on), else refuse them.
        `touch_threads`: threads that make the pages present, the caller one of them; None for one a CPU, at most 8;
        0: pages come when they are first used.
        `numa_node`: take the memory from this node as long as it has any (MPOL_PREFERRED). Where the kernel or
        a container refuses that, the pool works all the same and `numa_reason` says why.
        `slab_bytes`: a multiple of 2 MiB, at most 1 GiB; smaller ones are for tests.

        Raises `zinfer.errors.OptionError` (a ValueError) for an argument out of range or a node that is not
        online, and `zinfer.errors.BudgetError` when the memory, or the page lock under "on", is refused.
        """

    def acquire(self, nbytes: int, timeout: float = 0.0) -> Region | None:
        """A contiguous region of `nbytes` bytes rounded up to a multiple of 4096, or None when none is free.

        Waits up to `timeout` seconds (`math.inf` allowed) for regions to return, without the GIL; signals are
        handled at least every 100 ms meanwhile. Waiters are not queued: a small request may overtake a large
        one. Placed next-fit, so that first-in first-out use makes the pool a ring buffer.

        Raises ValueError (`nbytes` < 1, `timeout` negative or NaN), `zinfer.errors.BudgetError` (more than
        `capacity`) and `zinfer.errors.ClosedError` (closed before or during the wait, or in a forked child).
        """

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and held runs tile the pool, coalesced, and the counts agree."""

    def close(self) -> None:
        """Refuse further `acquire`; unmap now, or when the last region out has died. Idempotent."""

    @property
    def capacity(self) -> int:
        """Bytes of the pool."""

    @property
    def free_bytes(self) -> int:
        """Bytes in no region."""

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run: the largest `acquire` that would succeed now."""

    @property
    def in_use(self) -> int:
        """Bytes in regions."""

    @property
    def peak_in_use(self) -> int:
        """The highest `in_use` so far."""

    @property
    def base_address(self) -> int:
        """Address of the pool's first byte; 0 once unmapped."""

    @property
    def slab_bytes(self) -> int:
        """Distance of the slabs' edges from the first byte and from each other; the last slab may be shorter."""

    @property
    def locked_bytes(self) -> int:
        """Bytes registered with the CUDA runtime now: the first ones of the pool, whole slabs."""

    @property
    def page_locked(self) -> bool:
        """Whether all of the memory is registered with the CUDA runtime now."""

    @property
    def page_lock_reason(self) -> str:
        """Why the memory, or the part from `locked_bytes` on, is not page-locked; empty when all of it is."""

    @property
    def numa_reason(self) -> str:
        """Why the memory is not bound to `numa_node`; empty when it is, or when none was given."""

    @property
    def huge_bytes(self) -> int | None:
        """Bytes on huge pages now, counted in /proc/self/smaps at each call; 0 once unmapped.

        None where that file cannot be read.
        """

    @property
    def stats(self) -> Stats:
        """Counts since the start, and the regions out now."""
