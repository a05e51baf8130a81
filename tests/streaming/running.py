"""Run tiny models within the fewest bytes that work, and ask them for tokens."""

from __future__ import annotations

import gc
import random
import signal
from typing import Any

import torch

import zinfer

IDS = torch.tensor([[5, 17, 33, 101, 200, 9, 77]])
DEADLINE = 60.0  # seconds after which a test calls it a hang


def smallest(source: Any, **options: Any) -> int:
    """The fewest bytes of budget that stream `source`, as the error says."""
    try:
        zinfer.run(source, offload="nvme", max_memory={"cpu": 1}, **options).zinfer.close()
    except zinfer.BudgetError as error:
        assert error.smallest is not None
        return error.smallest
    return 1


def run_tightly(source: Any, spare: int = 0, **options: Any) -> Any:
    """Stream `source` within `spare` bytes more than the fewest that work; caches, not counted here, come besides."""
    ceiling = smallest(source, **options) + spare
    model = zinfer.run(source, offload="nvme", max_memory={"cpu": ceiling}, **options)
    model.zinfer._residency = None  # test_residency.py tells what caches do to the weights
    return model


def tokens(model: Any, ids: torch.Tensor = IDS, count: int = 6) -> list[list[int]]:
    """Greedy tokens after `ids`."""
    out: list[list[int]] = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0).tolist()
    return out


def check_device(model: Any) -> None:
    """The engines are whole and idle, the window's regions tile it."""
    device = model.zinfer._streaming.coordinator.device
    device.drives.check_integrity()
    if device.window is not None:
        device.window.check_integrity()


def window_in_use(model: Any) -> int:
    """Bytes of the window in regions."""
    window = model.zinfer._streaming.coordinator.device.window
    return 0 if window is None else window.in_use


def survive_interrupts(model: Any, expected: list[list[int]]) -> None:
    """Interrupt `model` at sixty moments, keep the errors, and have it generate `expected` afterwards."""
    chooser = random.Random(7)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()  # an interrupt in one, such as hypothesis's, is lost, and its frames are kept
    try:
        kept = []
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, chooser.uniform(0.0005, 0.02))
                tokens(model, count=40)
            except KeyboardInterrupt as error:
                kept.append(error)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(kept) > 30
        assert tokens(model) == expected
        check_device(model)
    finally:
        gc.callbacks.extend(callbacks)
        signal.signal(signal.SIGALRM, previous)
