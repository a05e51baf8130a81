"""What a run did, as plain data and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GIB = float(1 << 30)


@dataclass(frozen=True)
class Report:
    """Figures of one model since zinfer.run. Sizes in bytes, times in seconds; str() is for people.

    `sweep_*` are medians over the sweeps after the first; None until there was one. `read_rate` is
    bytes a second over those sweeps, drive idle time included. `pool_bytes` are mapped for window and residents,
    and `huge_page_bytes` of them lie on huge pages now; None where the kernel does not count them. `drives` says how
    each block device is read.
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
    pool_bytes: int
    huge_page_bytes: int | None
    bytes_read: int
    bytes_written: int
    requests: int
    retries: int
    sweeps: int
    first_sweep_seconds: float | None
    sweep_seconds: float | None
    sweep_bytes: float | None
    read_rate: float | None
    wait_seconds: float
    hits: int
    misses: int
    row_reads: int
    row_bytes: int
    longest_waits: tuple[tuple[str, float], ...]
    process_peak_bytes: int
    fallbacks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict of plain values, for programs."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            ("model", f"{self.model} from {self.source}, {_size(self.model_bytes)}"),
            ("reads", f"{self.backend}, {'O_DIRECT' if self.direct else 'through the page cache'}"),
            *(("drives" if number == 0 else "", text) for number, text in enumerate(self.drives)),
            (
                "budget",
                f"{_size(self.budget)}: residents {_size(self.planned_resident_bytes)}, window "
                f"{_size(self.window_bytes)}, small tensors {_size(self.small_bytes)}, buffers "
                f"{_size(self.bounce_bytes)}"
                + (f", conversions {_size(self.conversion_bytes)}" if self.conversion_bytes else ""),
            ),
            ("pool", self._pool()),
            ("resident", f"{_size(self.resident_bytes)} of the model are in memory now"),
            ("moved", f"{_size(self.bytes_read)} read, {_size(self.bytes_written)} written"),
            ("sweeps", self._sweeps()),
            (
                "waits",
                f"{self.wait_seconds:.2f} s blocked on the drive; {self.hits} uses read ahead, {self.misses} on "
                f"demand, {self.row_reads} row lookups ({_size(self.row_bytes)})",
            ),
            ("memory", f"process peak {_size(self.process_peak_bytes)}"),
        ]
        lines += [("fallback", text) for text in self.fallbacks]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)

    def _pool(self) -> str:
        huge = "an unknown part" if self.huge_page_bytes is None else _size(self.huge_page_bytes)
        return f"{_size(self.pool_bytes)} for window and residents, {huge} of it on huge pages"

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
