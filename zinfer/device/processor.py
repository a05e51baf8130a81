"""What zinfer asks of a processor with memory of its own: blocks, copies from host memory, events, a budget.

A GPU runs what it is told later, in the order of its streams. Nothing here waits for it but Event.wait(): copies
and operators wait for each other on the device. So "the weight is there" means that an event exists which the
operator's stream will wait for, and "nobody uses this memory any more" that there are events which the next copy
into it will wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

ALIGNMENT = 512  # bytes: torch's CUDA allocator aligns to it, and kernels are chosen by it
POISON = 0xFF  # a byte; NaN in every floating-point format


class Event(Protocol):
    """A point in a device's work."""

    @property
    def done(self) -> bool:
        """Whether it has been reached."""

    def wait(self) -> None:
        """Block the calling thread, without the GIL, until it has been reached."""

    @property
    def timed(self) -> bool:
        """Whether `started` and `finished` will be known."""

    @property
    def started(self) -> float | None:
        """When the copy that ends with it began (time.perf_counter); None where that is not known, or not yet."""

    @property
    def finished(self) -> float | None:
        """When it was reached; None where that is not known, or not yet."""

    @property
    def transferred(self) -> int | None:
        """Bytes of the copy that ends with it."""


class Processor(Protocol):
    """One device. Any thread may call any method; streams are the device's own objects, or None where it has none."""

    torch_device: torch.device
    name: str
    page_locks: bool  # copies from page-locked memory run by themselves
    overhead: int  # bytes that running anything there takes besides what is allocated
    keeps_residue: bool  # operators depend on addresses modulo layout.VECTOR, as a CPU's do

    @property
    def number(self) -> int:
        """That by which max_memory names the device."""

    def current(self) -> AbstractContextManager[Any]:
        """The device is the calling thread's, meanwhile, for calls of its runtime that name none."""

    def memory(self) -> tuple[int, int]:
        """Bytes that can be allocated now, within the limits of all models there, and all that the device has."""

    def free(self) -> int:
        """Bytes that can be allocated now but for those limits: what one model more may have."""

    def limit(self, nbytes: int | None, holder: object = None) -> None:
        """Refuse, from now on, to let this process allocate more than `nbytes` bytes; None: no limit any more.

        `holder`, if any: whom the limit is for, where several models compute there. With none, None lifts the limits
        of all of them.
        """

    def block(self, nbytes: int) -> Any:
        """Memory, aligned to ALIGNMENT. Raises OutOfMemoryError where the device has not got it."""

    def allocated(self, nbytes: int) -> int:
        """Bytes of the device that a block of `nbytes` takes, as its allocator rounds."""

    def reclaim(self) -> None:
        """Wait for what the device was given, and let whoever asks have the memory of blocks that died."""

    def over(self, block: Any, start: int, nbytes: int) -> tuple[torch.Tensor, Any]:
        """Bytes of a block as a tensor, and an object that dies with its last view."""

    def stream(self) -> Any:
        """The stream that the calling thread's operators run on."""

    def copy(
        self,
        moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[Event],
        *,
        urgent: bool,
    ) -> Event:
        """Copy each second tensor, in host memory, over the first, in order, once `after` are reached.

        Returns at once where the memory is page-locked. Urgent copies overtake the others.
        """

    def copy_cache(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, back: bool
    ) -> Event:
        """As copy, for keys and values: `back` from the device to host memory, else from there.

        Those of one direction run in the order in which they are given, and hold up nothing else: what they wait for
        are operators, which may be far behind the copies of weights.
        """

    def follow(self, event: Event) -> None:
        """What the calling thread's stream is given from now on waits for `event`."""

    def fence(self, stream: Any) -> Event:
        """An event reached when all that `stream` was given so far has run."""

    def used(self, memory: Any, stream: Any) -> None:
        """Operators on `stream` read `memory`: once it has died, it is not used anew before they have run.

        `memory`: a tensor, the result of an operator on another stream, or a block. What `stream` is given until it
        dies counts too.
        """

    def retire(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> list[Event]:
        """Fences of `streams`, after which these bytes of `block` may be written; nothing else uses them any more.

        It does not hold `block`, which has to know of `streams` (see `used`): it may die before they are reached.
        """

    def let_go(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> None:
        """`block` is given up; these bytes stay what they are until all that `streams` were given has run."""

    def close(self) -> None:
        """End its threads, if it has any."""
