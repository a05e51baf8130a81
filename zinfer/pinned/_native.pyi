"""Pinned host memory: one mapping, handed out in regions that return by themselves."""

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

    Any thread may call anything. The memory outlives every region. In a forked child `close` does nothing
    and everything but `capacity` raises `zinfer.errors.ClosedError`.
    """

    def __init__(
        self, capacity: int, *, page_lock: str = "auto", huge_pages: bool = True, touch_threads: int = 2
    ) -> None:
        """Map and touch `capacity` bytes, rounded up to a multiple of 4096.

        `page_lock`: "auto" registers the memory with the CUDA runtime where there is one and a device, and
        else says why not in `page_lock_reason`; "on" raises instead; "off" does not try.
        `huge_pages`: ask for 2-MiB pages (from 2 MiB of capacity on), else refuse them.
        `touch_threads`: threads that make the pages present; the caller is one of them.

        Raises `zinfer.errors.OptionError` (a ValueError) for an argument out of range and
        `zinfer.errors.BudgetError` when the memory, or the page lock under "on", is refused.
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
    def page_locked(self) -> bool:
        """Whether the memory is registered with the CUDA runtime now."""

    @property
    def page_lock_reason(self) -> str:
        """Why the memory is not page-locked; empty when it is."""

    @property
    def huge_bytes(self) -> int:
        """Bytes on huge pages now, counted in /proc/self/smaps at each call; 0 once unmapped."""

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start, and the regions out now.

        `acquires` (regions handed out), `releases` (regions returned), `refusals` (calls of `acquire` that
        returned None), `waits` (calls that had to wait), `peak_in_use` (bytes), `regions` (out now).
        """
