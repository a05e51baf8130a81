"""What is told of weights that found no memory to stay in."""

from __future__ import annotations

import logging
from typing import Any

from tests.coordinator.fakes import FakeWeight
from zinfer.device.refusals import Refusals


def weight(name: str) -> Any:
    return FakeWeight(name, 1)


def test_the_note_counts_those_that_stream_and_tells_of_those_that_came_back(caplog):
    refusals, first, second = Refusals("gpu"), weight("a"), weight("b")
    assert refusals.notes == []
    assert (refusals.add(first, 10), refusals.add(second, 5), refusals.add(second, 5)) == (10, 15, 20)
    assert refusals.notes == ["gpu was short of memory: 2 weights had to stream instead of staying there"]
    refusals.came_back(second)
    assert refusals.notes == [
        "gpu was short of memory: 'a' had to stream instead of staying there; 1 more can stay there again"
    ]
    refusals.came_back(first)
    assert refusals.notes == [
        "gpu was short of memory for a time: 2 weights had to stream, and can stay there again"
    ]
    refusals.add(first, 1)
    assert refusals.notes[0].startswith("gpu was short of memory: 'a' had to stream")


def test_a_shortage_is_logged_once_and_again_after_it_was_over(caplog):
    refusals, weights = Refusals("gpu"), [weight(str(number)) for number in range(4)]
    with caplog.at_level(logging.WARNING, "zinfer"):
        for one in weights:
            refusals.add(one, 1)
        assert len(caplog.records) == 1
        for one in weights:
            refusals.came_back(one)
        refusals.add(weights[0], 1)
    assert len(caplog.records) == 2


def test_a_weight_that_was_never_refused_is_not_told():
    refusals = Refusals("gpu")
    refusals.came_back(weight("a"))
    assert refusals.notes == []
