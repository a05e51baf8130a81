"""Memory to read into and write from: huge pages, touched once, as zinfer's own pool has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zinfer.errors import BudgetError
from zinfer.pinned import Pool, Region


@contextmanager
def pool_of(nbytes: int) -> Iterator[Pool]:
    """A pool of `nbytes`, given back at the end. Raises BudgetError."""
    pool = Pool(nbytes, page_lock="off")
    try:
        yield pool
    finally:
        pool.close()


def hold(pool: Pool, nbytes: int) -> Region:
    """A region of `nbytes` of `pool`. Raises BudgetError when so much is not free."""
    region = pool.acquire(nbytes)
    if region is None:
        raise BudgetError(f"{nbytes} bytes are wanted, {pool.largest_free} of the pool are free")
    return region
