"""The handle that `zinfer.run` leaves on the model: report, close, and the sweep clock."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from itertools import pairwise
from typing import Any

from torch import nn

from zinfer.planner.memory import process_peak
from zinfer.report import Report
from zinfer.residency import Residency
from zinfer.streaming import Streaming

SWEEPS_REMEMBERED = 4096


class Runtime:
    """`model.zinfer`. Any thread may call it; close() is idempotent.

    A sweep is counted at each call of the model itself; the time between two calls belongs to the
    first of them, so sampling and text output count as part of a token's time.
    """

    def __init__(
        self, model: nn.Module, streaming: Streaming, source: str, offload: str, bytes_written: int
    ) -> None:
        self._name = type(model).__name__
        self._streaming = streaming
        # In "cpu" and "none" every weight stays, whatever else takes memory: that is what was asked for.
        self._residency = Residency(model, streaming) if offload in ("auto", "nvme") else None
        self._source = source
        self.offload = offload
        self._bytes_written = bytes_written
        self._marks: deque[tuple[float, int]] = deque(maxlen=SWEEPS_REMEMBERED)
        self._first_sweep: float | None = None
        self._sweeps = 0

    def report(self) -> Report:
        """What happened so far."""
        coordinator, account = self._streaming.coordinator, self._streaming.account
        drives, counters = coordinator.device.drives, coordinator.counters
        spans = [
            (later[0] - mark[0], later[1] - mark[1])
            for mark, later in pairwise(list(self._marks))  # a copy: other threads may begin sweeps meanwhile
        ]
        if self._sweeps <= SWEEPS_REMEMBERED:
            spans = spans[1:]  # the first sweep also loads the residents
        seconds = sum(span for span, _ in spans)
        waits = sorted(counters.waits_by_weight.items(), key=lambda item: -item[1])
        stats = drives.stats
        pools = coordinator.device.pools
        huge = [pool.huge_bytes for pool in pools]
        return Report(
            model=self._name,
            source=self._source,
            offload=self.offload,
            backend=drives.backend,
            direct=all(file.direct for file in drives.files.values()),
            drives=tuple(map(str, drives.settings)),
            model_bytes=sum(w.nbytes for w in self._streaming.weights) + account.small,
            budget=account.ceiling,
            planned_resident_bytes=account.residents,
            resident_bytes=self.resident_bytes,
            window_bytes=account.window,
            small_bytes=account.small,
            bounce_bytes=account.bounce,
            conversion_bytes=account.conversions,
            pool_bytes=sum(pool.capacity for pool in pools),
            huge_page_bytes=None if None in huge else sum(filter(None, huge)),
            bytes_read=stats["bytes_transferred"],
            bytes_written=self._bytes_written,
            requests=stats["requests"],
            retries=stats["retries"],
            sweeps=self._sweeps,
            first_sweep_seconds=self._first_sweep,
            sweep_seconds=statistics.median(span for span, _ in spans) if spans else None,
            sweep_bytes=statistics.median(count for _, count in spans) if spans else None,
            read_rate=sum(count for _, count in spans) / seconds if seconds else None,
            wait_seconds=counters.wait_seconds,
            hits=counters.hits,
            misses=counters.misses,
            row_reads=counters.row_reads,
            row_bytes=counters.row_bytes,
            longest_waits=tuple(waits[:5]),
            process_peak_bytes=process_peak(),
            fallbacks=self._fallbacks(),
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are in memory for good by now, small tensors included."""
        weights = self._streaming.weights
        return sum(w.nbytes for w in weights if w.resident is not None) + self._streaming.account.small

    @property
    def bytes_read(self) -> int:
        """Bytes read from the drive so far."""
        count: int = self._streaming.coordinator.device.drives.stats["bytes_transferred"]
        return count

    @property
    def sweep_bytes(self) -> int:
        """Bytes that a sweep is expected to read once the residents are loaded."""
        return sum(w.read_bytes for w in self._streaming.weights if not (w.wants_residence or w.rows_only))

    @property
    def sweeps(self) -> int:
        """Sweeps begun so far."""
        return self._sweeps

    def close(self) -> None:
        """Stop every read and give all memory, descriptors and threads back. The model is unusable after."""
        self._streaming.coordinator.close()
        self._streaming.install()
        for weight in self._streaming.weights:
            weight.resident = None

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._streaming.coordinator.closed

    def share(self, memo: dict[int, Any]) -> None:
        """Prepare `memo` so that a deep copy of the model streams the same weights, the resident ones included."""
        self._streaming.share(memo)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return self  # a copied model streams through the same runtime

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self._sweeps} sweeps"
        return f"<zinfer runtime of {self._name} from {os.path.basename(self._source)}: {state}>"

    def begin_sweep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook for before the model's forward. Raises ClosedError after close(), and what Residency.before raises."""
        self._streaming.coordinator.refuse_closed()  # also where no weight is streamed that would say so
        if self._residency is not None:
            self._residency.before(args, kwargs)
        self._sweeps += 1
        self._marks.append((time.perf_counter(), self.bytes_read))

    def end_sweep(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook for after the model's forward."""
        if self._residency is not None:
            self._residency.after(output)
        if self._first_sweep is None and self._marks:
            self._first_sweep = time.perf_counter() - self._marks[0][0]

    def _fallbacks(self) -> tuple[str, ...]:
        drives = self._streaming.coordinator.device.drives
        notes = [f"{backend} not used: {reason}" for backend, reason in drives.fallbacks]
        reasons = dict.fromkeys(file.direct_reason for file in drives.files.values() if not file.direct)
        return (*notes, *(f"O_DIRECT not used: {reason}" for reason in reasons))
