"""Copies run while operators compute: not faster on some clock, but because nothing could go on if they did not.

An operator of these models does not end before the copy of the next weight has, and a copy runs only while an operator
does. Where the two took turns, as in a runtime that copies when a weight is asked for, each would wait for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import architectures
from tests.streaming.test_attached import MEMORY, finish, run_within
from tests.streaming.test_exactness import IDS
from zinfer.coordinator.coordinator import Coordinator
from zinfer.device.staged import StagedProcessor

PATIENCE = 8.0  # seconds, less than what a device waits with, until it counts as a deadlock
SWEEPS = 3
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Alternating(StagedProcessor):
    """Copies run only while `computing()`, once `gated`, and those that run hold up its end.

    Copies below `least` bytes, rows of a table, are exempt: nobody can foresee them.
    """

    least = 0

    def __init__(self) -> None:
        super().__init__(MEMORY, check=True)
        self.gated = False
        self.stuck: list[str] = []
        self._computing = False
        self._running = 0
        self._changed = threading.Condition()

    def _copy(self, spans: Any, held: Any, after: Any, kind: str, event: Any) -> None:
        with self._changed:
            exempt = event.transferred < self.least
            if not self._changed.wait_for(lambda: exempt or self._computing or not self.gated, PATIENCE):
                self.stuck.append(f"the {kind} copy of {event.transferred} bytes ran while no operator did")
            self._running += 1
        super()._copy(spans, held, after, kind, event)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    @contextmanager
    def computing(self, until: Callable[[], bool], otherwise: str) -> Iterator[None]:
        """An operator runs: at least as long as the body, then until `until()` holds and no copy runs."""
        with self._changed:
            self._computing = True
            self._changed.notify_all()
        yield
        with self._changed:
            # Asked often: an event is reached before its copy is counted as over, others without a word.
            for _ in range(int(PATIENCE / 0.01)):
                if self._running == 0 and until():
                    break
                self._changed.wait(0.01)
            else:
                self.stuck.append(otherwise)
            self._computing = False


@dataclass
class Sweeps:
    """What was used, in order."""

    uses: list[Any] = field(default_factory=list)


class Slow(TorchDispatchMode):
    """Products of matrices last until `wait()` returns, with the weight in hand."""

    def __init__(self, wait: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._wait = wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        return self._wait(run) if func in PRODUCTS else run()


@pytest.fixture
def sweeps(monkeypatch) -> Sweeps:
    seen = Sweeps()
    whole = Coordinator.whole

    def used(self: Any, weight: Any) -> Any:
        tensor = whole(self, weight)
        seen.uses.append(weight)
        return tensor

    monkeypatch.setattr(Coordinator, "whole", used)
    return seen


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_each_copy_runs_while_an_operator_computes(tier, saved, sweeps, nothing_left):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    total = architectures.parameter_bytes(reference)
    processor = Alternating()
    model = run_within(
        folder, processor, total // 3, 2 * total if tier == "host" else total // 3, offload="nvme"
    )
    coordinator = model.zinfer._streaming.coordinator
    processor.limit(None)  # for the wider window below
    largest = max(w.layout.nbytes for w in model.zinfer._streaming.weights)
    processor.least = min(w.nbytes for w in model.zinfer._streaming.weights)
    used_before = 0

    def operator(run: Callable[[], Any]) -> Any:
        nonlocal used_before
        if len(sweeps.uses) == used_before:
            return run()  # attention's own products: nothing was asked for
        used_before = len(sweeps.uses)
        weight = sweeps.uses[-1]
        if weight.resident is not None or weight not in order:
            return run()
        place = order.index(weight)
        following = order[(place + 1) % len(order)]
        processor.gated = True

        def copied() -> bool:
            return is_there(following)

        with processor.computing(
            copied, f"{following.name!r} did not come while {weight.name!r} was computed"
        ):
            return run()

    with torch.no_grad():
        for _ in range(2):
            model(IDS, use_cache=False)
        # Whatever lies where in it, the largest weight finds room beside another
        unsettle = model.zinfer._streaming.unsettle
        # A thread may hold what was read ahead for a moment
        wait_until(lambda: coordinator.renew_memory([], [], [], 3 * largest, unsettle))
        sweeps.uses.clear()
        for _ in range(2):
            expected = model(IDS, use_cache=False).logits
        order = list(dict.fromkeys(w for w in sweeps.uses if w.resident is None))
        assert len(order) > 6
        first = order[0]
        wait_until(lambda: is_there(first))
        with Slow(operator):
            for _ in range(SWEEPS):
                assert torch.equal(model(IDS, use_cache=False).logits, expected)
                assert processor.stuck == []
        processor.gated = False
        with processor.computing(lambda: True, ""):
            pass
    finish(model, processor)


def is_there(weight: Any) -> bool:
    """Whether it was copied ahead."""
    fetch = weight.fetch() if weight.fetch is not None else None
    return fetch is not None and fetch.lifted and fetch.done


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")
