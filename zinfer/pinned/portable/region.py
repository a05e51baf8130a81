"""A run of a pool's memory that returns by itself: a flat array of bytes.

    view of any kind -> (Region ->) plain array -> Run        who holds whom; Run dies last and gives the run back

Neither arrays nor Region (it has no slots of its own) are known to the cycle collector, so it never finalizes a Run
within a cycle it takes apart: whatever the run is being read into has let go of it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy


class Run:
    """Owns `nbytes` at `address` until it dies; numpy makes an array over it that holds it."""

    __slots__ = ("__array_interface__", "_give_back", "_offset")

    def __init__(self, address: int, nbytes: int, offset: int, give_back: Callable[[int], None]) -> None:
        self._offset = offset
        self._give_back = give_back
        self.__array_interface__ = {
            "data": (address, False),  # writable
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._give_back(self._offset)


class Region(numpy.ndarray[Any, Any]):
    """A run of a pool's memory; made by `Pool.acquire` only; see zinfer.pinned.

    Supports the buffer protocol (writable, one dimension of `nbytes` bytes). The run returns to the pool when this
    object and every view of it (memoryview, tensor, view of a tensor) is gone, on whatever thread that happens.
    The bytes are whatever the last holder left. It compares by identity, as the compiled one does.

    In a forked child the memory is not mapped: touching it there ends the child with SIGSEGV.
    """

    __slots__ = ()

    def __new__(cls, *arguments: object, **options: object) -> Region:
        """Refused: a region is a run of some pool."""
        raise TypeError("a Region is made by Pool.acquire")

    @property
    def address(self) -> int:
        """Address of the first byte; a multiple of 4096."""
        address: int = self.__array_interface__["data"][0]
        return address

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Region of {self.nbytes} bytes at {self.address:#x}>"


def region_over(run: Run) -> Region:
    """The region that holds `run`."""
    return numpy.asarray(run).view(Region)
