"""Memory for experts: free when the last tensor on it dies, the lowest first, given back from the top."""

from __future__ import annotations

import gc
import threading
import time
from itertools import pairwise

import pytest
import torch

from zinfer.experts.slots import Slots

SIZE = 2 << 20


def until(holds) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture
def slots():
    made = Slots(4, SIZE)
    until(lambda: made.present == 4)
    yield made
    made.close()


def test_slots_become_present_by_themselves_and_the_lowest_is_taken(slots):
    taken = [slots.take() for _ in range(4)]
    addresses = [address for _, address in taken]
    assert addresses == sorted(addresses)
    assert [b - a for a, b in pairwise(addresses)] == [SIZE] * 3
    assert slots.take() is None


def test_a_slot_is_free_when_the_last_tensor_on_it_has_died(slots):
    taken = [slots.take() for _ in range(4)]
    view, address = taken.pop(2)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    part = tensor[100:200]
    del view, tensor
    assert slots.take() is None
    del part
    again = slots.take()
    assert again is not None and again[1] == address


def test_what_is_not_allowed_goes_back_to_the_kernel_as_it_comes_free(slots):
    taken = [slots.take() for _ in range(4)]
    for view, _ in taken:
        torch.frombuffer(view, dtype=torch.uint8).fill_(7)
    addresses = [address for _, address in taken]
    del view
    slots.allow(2)
    taken.clear()
    assert slots.present == 2
    first, second = slots.take(), slots.take()
    assert first is not None and second is not None
    assert [first[1], second[1]] == addresses[:2] and slots.take() is None
    slots.allow(4)
    until(lambda: slots.present == 4)
    third = slots.take()
    assert third is not None
    assert torch.frombuffer(third[0], dtype=torch.uint8).sum() == 0, "it was given back, and is fresh"


def test_nothing_is_left_where_nobody_closes():
    def dropped():
        made = Slots(2, SIZE)
        until(lambda: made.present == 2)
        return made.pool

    pool = dropped()
    gc.collect()
    until(lambda: not any(thread.name == "zinfer-touch" for thread in threading.enumerate()))
    assert pool.capacity == 2 * SIZE
    pool.close()


def test_a_view_outlives_the_slots():
    made = Slots(1, SIZE)
    taken = made.take()
    assert taken is not None
    tensor = torch.frombuffer(taken[0], dtype=torch.uint8)
    made.close()
    made.close()
    del taken
    tensor.fill_(3)
    assert int(tensor.sum()) == 3 * SIZE
