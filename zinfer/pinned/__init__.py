"""Pinned host memory: one contiguous mapping, handed out in regions that return by themselves.

A `Pool` maps its whole capacity once, in slabs of at most 1 GiB (huge pages, touched, page-locked where there
is a CUDA device, near a NUMA node if asked), and gives out `Region` objects. A region supports the buffer
protocol, so `torch.frombuffer(region, ...)` makes a tensor over it without a copy, and the run goes back to the
pool exactly when the last view of it dies.

The environment variable `ZINFER_CUDART` names the CUDA runtime library to page-lock with, in place of the
one torch has loaded or the loader finds.

Where the compiled module could not be built, or with ZINFER_PORTABLE=1 in the environment, the classes are those of
`zinfer.pinned.portable`: the same in Python code, never page-locked. `COMPILED` tells which they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zinfer.pinned.compiled import portable_wanted, reason_of

COMPILED: bool = True
if TYPE_CHECKING:
    from zinfer.pinned._native import Pool, Region
elif portable_wanted():
    from zinfer.pinned.portable import Pool, Region

    COMPILED = False
else:
    try:
        from zinfer.pinned._native import Pool, Region
    except ImportError as error:
        from zinfer.pinned.portable import Pool, Region

        COMPILED = False
        reason_of(error)  # warns

__all__ = ["Pool", "Region"]
