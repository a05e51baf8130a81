"""Memory of a device that is used anew in the order of its own work."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from zinfer.device.arena import Arena
from zinfer.device.processor import ALIGNMENT, POISON
from zinfer.device.staged import StagedProcessor
from zinfer.errors import BudgetError

UNIT = 4 * ALIGNMENT


class Gate:
    """Delays of a StagedProcessor that last until they are let through, by kind."""

    def __init__(self, *kinds: str) -> None:
        self._open = {kind: threading.Event() for kind in kinds}

    def __call__(self, kind: str) -> float:
        if kind in self._open:
            assert self._open[kind].wait(10), f"nobody let the {kind} through"
        return 0.0

    def let(self, kind: str) -> None:
        self._open[kind].set()


class TwoStreams(StagedProcessor):
    """Writes down on which streams operators were when memory was given up."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.given_up: list[list[Any]] = []

    def let_go(self, block: Any, start: int, nbytes: int, streams: Any) -> None:
        self.given_up.append(list(streams))
        super().let_go(block, start, nbytes, streams)


def test_a_lease_returns_with_its_last_view_and_not_before():
    arena = Arena(StagedProcessor(1 << 20), 2 * UNIT)
    first, second = arena.acquire(UNIT), arena.acquire(UNIT)
    assert first is not None and second is not None
    assert arena.acquire(1) is None
    view = first.bytes[:10].view(2, 5)
    del first
    assert arena.acquire(1) is None
    assert arena.in_use == 2 * UNIT
    del view
    assert arena.acquire(UNIT) is not None


def test_the_next_holder_waits_for_operators_that_still_read():
    gate = Gate("fence")
    processor = StagedProcessor(1 << 20, delay=gate, check=True)
    arena = Arena(processor, UNIT)
    lease = arena.acquire(UNIT)
    assert lease is not None
    lease.used_on(None)
    lease.bytes.fill_(7)
    del lease
    again = arena.acquire(UNIT)
    assert again is not None, "memory is used anew before the device is done: its own order keeps that right"
    source = torch.ones(UNIT, dtype=torch.uint8)
    copied = processor.copy([(again.bytes, source)], again.after, urgent=True)
    assert not copied.done
    gate.let("fence")
    copied.wait()
    assert processor.races == []
    assert again.bytes.eq(1).all()
    processor.close()


def test_bytes_that_nobody_may_write_yet_and_are_written_are_told():
    gate = Gate("fence")
    processor = StagedProcessor(1 << 20, delay=gate, check=True)
    arena = Arena(processor, UNIT)
    lease = arena.acquire(UNIT)
    assert lease is not None
    lease.used_on(None)
    del lease
    again = arena.acquire(UNIT)
    assert again is not None
    again.bytes.fill_(3)  # a copy that does not wait for what it was told to
    gate.let("fence")
    for event in again.after:
        event.wait()
    assert len(processor.races) == 1
    assert again.bytes.eq(POISON).all()
    processor.close()


def test_a_copy_that_nobody_waited_for_holds_its_memory_until_it_has_ended():
    gate = Gate("ordinary")
    processor = StagedProcessor(1 << 20, delay=gate)
    arena = Arena(processor, UNIT)
    lease = arena.acquire(UNIT)
    assert lease is not None
    source = torch.ones(UNIT, dtype=torch.uint8)
    copied = processor.copy([(lease.bytes, source)], (), urgent=False)
    lease.copied(copied)
    del lease
    gc.collect()
    again = arena.acquire(UNIT)
    assert again is not None, "the copy holds its target: a GPU's does not"
    assert copied in again.after and not copied.done
    gate.let("ordinary")
    copied.wait()
    processor.close()


def test_a_closed_arena_leases_nothing_and_what_is_out_stays_readable():
    processor = TwoStreams()
    arena = Arena(processor, 2 * UNIT)
    lease = arena.acquire(UNIT)
    assert lease is not None
    lease.bytes.fill_(9)
    lease.used_on("first")
    lease.used_on("second")
    arena.close()
    assert arena.acquire(1) is None
    assert lease.bytes.eq(9).all()
    del lease
    assert processor.given_up == [["first", "second"]]
    processor.close()


def test_the_memory_of_a_resident_is_given_up_on_every_stream_that_is_known_by_then():
    processor, streams = TwoStreams(), ["first"]
    own = Arena(processor, UNIT, streams)
    lease = own.acquire(UNIT)
    assert lease is not None
    tensor = lease.bytes
    own.close()
    del own, lease
    streams.append("came later")
    del tensor
    assert processor.given_up == [["first", "came later"]]
    processor.close()


def test_memory_goes_back_to_the_device_only_after_operators():
    gate = Gate("fence")
    processor = StagedProcessor(UNIT, delay=gate)
    own = Arena(processor, UNIT, [None])
    lease = own.acquire(UNIT)
    own.close()
    del own, lease
    with pytest.raises(BudgetError):
        processor.block(UNIT)
    gate.let("fence")
    processor.close()
    for _ in range(1000):
        gc.collect()
        if processor.memory()[0] == UNIT:
            break
        threading.Event().wait(0.01)
    assert processor.memory()[0] == UNIT


def test_waiting_for_room_ends_when_a_lease_returns():
    arena = Arena(StagedProcessor(1 << 20), UNIT)
    held = [arena.acquire(UNIT)]
    timer = threading.Timer(0.05, held.clear)
    timer.start()
    assert arena.acquire(UNIT, timeout=10) is not None
    timer.join()
