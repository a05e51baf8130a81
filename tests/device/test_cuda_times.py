"""When copies ran, as a GPU tells it: milliseconds since an event, in single precision; played without one."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from zinfer.device import cuda
from zinfer.device.cuda import ORIGIN_SECONDS, CudaProcessor

HOUR = 3600.0


class Clock:
    """The time, and how many origins were taken."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.origins = 0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()

    class Event:
        def __init__(self, **_) -> None:
            self.at = 0.0

        def record(self, stream) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            clock.origins += 1

        def query(self) -> bool:
            return True

        def elapsed_time(self, end) -> float:
            return torch.tensor((end.at - self.at) * 1e3, dtype=torch.float32).item()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def processor(*, timed: bool) -> CudaProcessor:
    made = object.__new__(CudaProcessor)
    made.torch_device = torch.device("cuda", 0)
    made._streams = {False: "copying"}
    made._timing = "timing" if timed else None
    made._origin = None
    return made


def test_times_are_as_good_after_a_day_as_at_first(clock):
    timed = processor(timed=True)
    for hours in (0.0, 1.0, 10.0, 24.0):
        clock.now = 1000.0 + 1.000123 * hours * HOUR
        for _ in range(3):
            event = timed.copy([], [], urgent=False)
            assert event.started == event.finished == pytest.approx(clock.now, abs=5e-5)
            clock.now += 12.3456


def test_an_origin_serves_for_minutes(clock):
    timed = processor(timed=True)
    for _ in range(100):
        timed.copy([], [], urgent=False)
        clock.now += ORIGIN_SECONDS / 200
    assert clock.origins == 1


def test_where_no_times_are_kept_no_origin_is_taken(clock):
    event = processor(timed=False).copy([], [], urgent=False)
    assert (clock.origins, event.timed, event.started) == (0, False, None)
