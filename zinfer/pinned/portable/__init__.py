"""The pinned pool in Python, for machines where the compiled one could not be built.

The same `Pool` and `Region`, the same placement and errors; the memory is never page-locked.
"""

from __future__ import annotations

from zinfer.pinned.portable.pool import Pool
from zinfer.pinned.portable.region import Region

__all__ = ["Pool", "Region"]
