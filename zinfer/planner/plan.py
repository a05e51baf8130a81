"""What the planner found, as plain data and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from zinfer.planner.cost import MOST_BATCH, Bounds
from zinfer.wording import size_text as _size


@dataclass(frozen=True)
class Plan:
    """Where each weight lives and how long a sweep takes. Sizes in bytes, times in seconds; str() is for people.

    `device_bytes`, `host_bytes` and `nvme_bytes` are weights by tier and sum to `weight_bytes`; small tensors count for
    the tier that computes. `sweep_bytes` are what one decoding sweep asks for, `read_bytes` what of it the drive
    carries, `pcie_bytes` what crosses to the device. `cache_bytes` and `activation_bytes` are those of the whole batch
    at full length. `drive_seconds`, `pcie_seconds` and `compute_seconds` are the bounds of one decoding sweep at the
    mean length; `seconds_a_token` is the largest. `tokens_per_second` counts decoding alone, `throughput` the whole
    generation, the first token included. `prefill_chunk`: tokens of each prompt that are prefilled at once.
    `expert_bytes`: host memory for experts that are read one by one, `device_expert_bytes`: the device's, and
    `expert_hit_rate` how many of those that a router
    picks are there, if it picks all alike (a real one has favourites: more are). `tiers` maps the streamed and resident
    weights to device, host or nvme.
    """

    model: str
    hardware: str
    dtype: str
    offload: str
    batch: int
    prompt: int
    new_tokens: int
    weight_bytes: int
    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    small_bytes: int
    host_budget: int
    device_budget: int
    host_window: int
    device_window: int
    conversion_bytes: int
    buffer_bytes: int
    cache_bytes: int
    activation_bytes: int
    sweep_bytes: int
    read_bytes: int
    pcie_bytes: int
    drive_seconds: float
    pcie_seconds: float
    compute_seconds: float
    bottleneck: str
    seconds_a_token: float
    tokens_per_second: float
    first_token_seconds: float
    first_token_bottleneck: str
    throughput: float
    prefill_chunk: int
    largest_batch: int
    expert_bytes: int = 0
    device_expert_bytes: int = 0
    expert_hit_rate: float | None = None
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict of plain values, for programs."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            ("model", f"{self.model}, {_size(self.weight_bytes)} in {self.dtype}"),
            ("hardware", self.hardware),
            ("task", f"batch {self.batch}, {self.prompt} tokens of prompt, {self.new_tokens} new"),
            *self._tiers(),
            ("sweep", self._sweep()),
            ("bounds", self._bounds()),
            ("first token", f"{_time(self.first_token_seconds)} ({self.first_token_bottleneck})"),
            (
                "each token",
                f"{_time(self.seconds_a_token)} ({self.bottleneck}): {_rate(self.tokens_per_second)} tokens/s, "
                f"{_rate(self.throughput)} with the first one",
            ),
            ("batch", self._batches()),
            *(("note", note) for note in self.notes),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def _batches(self) -> str:
        if self.largest_batch >= MOST_BATCH:
            return f"{self.largest_batch} sequences fit with their cache, and maybe more"
        return f"up to {self.largest_batch} sequences fit with their cache"

    def _tiers(self) -> list[tuple[str, str]]:
        rows = []
        cache, activations = f"cache {_size(self.cache_bytes)}", f"activations {_size(self.activation_bytes)}"
        within, beside = "", ""
        if self.device_budget:
            rows.append(
                (
                    "device",
                    f"{_size(self.device_bytes)} of weights ({_share(self.device_bytes, self.weight_bytes)}), window "
                    f"{_size(self.device_window)}, {cache}, {activations}; budget {_size(self.device_budget)}",
                )
            )
        elif self.offload in ("cpu", "none"):  # all weights stay, and caches lie beside the budget
            beside = f"; beside it {cache}, {activations}"
        else:
            within, beside = f", {cache}", f"; beside it {activations}"
        rows.append(
            (
                "host",
                f"{_size(self.host_bytes)} of weights ({_share(self.host_bytes, self.weight_bytes)}), window "
                f"{_size(self.host_window)}{within}; budget {_size(self.host_budget)}{beside}",
            )
        )
        if self.expert_hit_rate is not None:
            there = (
                f" and {_size(self.device_expert_bytes)} of the device's" if self.device_expert_bytes else ""
            )
            rows.append(
                (
                    "experts",
                    f"{_size(self.expert_bytes)} of the host's{there} for those read one by one: "
                    f"{_percent(self.expert_hit_rate)} of the picked are there, if all are picked alike",
                )
            )
        rows.append(
            (
                "nvme",
                f"{_size(self.nvme_bytes)} of weights ({_share(self.nvme_bytes, self.weight_bytes)})",
            )
        )
        return rows

    def _sweep(self) -> str:
        text = f"{_size(self.sweep_bytes)} of weights, {_size(self.read_bytes)} of them from the drive"
        return text + (f", {_size(self.pcie_bytes)} over PCIe" if self.device_budget else "")

    def _bounds(self) -> str:
        parts = [
            ("drive", self.drive_seconds),
            ("pcie", self.pcie_seconds),
            ("compute", self.compute_seconds),
        ]
        shown = [
            f"{name} {_time(seconds)}" for name, seconds in parts if self.device_budget or name != "pcie"
        ]
        return ", ".join(shown)


def times(decode: Bounds, prefill: Bounds, batch: int, new_tokens: int) -> dict[str, Any]:
    """The fields of a Plan that follow from the bounds of its two kinds of sweep."""
    whole = prefill.seconds + decode.seconds * (new_tokens - 1)
    return {
        "drive_seconds": decode.drive,
        "pcie_seconds": decode.pcie,
        "compute_seconds": decode.compute,
        "bottleneck": decode.bottleneck,
        "seconds_a_token": decode.seconds,
        "tokens_per_second": batch / decode.seconds,
        "first_token_seconds": prefill.seconds,
        "first_token_bottleneck": prefill.bottleneck,
        "throughput": batch * new_tokens / whole,
    }


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 100 else f"{rate:.3g}"
