"""Host memory that copies run to and from, and could not be page-locked: told once, with what that costs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch

from zinfer.device.arena import Arena, Lease
from zinfer.device.processor import Processor
from zinfer.errors import OutOfMemoryError
from zinfer.pinned import Pool

logger = logging.getLogger("zinfer")

TRIAL_BYTES, TRIALS = 32 << 20, 3  # of a copy from memory that is not page-locked
LEAST_TRIAL_BYTES = 1 << 20  # where the device has no more


def why_pageable(pool: Pool) -> str:
    """Why `pool` could not be page-locked, and what would help."""
    if torch.version.hip is not None:
        return (
            "this torch is built for ROCm, and in this version zinfer page-locks through CUDA's runtime alone"
        )
    return pool.page_lock_reason


class PageLocks:
    """Looks at pools that `processor` copies from, or to; `notes` are for the report.

    A copy of memory that is not page-locked passes through a buffer of the driver's, while whoever starts it waits.
    Any thread may call any method.
    """

    def __init__(self, processor: Processor) -> None:
        self.notes: list[str] = []
        self._processor = processor
        self._told: set[str] = set()  # kinds of memory
        self._rate: float | None = None
        self._lock = threading.Lock()

    def check(self, pools: Sequence[Pool], kind: str, window: Arena | None = None) -> None:
        """Tell, once for each `kind` of memory, which of `pools` are not page-locked, and what that costs.

        `window`: memory on the device to try it in, if there is room; else some is taken for a moment.
        """
        if not self._processor.page_locks:
            return
        reasons = sorted({why_pageable(pool) for pool in pools if not pool.page_locked})
        if not reasons:
            return
        with self._lock:
            if kind in self._told:  # a reason names a size, and so is another one for each pool
                return
            self._told.add(kind)
            self._rate = self._rate or self._measured(window)
            cost = f", at {self._rate / 1e9:.1f} GB/s here" if self._rate is not None else ""
            for reason in reasons:
                note = f"{kind} is not page-locked ({reason}): copies are slower{cost}, and block a thread"
                logger.warning("%s: %s", self._processor.name, note)
                self.notes.append(note)

    def _measured(self, window: Arena | None) -> float | None:
        """Bytes a second of copies from ordinary memory to the device; None where that has no room to try it in."""
        lease = self._trial_memory(window)
        if lease is None:
            return None
        source, rates = torch.ones(lease.bytes.nbytes, dtype=torch.uint8), []
        for _ in range(TRIALS):
            started = time.perf_counter()
            self._processor.copy([(lease.bytes, source)], lease.after, urgent=True).wait()
            rates.append(source.nbytes / (time.perf_counter() - started))
        return max(rates)

    def _trial_memory(self, window: Arena | None) -> Lease | None:
        if window is not None and (lease := window.acquire(min(TRIAL_BYTES, window.capacity))) is not None:
            return lease
        nbytes = TRIAL_BYTES
        while nbytes >= LEAST_TRIAL_BYTES:
            try:
                own = Arena(self._processor, nbytes)
            except OutOfMemoryError:
                nbytes //= 2
                continue
            lease = own.acquire(nbytes)
            own.close()
            return lease
        return None
