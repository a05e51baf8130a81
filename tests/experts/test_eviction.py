"""Which experts go first: those whose next use is expected last; and whether guesses are trusted."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from zinfer.experts.eviction import Uses
from zinfer.experts.lookahead import ENOUGH, Trust

ALL = np.arange(8)


def test_experts_that_were_never_picked_go_first():
    uses = Uses([4, 4])
    uses.visited(0, [1, 2])
    uses.visited(1, [4, 7])
    assert set(uses.latest(ALL, 1)[:4]) == {0, 3, 5, 6}


def test_the_one_that_is_picked_less_often_goes_first():
    uses = Uses([4])
    for picked in ([0, 1], [0, 1], [0, 2], [0, 1], [0, 3]):
        uses.visited(0, picked)
    assert uses.latest(np.array([0, 1]), 0) == [1, 0]


def test_of_equals_the_layer_that_has_just_run_goes_first_and_the_next_one_last():
    uses = Uses([2, 2, 2, 2])
    for layer in range(4):
        uses.visited(layer, [2 * layer, 2 * layer + 1])
    order = [number // 2 for number in uses.latest(ALL, 1)]
    assert order == [1, 1, 0, 0, 3, 3, 2, 2]


def test_the_expected_next_use_is_that_of_a_geometric_distribution():
    """An expert that each visit picks with probability q is picked 1 / q visits from now on average."""
    uses = Uses([4], inf)
    for visit in range(100):
        uses.visited(0, [0] if visit % 4 else [0, 1])
    assert uses.next_use(np.array([0, 1]), 0) == pytest.approx([1.0, 4.0])


def test_what_was_long_ago_counts_less():
    uses = Uses([4], 4.0)
    for _ in range(50):
        uses.visited(0, [0])
    for _ in range(20):
        uses.visited(0, [1])
    assert uses.latest(np.array([0, 1]), 0) == [0, 1]
    assert Uses([4], 0.0).latest(np.array([], dtype=np.intp), 0) == []


def test_guesses_are_trusted_once_enough_were_right_and_no_longer_when_they_are_wrong():
    trust = Trust()
    assert trust.share is None and not trust.pays
    trust.note(int(ENOUGH) - 1, int(ENOUGH) - 1)
    assert not trust.pays, "too few were seen"
    trust.note(8, 8)
    assert trust.pays and trust.share == pytest.approx(1.0)
    for _ in range(100):
        trust.note(1, 8)
    assert not trust.pays and trust.share == pytest.approx(0.125, abs=0.15)
    for _ in range(200):
        trust.note(7, 8)
    assert trust.pays
