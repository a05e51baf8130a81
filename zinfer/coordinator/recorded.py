"""A coordinator that also writes down who waited for which weight, and what was computed with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from zinfer.coordinator.coordinator import Coordinator
from zinfer.device.device import Device
from zinfer.timeline.recorder import Recorder
from zinfer.weights.weight import Weight


class RecordedCoordinator(Coordinator):
    """A Coordinator that tells `recorder`; the reads are told by the device."""

    def __init__(
        self,
        device: Device,
        order: Sequence[Weight],
        on_resident: Callable[[Weight, torch.Tensor], None],
        recorder: Recorder,
    ) -> None:
        super().__init__(device, order, on_resident)
        self._recorder = recorder

    def whole(self, weight: Weight) -> torch.Tensor:
        """As Coordinator.whole."""
        self._recorder.asked()
        tensor = super().whole(weight)
        self._recorder.got(weight.name, self.device.in_use)
        return tensor

    def settled(self, weight: Weight) -> torch.Tensor | None:
        """As Coordinator.settled."""
        self._recorder.asked()
        tensor = super().settled(weight)
        if tensor is not None:
            self._recorder.got(weight.name, self.device.in_use)
        return tensor

    def rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """As Coordinator.rows."""
        self._recorder.asked()
        out = super().rows(weight, rows)
        self._recorder.got(weight.name, self.device.in_use)
        return out

    def _waited(self, name: str, since: float) -> None:
        super()._waited(name, since)
        self._recorder.waited(name, since, time.perf_counter())
