"""Where recycled memory of a GPU is poisoned, in which order that happens; played without one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import POISON


class Played:
    """Streams and events of torch.cuda that write down what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.current = "computing"

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device):
        return PlayedStream(self, self.current)

    def event(self, **_):
        return PlayedEvent(self)


class PlayedStream:
    def __init__(self, played, name) -> None:
        self.played, self.name = played, name

    def wait_event(self, event) -> None:
        self.played.told.append(f"{self.name} waits for {event.name}")


class PlayedEvent:
    def __init__(self, played) -> None:
        self.played, self.name = played, ""

    def record(self, stream) -> None:
        self.name = f"the end of {stream}"
        self.played.told.append(self.name)


@pytest.fixture
def played(monkeypatch):
    played = Played()
    monkeypatch.setattr(torch.cuda, "stream", played.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", played.current_stream)
    monkeypatch.setattr(torch.cuda, "Event", played.event)
    return played


def processor(poisoning):
    made = object.__new__(CudaProcessor)
    made.torch_device = torch.device("cuda", 0)
    made._poisoning = poisoning
    made._caches = {True: "going back"}
    return made


def test_memory_is_poisoned_after_its_operators_and_before_the_next_copy(played):
    block = torch.zeros(64, dtype=torch.uint8)
    events = processor("poisoning").retire(block, 16, 8, ["one", "two"])
    assert played.told == [
        "the end of one",
        "the end of two",
        "the end of going back",
        "poisoning waits for the end of one",
        "poisoning waits for the end of two",
        "poisoning waits for the end of going back",
        "the end of poisoning",
    ]
    assert [event.event.name for event in events] == ["the end of poisoning"]
    assert torch.nonzero(block).flatten().tolist() == list(range(16, 24))
    assert set(block[16:24].tolist()) == {POISON}
    assert played.current == "computing"


def test_what_no_operator_was_given_and_what_is_not_poisoned_is_left_as_it_is(played):
    block = torch.zeros(64, dtype=torch.uint8)
    assert processor("poisoning").retire(block, 0, 64, []) == []
    assert len(processor(None).retire(block, 0, 64, ["one"])) == 1
    assert not block.any()
