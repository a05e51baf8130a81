"""Races and surprises that users of other offload runtimes have reported, each played on the staged device.

docs/design.md says which project had which, and which test keeps it out: some are beside the code they are about.
Nothing here measures time: whatever is late waits for a word of the test, and what must not run meanwhile cannot.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import zinfer
from tests import architectures
from tests.device.test_arena import Gate
from tests.device.test_lifted import on_thread, start, streamed
from tests.streaming.devices import BUFFERS, run_within
from tests.streaming.test_attached import MEMORY, finish, staged
from tests.streaming.test_exactness import IDS
from zinfer.device.attached import AttachedDevice
from zinfer.device.page_locks import PageLocks
from zinfer.device.staged import StagedProcessor
from zinfer.kv_offload.space import PAGE, Space

PATIENCE = 30.0  # seconds after which something will not come any more
SWEEPS = 8


@pytest.fixture
def folder(saved) -> str:
    return str(saved("llama"))


@pytest.fixture
def reference(folder) -> Any:
    return architectures.ALL["llama"][0].from_pretrained(folder).eval()


@pytest.fixture
def total(reference) -> int:
    return architectures.parameter_bytes(reference)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class InThread:
    """`work` on a thread of its own, which may be waited for together with something else."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self._ended = False
        self._work = work
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        finally:
            self._ended = True
            self._changed.set()

    def happened(self) -> None:
        """What is waited for beside its end has happened."""
        self._changed.set()

    def ended_first(self) -> bool:
        """Whether it ends before what is waited for has happened."""
        assert self._changed.wait(PATIENCE), "neither happened"
        return self._ended

    def end(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it hangs"
        return self.result


class Telling(StagedProcessor):
    """Calls `tell` when an operator waits for a copy that has not ended, and when a copy has to wait for operators."""

    def __init__(self, **how: Any) -> None:
        super().__init__(MEMORY, check=True, **how)
        self.told: dict[str, threading.Event] = {"operator": threading.Event(), "copy": threading.Event()}
        self.tell: Callable[[], None] = lambda: None

    def follow(self, event: Any) -> None:
        """See Processor."""
        if not event.done:
            self._say("operator")
        super().follow(event)

    def copy(self, moves: Any, after: Any, *, urgent: bool) -> Any:
        """See Processor."""
        if any(not event.done for event in after if event.transferred is None):  # a fence, not another copy
            self._say("copy")
        return super().copy(moves, after, urgent=urgent)

    def _say(self, who: str) -> None:
        self.told[who].set()
        self.tell()


def test_no_operator_runs_before_the_copy_of_its_weight_has_ended(folder, total, reference, nothing_left):
    gate = Gate("urgent", "ordinary")
    processor = Telling(delay=gate)
    model = run_within(folder, processor, total // 2, 1, offload="nvme")
    running = InThread(lambda: logits(model))
    processor.tell = running.happened
    if processor.told["operator"].is_set():
        running.happened()
    too_early = running.ended_first()
    gate.let("urgent")
    gate.let("ordinary")
    assert not too_early, "no operator has waited for a copy, and none has run"
    assert torch.equal(running.end(), logits(reference))
    finish(model, processor)


def test_memory_of_the_window_is_not_written_while_operators_may_still_read_it(
    folder, total, reference, nothing_left
):
    gate = Gate("fence")
    processor = Telling(delay=gate)
    model = run_within(folder, processor, total // 3, total, offload="nvme")
    running = InThread(lambda: logits(model))
    processor.tell = lambda: running.happened() if processor.told["copy"].is_set() else None
    processor.tell()
    too_early = running.ended_first()
    gate.let("fence")
    assert not too_early, "the window was used anew, and no operator is known to have ended"
    assert torch.equal(running.end(), logits(reference))
    finish(model, processor)


class Named(StagedProcessor):
    """Has a stream for each thread, by name, and writes down on which ones memory was given back."""

    def __init__(self) -> None:
        super().__init__(MEMORY, check=True)
        self.given_back: list[list[str]] = []

    def stream(self) -> Any:
        """See Processor."""
        return threading.current_thread().name

    def retire(self, block: Any, start: int, nbytes: int, streams: Any) -> Any:
        """See Processor."""
        self.given_back.append(list(streams))
        return super().retire(block, start, nbytes, streams)


def test_memory_is_given_back_on_the_streams_that_computed_with_it_not_on_that_of_the_copy(
    folder, nothing_left
):
    processor = Named()
    model = run_within(folder, processor, 1, 1, offload="nvme")
    fetch = start(model, streamed(model))
    on_thread("first", fetch.wait)
    on_thread("second", fetch.wait)
    processor.given_back.clear()
    del fetch
    assert processor.given_back == [["first", "second"]]
    on_thread("computing", lambda: logits(model))
    told = processor.given_back[1:]
    assert len(told) >= len([w for w in model.zinfer._streaming.weights if not w.wants_residence]) - 2
    assert {name for streams in told for name in streams} == {"computing"}
    finish(model, processor)


def test_what_was_copied_ahead_keeps_its_memory_until_it_was_used(folder, total, reference, nothing_left):
    processor = staged()
    model = run_within(folder, processor, 1, 2 * total, offload="nvme")
    device = model.zinfer._streaming.coordinator.device
    weights = [w for w in model.zinfer._streaming.weights if not w.wants_residence and not w.rows_only]
    parameters = dict(reference.named_parameters())
    for count in range(
        2, len(weights)
    ):  # a ring of slots fails where their number does not divide that of weights
        ahead, refused = [], None
        for weight in weights[:count]:
            fetch = device.start(weight, urgent=False)
            if fetch is None or not device.lift(fetch):
                refused = weight
                break
            ahead.append(fetch)
        for fetch in ahead:
            assert torch.equal(fetch.wait(), parameters[fetch.weight.name]), fetch.weight.name
        del ahead, fetch
    assert refused is not None, "the window held everything: the test proves nothing"
    finish(model, processor)


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_what_is_to_be_offloaded_is_not_on_the_device(offload, folder, total, monkeypatch, nothing_left):
    copied: Counter[str] = Counter()
    start_copy = AttachedDevice._start_copy

    def counted(self: Any, weight: Any, *rest: Any) -> Any:
        copied[weight.name] += 1
        return start_copy(self, weight, *rest)

    monkeypatch.setattr(AttachedDevice, "_start_copy", counted)
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload=offload)
    for _ in range(2):  # until all has come to stay, and the order is known
        logits(model)
    copied.clear()
    for _ in range(SWEEPS):
        logits(model)
    weights = [w for w in model.zinfer._streaming.weights if not w.rows_only]
    there = {w.name for w in weights if w.resident is not None}
    away = {w.name for w in weights} - there
    assert processor.peak < 0.7 * total
    assert len(away) >= len(weights) // 3
    assert set(copied) == away
    for name in sorted(away):  # one may be ahead when the count begins, and another when it ends
        assert abs(copied[name] - SWEEPS) <= 1, f"{name} was copied {copied[name]} times in {SWEEPS} sweeps"
    finish(model, processor)


def test_host_memory_is_what_its_weights_take_and_not_the_next_power_of_two(folder, total, nothing_left):
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total + BUFFERS, offload="cpu")
    for _ in range(2):
        model(IDS, use_cache=False)
    device = model.zinfer._streaming.coordinator.device
    on_host = [weight for weight in model.zinfer._streaming.weights if device.in_place(weight)]
    taken = sum(weight.nbytes for weight in on_host)
    assert taken == device.kept_bytes > 4 * PAGE
    window = device.window.capacity if device.window is not None else 0
    mapped = sum(pool.capacity for pool in device.pools)
    assert mapped <= window + taken + PAGE * (len(on_host) + 1)
    finish(model, processor)


def test_host_memory_of_caches_is_not_the_next_power_of_two_either():
    space = Space(
        64 * PAGE, page_lock="off", current=nullcontext, page_locks=PageLocks(StagedProcessor(MEMORY))
    )
    regions = [space.take(5 * PAGE), space.take(11 * PAGE)]
    assert all(region is not None for region in regions)
    assert space.capacity == 16 * PAGE
    space.close()


class Fenced(StagedProcessor):
    """Knows the last fence of a stream, and which copies to host memory wait for what."""

    def __init__(self) -> None:
        super().__init__(MEMORY, check=True)
        self.last: Any = None
        self.back: list[bool] = []  # whether a copy waits for the last fence before it

    def fence(self, stream: Any) -> Any:
        """See Processor."""
        self.last = super().fence(stream)
        return self.last

    def copy_cache(self, moves: Any, after: Any, *, back: bool) -> Any:
        """See Processor."""
        if back:
            self.back.append(self.last is not None and any(event is self.last for event in after))
        self.last = None  # the next copy needs one of its own
        return super().copy_cache(moves, after, back=back)


def test_keys_and_values_go_back_only_after_the_operators_that_made_them(folder, total, nothing_left):
    processor = Fenced()
    model = zinfer.run(folder, device=processor, offload="cpu", kv_offload="cpu", progress=False)
    model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(processor.back) >= 2 * 4 and all(processor.back)
    finish(model, processor)
