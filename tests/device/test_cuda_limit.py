"""What a process may allocate on a GPU, and what it is told is free there; played without one."""

from __future__ import annotations

import gc

import pytest
import torch

from zinfer.device import cuda
from zinfer.device.cuda import PARTLY_FILLED, WORKSPACE, CudaProcessor, load_kernels

MIB = 1 << 20
BESIDES = WORKSPACE + PARTLY_FILLED


class Card:
    """A GPU's memory, and torch's share of it. `on_set` is called once, while torch is told a share."""

    total = 8192 * MIB

    def __init__(self) -> None:
        self.outside = 512 * MIB  # contexts, other processes
        self.reserved = self.allocated = 0
        self.share = 1.0
        self.told: list[float] = []
        self.on_set = lambda: None

    @property
    def most(self) -> int:
        """Bytes that torch may reserve."""
        return round(self.share * self.total)

    def info(self, device: torch.device) -> tuple[int, int]:
        return self.total - self.outside - self.reserved, self.total

    def tell(self, share: float, device: torch.device) -> None:
        assert isinstance(share, float) and 0 <= share <= 1
        once, self.on_set = self.on_set, lambda: None
        once()
        self.share = share
        self.told.append(share)

    def empty(self) -> None:
        self.reserved = self.allocated

    def take(self, allocated: int, idle: int = 0) -> None:
        self.allocated += allocated
        self.reserved += allocated + idle


@pytest.fixture
def card(monkeypatch) -> Card:
    card = Card()
    monkeypatch.setattr(cuda, "_limits", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", card.info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: card.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: card.allocated)
    monkeypatch.setattr(torch.cuda, "empty_cache", card.empty)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", card.tell)
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: card.share, raising=False
    )
    return card


def processor() -> CudaProcessor:
    made = object.__new__(CudaProcessor)
    made.torch_device = torch.device("cuda", 0)
    return made


def test_what_the_process_has_already_does_not_count_against_the_limit(card):
    card.take(3000 * MIB, idle=500 * MIB)
    running = processor()
    running.limit(1000 * MIB)
    assert card.most == 4000 * MIB + BESIDES
    assert card.reserved == 3000 * MIB, "what is idle counts as if somebody had it"


def test_limits_of_models_that_share_a_device_add_up(card):
    card.take(1000 * MIB)
    first, second = processor(), processor()
    first.limit(500 * MIB)
    card.take(500 * MIB)  # the first model's
    second.limit(700 * MIB)
    assert card.most == 2200 * MIB + BESIDES
    first.limit(None)
    assert card.most == 1700 * MIB + BESIDES


def test_the_share_that_was_there_before_holds_throughout_and_comes_back(card):
    card.share = 0.5
    first, second = processor(), processor()
    first.limit(1000 * MIB)
    second.limit(6000 * MIB)
    assert card.share == 0.5
    second.limit(None)
    assert card.most == 1000 * MIB + BESIDES
    first.limit(None)
    assert card.share == 0.5


def test_what_was_not_limited_is_left_alone(card):
    processor().limit(None)
    assert card.told == []


def test_what_is_free_lies_within_the_limit_but_for_who_has_none_yet(card):
    running, coming = processor(), processor()
    card.take(1000 * MIB, idle=200 * MIB)
    assert running.memory() == (6680 * MIB, card.total)
    assert running.free() == 6680 * MIB
    running.limit(2000 * MIB)
    card.take(1500 * MIB, idle=100 * MIB)
    assert running.memory() == coming.memory() == (500 * MIB + BESIDES, card.total)
    assert coming.free() == 5180 * MIB
    card.outside = card.total - card.reserved - 30 * MIB  # another process takes nearly all
    assert running.memory()[0] == coming.free() == 130 * MIB


def test_a_share_that_somebody_else_has_set_is_all_there_is(card):
    card.share = 0.25
    card.take(48 * MIB)
    assert processor().memory() == (2000 * MIB, card.total)
    running = processor()
    running.limit(100 * MIB)
    assert running.free() == 2000 * MIB


def test_a_torch_that_cannot_tell_its_share_is_believed_to_have_it_all(card, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    running = processor()
    assert running.memory()[0] == card.total - card.outside
    running.limit(1000 * MIB)
    assert running.memory()[0] == 1000 * MIB + BESIDES
    running.limit(None)
    assert card.share == 1.0


def test_a_finalizer_may_lift_a_limit_while_another_is_set(card):
    dying, staying = processor(), processor()
    dying.limit(1000 * MIB)
    card.on_set = lambda: dying.limit(None)
    staying.limit(500 * MIB)
    assert card.most == 500 * MIB + BESIDES
    card.on_set = lambda: dying.limit(None)  # again: there is nothing to lift
    staying.limit(None)
    assert card.share == 1.0


def test_each_model_on_one_processor_has_a_limit_of_its_own(card):
    shared, first, second = processor(), object(), object()
    shared.limit(500 * MIB, first)
    card.take(500 * MIB)  # the first model's
    shared.limit(700 * MIB, second)
    assert card.most == 1200 * MIB + BESIDES
    shared.limit(None, first)
    shared.limit(None, first)
    assert card.most == 700 * MIB + BESIDES
    shared.limit(300 * MIB, first)
    shared.limit(None)
    assert card.share == 1.0


def test_a_limit_ends_with_its_processor(card):
    dropped, staying = processor(), processor()
    staying.limit(500 * MIB)
    dropped.limit(700 * MIB)
    dropped.limit(800 * MIB)
    assert card.most == 1300 * MIB + BESIDES
    del dropped
    gc.collect()
    assert card.most == 500 * MIB + BESIDES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_any_model_runs_can_run_before_memory_is_counted(dtype):
    load_kernels(torch.device("cpu"), dtype)
