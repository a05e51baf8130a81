"""What the coordinator asks of a device and of a weight on its way to it; CpuDevice and AttachedDevice are devices."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from zinfer.aio.drives import Drives
from zinfer.errors import BudgetError
from zinfer.pinned import Pool
from zinfer.timeline.tally import Tally
from zinfer.weights.lowering import Placed
from zinfer.weights.weight import Weight


class Fetching(Protocol):
    """A weight on its way: see Fetch and LiftedFetch."""

    weight: Weight
    settles: bool
    generation: int

    @property
    def lifted(self) -> bool:
        """Whether it has room all the way to where it is computed with."""

    @property
    def takes_room(self) -> bool:
        """Whether a window has room when it is dropped."""

    @property
    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""

    def wait(self) -> torch.Tensor:
        """The tensor. Raises DriveError or CheckpointChangedError."""


class Device(Protocol):
    """Where a model computes, and the memory that its weights pass through. Any thread may call any method."""

    torch_device: torch.device
    name: str
    tally: Tally
    drives: Drives
    generation: int
    patience: float  # seconds that a thread alone waits for room: nobody else's operators give any back
    on_room: weakref.WeakMethod[Callable[[], None]] | None
    refused_bytes: (
        int  # of weights that were to stay where operators compute, but there was no memory for them
    )

    @property
    def fallbacks(self) -> list[str]:
        """What does not run as it should, for the report."""

    @property
    def pools(self) -> list[Pool]:
        """Mappings in host memory that weights lie in."""

    @property
    def ahead_bytes(self) -> int:
        """Bytes of weights that can be on their way at once; 0 where nothing streams."""

    @property
    def window_bytes(self) -> int:
        """Bytes of the window, where operators compute; 0 where there is none, or none could be had."""

    @property
    def in_use(self) -> int:
        """Bytes of the window, where operators compute, that hold a weight or are being filled."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights that stay in host memory and are copied from there at each use."""

    def in_place(self, weight: Weight) -> bool:
        """Whether a fetch of `weight` takes no room in the window that is read into."""

    def settles(self, weight: Weight) -> bool:
        """Whether a fetch of all of `weight` now would bring it to where it is to be resident."""

    def start(self, weight: Weight, *, urgent: bool, timeout: float = 0.0) -> Any:
        """Begin to fetch `weight`, or None when there is no room for it within `timeout` seconds."""

    def bring(self, weight: Weight) -> bool:
        """Read `weight` to where it stays in host memory, if it is to be copied from there; whether it is."""

    def lift(self, fetch: Any, timeout: float = 0.0) -> bool:
        """Find room for `fetch` where operators compute; whether there was any within `timeout` seconds."""

    def refused(self, weight: Weight) -> None:
        """There was no memory for `weight` to stay where operators compute; nobody needs all of it."""

    def shortage(self, weight: Weight) -> BudgetError:
        """What to raise where `weight` waited for room in vain."""

    def read_rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows (ascending, distinct) of a weight with a row source, in a tensor of their own.

        Of several rows, all that the weight has instead, where that costs less.
        """

    def read_together(self, placements: Sequence[Placed], *, allocated: bool) -> list[torch.Tensor]:
        """Small tensors, read at once."""

    def release(self, weight: Weight) -> None:
        """`weight` is to be resident no more."""

    def renew_memory(self, places: Sequence[Weight], wanted: Sequence[Weight], window_bytes: int) -> None:
        """Divide the memory anew: see CpuDevice and AttachedDevice."""

    def enter(self) -> None:
        """The calling thread runs operators from now on."""

    def reclaim(self) -> None:
        """Wait until what was given back can be had by others."""

    def free_memory(self) -> int | None:
        """Bytes that can be allocated now where operators compute; None where that is the host's memory."""

    def hurry(self) -> None:
        """Nobody waits for a first token any more."""

    def close(self) -> None:
        """Drain every read and copy, and give the memory back as soon as the last tensor on it dies."""
