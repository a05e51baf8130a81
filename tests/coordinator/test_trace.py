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


def test_what_is_put_back_is_expected_where_it_was_first_met():
    trace = Trace("")
    run(trace, "abcdef" * 2)
    run(trace, "adf" * 3, "e", "f")
    assert follow(trace, "d", "f", 6) == "adfadf"
    passed = set("bce")
    for item in "ceb":  # in whatever order
        passed.discard(item)
        trace.put_back(item, passed.__contains__)
    assert follow(trace, "d", "f", 12) == "abcdefabcdef"
    assert trace.saw("f", "a") and trace.saw("a", "b")


def test_what_is_expected_still_or_was_never_known_changes_nothing():
    trace = Trace("abcd")
    trace.put_back("c", {"b"}.__contains__)
    trace.put_back("x", {"b"}.__contains__)
    trace.put_back("b", set("abcd").__contains__)  # nothing is asked for that it could follow
    assert follow(trace, None, "a", 5) == "bcdab"


@given(st.permutations("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_that_leave_in_any_order_are_expected_again(order, away):
    trace = Trace("")
    items = "abcdefgh"
    run(trace, items * 2)
    rest = "".join(item for item in items if item not in away)
    run(trace, rest * 3, "g", "h")
    passed = set(away)
    for item in (item for item in order if item in away):
        passed.discard(item)
        trace.put_back(item, passed.__contains__)
    at = items.index(rest[-1])
    before = rest[-2] if len(rest) > 1 else rest[-1]
    assert follow(trace, before, rest[-1], 8) == (items[at + 1 :] + items)[:8]
