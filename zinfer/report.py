"""What a run did, as plain data and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from zinfer.timeline.sweeps import Sweep

GIB = float(1 << 30)
SOURCES = {
    "aio_bench": "as aio_bench measured",
    "engine": "this run's, while reads were in flight; run aio_bench to measure it",
}
LONGEST_SHOWN = 3  # waits, in the text
SHORTEST_SHOWN = 0.001  # seconds: a shorter one is not worth a line


@dataclass(frozen=True)
class DeviceFigures:
    """A device's memory, in bytes: its budget, what was planned of it, and the weights that are there for good now."""

    name: str
    budget: int
    planned_resident_bytes: int
    resident_bytes: int
    window_bytes: int
    small_bytes: int
    conversion_bytes: int
    cache_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {_size(self.budget)}: residents {_size(self.planned_resident_bytes)} "
            f"({_size(self.resident_bytes)} there now), window {_size(self.window_bytes)}, small tensors "
            f"{_size(self.small_bytes)}"
            + (f", conversions {_size(self.conversion_bytes)}" if self.conversion_bytes else "")
            + (f", key-value caches {_size(self.cache_bytes)}" if self.cache_bytes else "")
        )


@dataclass(frozen=True)
class ExpertFigures:
    """Experts that are read one by one. `hits` were in memory when a router picked them, `misses` were not.

    `limit_bytes` of host memory is what they may take now, `cached_bytes` what the `cached` experts of `experts` in all
    do. `read_bytes` were read for them. `foreseen` of the misses were read, or being read, because the router of their
    layer, asked a layer before, had named them; `guessed_bytes` were read for others that it named. `right_share` of
    what it names is right lately, None before there is enough to tell; `looks_ahead`: whether that is read.
    `wait_seconds`: operators' threads, until one had landed. On a device with memory of its own, up to
    `device_limit_bytes` hold `device_cached` experts, and `device_hits` of the hits were there.
    """

    limit_bytes: int
    cached_bytes: int
    cached: int
    experts: int
    hits: int
    misses: int
    read_bytes: int
    foreseen: int
    guessed_bytes: int
    right_share: float | None
    looks_ahead: bool
    wait_seconds: float
    device_limit_bytes: int = 0
    device_cached: int = 0
    device_hits: int = 0

    def __str__(self) -> str:
        picked = self.hits + self.misses
        there = f", {self.device_cached} in {_size(self.device_limit_bytes)} of the device"
        guesses = "too few guesses to tell whether looking ahead pays"
        if self.right_share is not None:
            guesses = f"of those guessed a layer ahead {100 * self.right_share:.0f} % are right, so that "
            guesses += "they are read" if self.looks_ahead else "none is read"
            guesses += f": {self.foreseen} came so, and {_size(self.guessed_bytes)} in vain"
        share = (
            f"{100 * self.hits / picked:.0f} % of {picked} were there" if picked else "none was picked yet"
        )
        return (
            f"{self.cached} of {self.experts} in {_size(self.cached_bytes)} (at most {_size(self.limit_bytes)})"
            f"{there if self.device_limit_bytes else ''}; {share}, {_size(self.read_bytes)} read; {guesses}; "
            f"{self.wait_seconds:.2f} s blocked"
        )


@dataclass(frozen=True)
class Report:
    """Figures of one model since zinfer.run. Sizes in bytes, times in seconds; str() is for people.

    `sweep_*` are medians over the sweeps after the first (which loads the residents too); None until there was one.
    `predicted_seconds` is what such a sweep was predicted to take, if anybody did. `steady_seconds` is how long at
    least one of those sweeps ran, `read_rate` the bytes a second read meanwhile, drive idle time included, and
    `bubble_seconds` that idle time: no read was in flight, though every sweep reads again what is not resident
    (averaged over several drives; 0 where nothing streams). Where operators hardly waited meanwhile
    (`steady_wait_seconds`), compute is what takes the time and bubbles cost nothing. `drive_rate` is the drives'
    own rate, as `drive_rate_source` says: what "aio_bench" found, or what this model's "engine" read while it had
    reads in flight. `each_sweep`: the last 4096 that ended, as they began. `wait_seconds` is how long
    operators' threads were blocked, on the drive or for room in the window, summed over threads; `waits_by_weight`
    divides it, the longest first. `hits` are uses that a read ahead served, `misses` those that had to be read on
    demand. `pool_bytes` are mapped for window and residents, and `huge_page_bytes` of them lie on huge pages now;
    None where the kernel does not count them. `cache_bytes`: key-value caches alive at the last pass. `shortages`: how
    often memory ran out in a pass, so that some was given back. `drives` says how each block device is read;
    `busy_seconds`: how long reads were in flight, averaged over them. `device`: where another device than the CPU
    computes, its memory; the sizes above are then the host's. `experts`: those of a mixture that are read one by one.
    """

    model: str
    source: str
    offload: str
    backend: str
    direct: bool
    drives: tuple[str, ...]
    model_bytes: int
    budget: int
    planned_resident_bytes: int
    resident_bytes: int
    window_bytes: int
    small_bytes: int
    bounce_bytes: int
    conversion_bytes: int
    cache_bytes: int
    pool_bytes: int
    huge_page_bytes: int | None
    bytes_read: int
    bytes_written: int
    requests: int
    retries: int
    busy_seconds: float
    sweeps: int
    first_sweep_seconds: float | None
    sweep_seconds: float | None
    sweep_bytes: float | None
    read_rate: float | None
    predicted_seconds: float | None
    drive_rate: float | None
    drive_rate_source: str
    steady_seconds: float
    bubble_seconds: float
    steady_wait_seconds: float
    each_sweep: tuple[Sweep, ...]
    wait_seconds: float
    hits: int
    misses: int
    row_reads: int
    row_bytes: int
    longest_waits: tuple[tuple[str, float], ...]
    waits_by_weight: dict[str, float]
    process_peak_bytes: int
    shortages: int
    fallbacks: tuple[str, ...]
    device: DeviceFigures | None = None
    experts: ExpertFigures | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict of plain values, for programs."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        where = "host " if self.device is not None else ""
        lines = [
            ("model", f"{self.model} from {self.source}, {_size(self.model_bytes)}"),
            ("reads", f"{self.backend}, {'O_DIRECT' if self.direct else 'through the page cache'}"),
            *(("drives" if number == 0 else "", text) for number, text in enumerate(self.drives)),
            (
                "budget",
                f"{_size(self.budget)}: residents {_size(self.planned_resident_bytes)}, window "
                f"{_size(self.window_bytes)}, small tensors {_size(self.small_bytes)}, buffers "
                f"{_size(self.bounce_bytes)}"
                + (f", conversions {_size(self.conversion_bytes)}" if self.conversion_bytes else "")
                + (f", key-value caches {_size(self.cache_bytes)}" if self.cache_bytes else ""),
            ),
            *([("device", str(self.device))] if self.device is not None else []),
            ("pool", self._pool()),
            ("resident", f"{_size(self.resident_bytes)} of the model are in {where}memory now"),
            *([("experts", str(self.experts))] if self.experts is not None else []),
            ("moved", f"{_size(self.bytes_read)} read, {_size(self.bytes_written)} written"),
            ("sweeps", self._sweeps()),
            *(("predicted", text) for text in self._predicted()),
            *(("last sweep", text) for text in self._tiers()),
            ("rate", self._rate()),
            *(("bubbles", text) for text in self._bubbles()),
            (
                "waits",
                f"{self.wait_seconds:.2f} s blocked; {self.hits} uses read ahead, {self.misses} on "
                f"demand, {self.row_reads} row lookups ({_size(self.row_bytes)})",
            ),
            *(
                ("", f"{seconds:8.3f} s for {name}")
                for name, seconds in self.longest_waits[:LONGEST_SHOWN]
                if seconds >= SHORTEST_SHOWN
            ),
            ("memory", f"process peak {_size(self.process_peak_bytes)}"),
        ]
        lines += [("fallback", text) for text in self.fallbacks]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)

    def _pool(self) -> str:
        huge = "an unknown part" if self.huge_page_bytes is None else _size(self.huge_page_bytes)
        return f"{_size(self.pool_bytes)} for window and residents, {huge} of it on huge pages"

    def _predicted(self) -> list[str]:
        if self.predicted_seconds is None:
            return []
        text = f"{self.predicted_seconds:.3f} s a sweep"
        if self.sweep_seconds is not None:
            off = 100 * (self.sweep_seconds / self.predicted_seconds - 1)
            text += f"; measured {self.sweep_seconds:.3f} s, {off:+.1f} %"
        return [text]

    def _tiers(self) -> list[str]:
        """Where the weights of the last sweep came from."""
        if not self.each_sweep:
            return []
        last = self.each_sweep[-1]
        device = f", {_size(last.device_bytes)} from device memory" if last.device_bytes else ""
        return [
            f"{_size(last.nvme_bytes)} from the drive, {_size(last.host_bytes)} from host memory{device}; "
            f"{last.hits} uses read ahead, {last.misses} on demand, {last.wait_seconds:.3f} s blocked"
        ]

    def _rate(self) -> str:
        if self.drive_rate is None:
            return "known after the second sweep" if self.bytes_read else "nothing was read"
        own = f"the drive's own {self.drive_rate / 1e9:.2f} GB/s ({SOURCES[self.drive_rate_source]})"
        if self.read_rate is None:
            return own
        return f"{self.read_rate / 1e9:.2f} GB/s, {100 * self.read_rate / self.drive_rate:.0f} % of {own}"

    def _bubbles(self) -> list[str]:
        if not self.steady_seconds:
            return []
        share = 100 * self.bubble_seconds / self.steady_seconds
        return [
            f"{self.bubble_seconds:.2f} of {self.steady_seconds:.2f} s ({share:.1f} %) without a read in flight; "
            f"operators were blocked for {self.steady_wait_seconds:.2f} s of it all"
        ]

    def _sweeps(self) -> str:
        if self.first_sweep_seconds is None:
            return "none finished yet"
        text = f"{self.sweeps}; the first took {self.first_sweep_seconds:.2f} s"
        if self.sweep_seconds is not None and self.sweep_bytes is not None and self.read_rate is not None:
            text += (
                f", later ones {self.sweep_seconds:.3f} s each (median), reading {_size(self.sweep_bytes)} "
                f"at {self.read_rate / 1e9:.2f} GB/s"
            )
        return text


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.2f} MiB"
