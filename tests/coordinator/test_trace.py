"""The trace learns what follows what, and knows no position and no end."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.coordinator.trace import Trace


def run(trace: Trace[str], items: str, before: str | None = None, last: str | None = None) -> None:
    """Observe `items`, one after the other."""
    for item in items:
        trace.observe(before, last, item)
        before, last = last, item


def follow(trace: Trace[str], before: str | None, last: str, count: int) -> str:
    """The next `count` items that `trace` expects."""
    out = ""
    for _ in range(count):
        following = trace.successor(before, last)
        if following is None:
            break
        before, last = last, following
        out += following
    return out


def test_before_anything_was_seen_the_guess_is_a_cycle():
    trace = Trace("abc")
    assert follow(trace, None, "a", 5) == "bcabc"
    assert not trace.saw(None, "a")


def test_without_a_guess_nothing_is_expected():
    assert Trace("").successor(None, "a") is None


def test_a_single_item_follows_itself():
    assert Trace("a").successor(None, "a") == "a"


def test_what_was_observed_replaces_the_guess():
    trace = Trace("abc")
    run(trace, "acbacb")
    assert follow(trace, "a", "c", 4) == "bacb"
    assert trace.saw("a", "c")


def test_the_last_of_a_sweep_is_followed_by_the_first_of_the_next():
    trace = Trace("")
    run(trace, "abcdabcd")
    assert follow(trace, "c", "d", 6) == "abcdab"


def test_a_shared_item_goes_on_by_what_came_before_it():
    trace = Trace("")
    run(trace, "asbtcsdt" * 2)
    assert trace.successor("a", "s") == "b"
    assert trace.successor("c", "s") == "d"
    assert follow(trace, "d", "t", 8) == "asbtcsdt"


def test_an_unknown_pair_falls_back_to_the_item_alone():
    trace = Trace("")
    run(trace, "abcab")
    assert trace.successor("x", "b") == "c"
    assert not trace.saw("x", "b")


def test_an_item_that_was_skipped_is_back_once_it_is_used_again():
    trace = Trace("abcd")
    run(trace, "abcdabdabcd")
    assert follow(trace, "c", "d", 4) == "abcd"


def test_the_latest_observation_wins():
    trace = Trace("")
    run(trace, "abcaabdab")
    assert trace.successor("a", "b") == "d"


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=3, max_size=12).map("".join))
def test_a_repeated_sweep_is_predicted_where_pairs_tell_its_places_apart(sweep):
    cycle = sweep + sweep[:2]
    pairs = list(pairwise(cycle))[: len(sweep)]
    if len(set(pairs)) < len(pairs):
        return
    trace = Trace("")
    run(trace, sweep * 3)
    assert follow(trace, sweep[-2], sweep[-1], 2 * len(sweep)) == sweep * 2
