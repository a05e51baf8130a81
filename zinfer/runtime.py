"""The handle that `zinfer.run` leaves on the model: report, close, and the sweep clock."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zinfer.caches_on_host import CachesOnHost
from zinfer.errors import OptionError, OutOfMemoryError
from zinfer.experts.on_device import DeviceExperts
from zinfer.kv_cache import Pass, cache_length
from zinfer.planner.memory import process_peak
from zinfer.prefill import Prefill
from zinfer.relief import Relief
from zinfer.report import DeviceFigures, ExpertFigures, Report
from zinfer.residency import Residency
from zinfer.streaming import Streaming
from zinfer.timeline import chrome
from zinfer.timeline.recorder import Recorder
from zinfer.timeline.sweeps import Mark, Steady, SweepLog

logger = logging.getLogger("zinfer")


class Runtime:
    """`model.zinfer`. Any thread may call it; close() is idempotent.

    A sweep is counted at each call of the model itself; the time between two calls of a thread belongs to the
    first of them, so sampling and text output count as part of a token's time (see zinfer.timeline.sweeps).
    `recorder`: what the reads and operators are told to, if timeline() was asked for. `caches`: who puts
    key-value caches into host memory, if they are to be there. `predict`: seconds that a sweep of so many sequences,
    so many positions long, should take, or None; the report shows it beside the measured.
    """

    def __init__(
        self,
        model: nn.Module,
        streaming: Streaming,
        source: str,
        offload: str,
        bytes_written: int,
        *,
        recorder: Recorder | None = None,
        caches: CachesOnHost | None = None,
        predict: Callable[[int, int], float | None] | None = None,
    ) -> None:
        self._name = type(model).__name__
        self._streaming = streaming
        # Of "none", and of "cpu" on a CPU, every weight stays, whatever else takes memory: that is what was asked for.
        streams = offload in ("auto", "nvme") or (offload == "cpu" and streaming.host is not None)
        self._residency = Residency(model, streaming) if streams else None
        self._prefill = Prefill(model, streaming, self._residency, caches)
        self._relief = Relief(streaming, self._residency)
        self._source = source
        self.offload = offload
        self._bytes_written = bytes_written
        self._recorder = recorder
        self.caches = caches
        self._predict = predict
        self._predicted: float | None = None
        self._shape: tuple[int, int] | None = None  # sequences, and positions of each, of the last pass
        self._log = SweepLog()
        self._notes: dict[str, None] = {}  # what was told once

    def report(self) -> Report:
        """What happened so far."""
        coordinator = self._streaming.coordinator
        account = self._streaming.host or self._streaming.account
        drives, counters = coordinator.device.drives, coordinator.counters
        steady = self._log.steady()
        # A copy: other threads may wait meanwhile.
        waits = sorted(counters.waits_by_weight.copy().items(), key=lambda item: -item[1])
        stats = drives.stats
        drive_rate, drive_rate_source = self._drive_rate(steady)
        pools = coordinator.device.pools
        huge = [pool.huge_bytes for pool in pools]
        return Report(
            model=self._name,
            source=self._source,
            offload=self.offload,
            backend=drives.backend,
            direct=all(file.direct for file in drives.files.values()),
            drives=tuple(map(str, drives.settings)),
            model_bytes=sum(w.nbytes for w in self._streaming.weights) + self._streaming.account.small,
            budget=account.ceiling,
            planned_resident_bytes=account.residents,
            resident_bytes=self._host_bytes,
            window_bytes=account.window,
            small_bytes=account.small,
            bounce_bytes=account.bounce,
            conversion_bytes=account.conversions,
            cache_bytes=self._host_cache_bytes,
            pool_bytes=sum(pool.capacity for pool in pools),
            huge_page_bytes=None if None in huge else sum(filter(None, huge)),
            bytes_read=stats["bytes_transferred"],
            bytes_written=self._bytes_written,
            requests=stats["requests"],
            retries=stats["retries"],
            busy_seconds=stats["busy_seconds"] / max(1, len(drives.settings)),
            sweeps=self._log.begun,
            first_sweep_seconds=self._log.first_seconds,
            sweep_seconds=steady.sweep_seconds,
            sweep_bytes=steady.sweep_bytes,
            read_rate=steady.rate,
            predicted_seconds=self._predicted,
            drive_rate=drive_rate,
            drive_rate_source=drive_rate_source,
            steady_seconds=steady.wall_seconds,
            bubble_seconds=steady.bubble_seconds,
            steady_wait_seconds=steady.wait_seconds,
            each_sweep=self._log.sweeps(),
            wait_seconds=counters.wait_seconds,
            hits=counters.hits,
            misses=counters.misses,
            row_reads=counters.row_reads,
            row_bytes=counters.row_bytes,
            longest_waits=tuple(waits[:5]),
            waits_by_weight=dict(waits),
            process_peak_bytes=process_peak(),
            shortages=self._relief.count,
            fallbacks=self._fallbacks(),
            device=self._device_figures(),
            experts=self._expert_figures(),
        )

    def _expert_figures(self) -> ExpertFigures | None:
        cache, above = self._streaming.host_experts, self._streaming.experts
        if cache is None:
            return None
        there = above if isinstance(above, DeviceExperts) else None
        counters = cache.counters
        return ExpertFigures(
            limit_bytes=cache.limit,
            cached_bytes=cache.count * cache.slot_bytes,
            cached=cache.count,
            experts=cache.total,
            hits=counters.hits + (there.hits if there else 0),
            misses=counters.misses,
            read_bytes=counters.read_bytes,
            foreseen=counters.foreseen,
            guessed_bytes=counters.guessed_bytes,
            right_share=cache.trust.share,
            looks_ahead=cache.looks_ahead and cache.trust.pays,
            wait_seconds=counters.wait_seconds,
            device_limit_bytes=there.limit if there else 0,
            device_cached=there.count if there else 0,
            device_hits=there.hits if there else 0,
        )

    def _device_figures(self) -> DeviceFigures | None:
        if self._streaming.host is None:
            return None
        account = self._streaming.account
        return DeviceFigures(
            name=self._streaming.coordinator.device.name,
            budget=account.ceiling,
            planned_resident_bytes=account.residents,
            resident_bytes=self.resident_bytes,
            window_bytes=account.window,
            small_bytes=account.small,
            conversion_bytes=account.conversions,
            cache_bytes=self._cache_bytes,
        )

    @property
    def _cache_bytes(self) -> int:
        return 0 if self._residency is None else self._residency.cache_bytes

    @property
    def _host_cache_bytes(self) -> int:
        if self._streaming.host is None:
            return self._cache_bytes
        return 0 if self.caches is None else self.caches.nbytes

    @property
    def _host_bytes(self) -> int:
        """Bytes of weights that are in host memory for good by now."""
        kept = self._streaming.coordinator.device.kept_bytes
        return kept + (self.resident_bytes if self._streaming.host is None else 0)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are for good in the memory that computes by now, small tensors included."""
        weights = self._streaming.weights
        return sum(w.nbytes for w in weights if w.resident is not None) + self._streaming.account.small

    @property
    def bytes_read(self) -> int:
        """Bytes read from the drive so far."""
        count: int = self._streaming.coordinator.device.drives.stats["bytes_transferred"]
        return count

    @property
    def read_ahead_bytes(self) -> int:
        """Bytes of weights that have been read, or are being read, for operators still to come."""
        return self._streaming.coordinator.read_ahead_bytes

    @property
    def sweep_bytes(self) -> int:
        """Bytes that a sweep is expected to read once the residents are loaded."""
        device = self._streaming.coordinator.device
        return sum(
            weight.read_bytes
            for weight in self._streaming.weights
            if not (weight.wants_residence or weight.rows_only or device.in_place(weight))
        )

    @property
    def sweeps(self) -> int:
        """Sweeps begun so far."""
        return self._log.begun

    def timeline(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded so far to `path`: a trace that Perfetto opens and `zinfer timeline` draws.

        Works after close() too. Reads that have not ended are left out. Raises OSError, and OptionError when
        nothing was recorded.
        """
        if self._recorder is None:
            raise OptionError(
                "nothing was recorded: pass timeline=True to zinfer.run (or --timeline FILE to `zinfer run`)"
            )
        found = self._recorder.timeline(self._name)
        if not found.spans:
            raise OptionError("nothing was recorded yet: call the model first, then timeline()")
        chrome.write(found, path)

    def predict(self) -> float | None:
        """Seconds that a sweep like the last should take by `zinfer.plan`, to stand in the report beside the measured.

        None where that is not known: no pass yet, more than one drive, a live module, a changed config, a device whose
        caches lie in host memory, or a machine that was never measured (`zinfer plan MODEL` does that). Takes a second
        or two, for the model is built once more, without weights; transformers changes torch's default dtype meanwhile,
        so call it while no other thread computes. Raises what zinfer.plan raises.
        """
        drives = self._streaming.coordinator.device.drives
        if self._predict is not None and self._shape is not None and len(drives.settings) == 1:
            self._predicted = self._predict(*self._shape)
        return self._predicted

    def close(self) -> None:
        """Stop every read and give all memory, descriptors and threads back. The model is unusable after."""
        if self.caches is not None:
            self.caches.close()
        if self._streaming.experts is not None:
            self._streaming.experts.close()
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
        state = "closed" if self.closed else f"{self._log.begun} sweeps"
        return f"<zinfer runtime of {self._name} from {os.path.basename(self._source)}: {state}>"

    def begin_sweep(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A hook for before the model's forward, which gets what this returns.

        Raises ClosedError after close(), and what Residency.before and CachesOnHost.before raise.
        """
        self._streaming.coordinator.refuse_closed()  # also where no weight is streamed that would say so
        self._streaming.coordinator.device.enter()
        if self.caches is not None:
            kwargs = self.caches.before(args, kwargs)
        if self._residency is not None:
            self._residency.before(args, kwargs)
        if (coming := Pass.of(kwargs, args)) is not None:
            self._shape = coming.rows, coming.tokens + cache_length(kwargs.get("past_key_values"))
        if self._recorder is not None:
            self._recorder.begin_sweep()
        self._log.begin(self._mark())
        return args, kwargs

    def end_sweep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A hook for after the model's forward."""
        if self._recorder is not None:
            self._recorder.end_sweep()
        on_device = 0 if self._streaming.host is None else self.resident_bytes
        self._log.end(self._mark(), host_bytes=self._host_bytes, device_bytes=on_device)
        if self._residency is not None:
            self._residency.after(kwargs, output)
        self._streaming.coordinator.device.hurry()

    def prefill_chunk(self, input_ids: torch.Tensor, settings: Any, inputs: Mapping[str, Any]) -> int | None:
        """Tokens of a prompt to prefill at once; None: all, or as its settings say. See Prefill.chunk."""
        return self._prefill.chunk(input_ids, settings, inputs)

    def tell(self, note: str, level: int = logging.INFO) -> None:
        """Log `note` once, and have the report say it among what runs in another way than it might."""
        if note not in self._notes:
            self._notes[note] = None
            logger.log(level, "%s", note)

    def ran_out(self, error: BaseException) -> OutOfMemoryError:
        """What to raise, from `error`, where there was no memory in a pass. Gives memory back for the next one."""
        return self._relief.ended(error)

    def _mark(self) -> Mark:
        device = self._streaming.coordinator.device
        stats, tally = device.drives.stats, device.tally
        return Mark(
            at=time.perf_counter(),
            busy=stats["busy_seconds"] / max(1, len(device.drives.settings)),
            transferred=stats["bytes_transferred"],
            asked=tally.asked,
            waited=tally.waited,
            hits=tally.hits,
            misses=tally.misses,
        )

    def _drive_rate(self, steady: Steady) -> tuple[float | None, str]:
        """Bytes a second of all drives together, and who measured it."""
        drives = self._streaming.coordinator.device.drives
        measured = [drive.read_rate for drive in drives.settings if drive.read_rate is not None]
        if measured and len(measured) == len(drives.settings):
            return sum(measured), "aio_bench"
        busy = steady.wall_seconds - steady.bubble_seconds
        return (steady.rate * steady.wall_seconds / busy if steady.rate and busy > 0 else None), "engine"

    def _fallbacks(self) -> tuple[str, ...]:
        device = self._streaming.coordinator.device
        drives = device.drives
        notes = [f"{backend} not used: {reason}" for backend, reason in drives.fallbacks]
        reasons = dict.fromkeys(file.direct_reason for file in drives.files.values() if not file.direct)
        return (
            *notes,
            *self._relief.notes,
            *self._prefill.notes,
            *self._notes.copy(),
            *(f"O_DIRECT not used: {reason}" for reason in reasons),
            *device.fallbacks,
            *(self._streaming.experts.notes if self._streaming.experts is not None else ()),
        )
