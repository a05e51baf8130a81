"""The places of resident weights: made present in the background, taken, and given back to the kernel."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zinfer.device import residents as module
from zinfer.device.residents import Residents
from zinfer.errors import ClosedError

SIZE = 8 << 20


def weights(count: int, size: int = SIZE) -> list[Any]:
    class Weight(SimpleNamespace):
        __hash__ = object.__hash__

    return [Weight(name=str(index), layout=SimpleNamespace(nbytes=size)) for index in range(count)]


def mapped(residents: Residents, place: int, size: int = SIZE) -> int:
    """Bytes of the place with this number that are in memory now."""
    pool = residents.pool
    assert pool is not None
    first, page = (pool.base_address + place * size) // 4096, 0
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        entries = file.read(8 * (size // 4096))
    for at in range(0, len(entries), 8):
        page += entries[at + 7] >> 7
    return page * 4096


def until_present(residents: Residents, weight: Any) -> None:
    deadline = time.monotonic() + 30
    while not residents.present(weight):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tensor_of(residents: Residents, weight: Any) -> torch.Tensor:
    view, _ = residents.take(weight)
    return torch.frombuffer(view, dtype=torch.uint8)


def test_all_places_are_present_at_once_when_asked_for(caplog):
    mine = weights(3)
    with caplog.at_level(logging.INFO, "zinfer"):
        residents = Residents(mine, mine, None, at_once=True)
    before, after = [record.getMessage() for record in caplog.records]
    assert before == "making 24.00 MiB of host memory present for weights"
    assert re.fullmatch(r"24.00 MiB of host memory are present after \d+\.\d s", after)
    assert all(residents.present(weight) for weight in mine)
    assert [mapped(residents, place) for place in range(3)] == [SIZE] * 3
    residents.close()


def test_places_become_present_by_themselves_and_in_order():
    mine = weights(4)
    residents = Residents(mine, mine, None, at_once=False)
    until_present(residents, mine[2])
    assert all(residents.present(weight) for weight in mine[:3])
    until_present(residents, mine[3])
    assert [mapped(residents, place) for place in range(4)] == [SIZE] * 4
    residents.close()


def test_in_a_hurry_more_threads_help_and_all_places_become_present(monkeypatch):
    helpers = set()

    def slow(address: int, nbytes: int) -> bool:
        helpers.add(threading.get_ident())
        time.sleep(0.002)
        return True

    monkeypatch.setattr(module, "populate", slow)
    mine = weights(20)
    residents = Residents(mine, mine, None, at_once=False)
    residents.hurry()
    residents.hurry()
    for weight in mine:
        until_present(residents, weight)
    assert len(helpers) > 1
    residents.close()
    residents.hurry()


def test_making_a_place_present_changes_none_of_its_bytes(monkeypatch):
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "populate", lambda *step: steps.append(step) or True)
    mine = weights(2)
    residents = Residents(mine, mine, None, at_once=False)
    until_present(residents, mine[1])
    tensor = tensor_of(residents, mine[1]).fill_(7)
    monkeypatch.undo()
    for address, nbytes in steps:
        assert module.populate(address, nbytes)
    assert int(tensor.min()) == 7
    residents.close()


def test_where_the_kernel_cannot_populate_places_are_used_as_they_are(monkeypatch):
    monkeypatch.setattr(module, "populate", lambda address, nbytes: False)
    mine = weights(2)
    residents = Residents(mine, mine, None, at_once=False)
    until_present(residents, mine[1])
    assert mapped(residents, 1) == 0
    residents.close()


def test_what_has_no_place_is_never_present():
    residents = Residents(*2 * [weights(1)], None, at_once=True)
    stranger = weights(1)[0]
    assert not residents.has(stranger)
    assert not residents.present(stranger)
    residents.close()


def test_no_weights_take_no_memory():
    residents = Residents([], [], None, at_once=False)
    assert residents.pool is None
    residents.close()


def test_a_released_place_goes_back_to_the_kernel_when_its_last_tensor_dies():
    first, second = mine = weights(2)
    residents = Residents(mine, mine, None, at_once=True)
    tensor, other = tensor_of(residents, first).fill_(1), tensor_of(residents, second).fill_(2)
    view = tensor[10:]
    residents.release(first)
    del tensor
    gc.collect()
    assert mapped(residents, 0) == SIZE
    assert int(view.min()) == 1
    del view
    gc.collect()
    assert mapped(residents, 0) == 0
    assert mapped(residents, 1) == SIZE
    assert int(other.min()) == 2
    residents.close()


def test_small_places_side_by_side_go_back_with_the_pages_they_share():
    mine = weights(6, size=1 << 20)
    residents = Residents(mine, mine, None, at_once=True)
    pool = residents.pool
    for weight in mine[:4]:
        residents.release(weight)
    assert sum(mapped(residents, place, 1 << 20) for place in range(6)) == 2 << 20
    assert pool is not None
    residents.close()


def test_the_place_of_a_weight_that_is_not_wanted_yet_stays_absent():
    mine = weights(3)
    residents = Residents(mine, mine[1:2], None, at_once=False)
    for weight in mine:
        until_present(residents, weight)
    assert [mapped(residents, place) for place in range(3)] == [0, SIZE, 0]
    tensor = tensor_of(residents, mine[0]).fill_(1)
    assert int(tensor.min()) == 1
    residents.close()


def test_a_place_is_not_ready_while_a_tensor_is_on_it():
    mine = weights(1)
    residents = Residents(mine, mine, None, at_once=True)
    assert residents.ready(mine[0])
    tensor = tensor_of(residents, mine[0])
    assert residents.present(mine[0])
    assert not residents.ready(mine[0])
    del tensor
    gc.collect()
    assert residents.ready(mine[0])
    residents.close()


def test_a_place_that_nothing_is_on_goes_back_at_once():
    mine = weights(1)
    residents = Residents(mine, mine, None, at_once=True)
    residents.release(mine[0])
    assert mapped(residents, 0) == 0
    residents.close()


def test_a_place_that_was_released_and_taken_again_stays():
    mine = weights(1)
    residents = Residents(mine, mine, None, at_once=True)
    old = tensor_of(residents, mine[0])
    residents.release(mine[0])
    again = tensor_of(residents, mine[0]).fill_(3)
    del old
    gc.collect()
    assert int(again.min()) == 3
    residents.release(mine[0])
    del again
    gc.collect()
    assert mapped(residents, 0) == 0
    residents.close()


def test_a_tensor_outlives_the_end_of_the_memory_it_lies_in():
    mine = weights(1)
    residents = Residents(mine, mine, None, at_once=True)
    tensor = tensor_of(residents, mine[0]).fill_(5)
    residents.close()
    residents.close()
    assert int(tensor.min()) == 5
    with pytest.raises(ClosedError):
        residents.take(mine[0])
    pool = residents.pool
    assert pool is not None
    del tensor
    gc.collect()
    assert pool.base_address == 0


def test_closing_does_not_wait_for_all_places_to_become_present(monkeypatch):
    steps = []

    def slow(address: int, nbytes: int) -> bool:
        steps.append(nbytes)
        time.sleep(0.02)
        return True

    monkeypatch.setattr(module, "populate", slow)
    residents = Residents(*2 * [weights(100)], None, at_once=False)
    residents.close()
    assert len(steps) < 20
