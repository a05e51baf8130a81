"""Pinned host memory: one contiguous mapping, handed out in regions that return by themselves.

A `Pool` maps its whole capacity once, in slabs of at most 1 GiB (huge pages, touched, page-locked where there
is a CUDA device, near a NUMA node if asked), and gives out `Region` objects. A region supports the buffer
protocol, so `torch.frombuffer(region, ...)` makes a tensor over it without a copy, and the run goes back to the
pool exactly when the last view of it dies.

The environment variable `ZINFER_CUDART` names the CUDA runtime library to page-lock with, in place of the
one torch has loaded or the loader finds.
"""

from zinfer.pinned._native import Pool, Region

__all__ = ["Pool", "Region"]
