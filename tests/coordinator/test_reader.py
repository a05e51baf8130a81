"""One reader's place in the sweep: what it reads ahead, drops, skips and finds again."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from tests.coordinator.fakes import SIZE, FakeFetch, FakeWeight
from zinfer.coordinator.reader import Reader
from zinfer.coordinator.trace import Trace


class Sweep:
    """A reader over weights named by letters, whose starts are written down."""

    def __init__(self, guess: str, *, limit: int = 3 * SIZE) -> None:
        self.weights = {name: FakeWeight(name) for name in "abcdefghsxy"}
        trace: Trace[Any] = Trace([self.weights[name] for name in guess])
        self.reader = Reader(trace)
        self.limit = limit
        self.first_bytes = 1_000 * SIZE
        self.room = 1_000
        self.started = ""
        self.live: list[weakref.ref[FakeFetch]] = []

    def start(self, weight: Any) -> Any:
        """A new read, unless one lives already; none once `room` is used up."""
        if weight.fetch is not None and (fetch := weight.fetch()) is not None:
            return fetch
        if self.room <= 0:
            return None
        self.room -= 1
        self.started += weight.name
        fetch = FakeFetch(weight)
        weight.fetch = weakref.ref(fetch)
        self.live.append(weight.fetch)
        return fetch

    def use(self, names: str) -> str:
        """Use the weights in order; `+` for a use read ahead, `-` for a miss."""
        outcome = ""
        for name in names:
            weight: Any = self.weights[name]
            fetch = self.reader.advance(weight)
            outcome += "-" if fetch is None else "+"
            self.reader.held = fetch
            self.reader.extend(self.start, self.limit, 20, self.first_bytes)
        return outcome

    def ahead(self) -> str:
        return "".join(fetch.weight.name for fetch in self.reader.queue)

    def alive(self) -> set[str]:
        return {fetch.weight.name for ref in self.live if (fetch := ref()) is not None}


def test_nothing_is_read_ahead_of_the_first_use():
    sweep = Sweep("abcd")
    sweep.reader.extend(sweep.start, 100 * SIZE, 10, 100 * SIZE)
    assert sweep.started == ""


def test_the_first_use_misses_and_the_guess_is_read_ahead_of_the_next():
    sweep = Sweep("abcde")
    assert sweep.use("a") == "-"
    assert sweep.ahead() == "bcd"
    assert sweep.use("bcd") == "+++"


def test_reading_ahead_wraps_around_from_the_last_to_the_first():
    sweep = Sweep("abcde")
    sweep.use("abcd")
    assert sweep.ahead() == "eab"
    assert sweep.use("eabcdeab") == "++++++++"


def test_the_first_sweep_reads_little_for_the_second():
    sweep = Sweep("abcde")
    sweep.first_bytes = 2 * SIZE - 1
    sweep.use("abcd")
    assert sweep.ahead() == "ea"
    sweep.use("e")
    assert sweep.ahead() == "a"
    sweep.use("a")
    assert sweep.ahead() == "bcd"
    assert sweep.use("bcdeab") == "++++++"


def test_what_is_used_several_times_in_the_first_sweep_ends_the_thrift():
    sweep = Sweep("abcde")
    sweep.first_bytes = 0
    sweep.use("aab")
    assert sweep.ahead() == "cde"
    sweep.use("abcd")
    assert sweep.ahead() == "eab"


def test_reading_ahead_stops_at_the_limit_in_bytes():
    sweep = Sweep("abcde", limit=2 * SIZE)
    sweep.use("a")
    assert sweep.ahead() == "bc"


def test_one_more_is_read_ahead_while_less_than_the_limit_is():
    sweep = Sweep("abcde", limit=2 * SIZE + 1)
    sweep.use("a")
    assert sweep.ahead() == "bcd"


def test_reading_ahead_stops_at_the_limit_in_number():
    sweep = Sweep("ab", limit=100 * SIZE)
    sweep.reader.advance(sweep.weights["a"])
    sweep.reader.extend(sweep.start, sweep.limit, 2, sweep.limit)
    assert sweep.ahead() == "ba"


def test_reading_ahead_stops_where_there_is_no_room_and_goes_on_when_there_is():
    sweep = Sweep("abcde")
    sweep.room = 1
    sweep.use("a")
    assert sweep.ahead() == "b"
    sweep.room = 1_000
    sweep.use("b")
    assert sweep.ahead() == "cde"


def test_residents_are_passed_over():
    sweep = Sweep("abcde")
    sweep.weights["b"].resident = sweep.weights["d"].resident = object()  # type: ignore[assignment]
    sweep.use("a")
    assert sweep.ahead() == "cea"


def test_when_all_is_resident_reading_ahead_ends():
    sweep = Sweep("abc")
    for weight in sweep.weights.values():
        weight.resident = object()  # type: ignore[assignment]
    sweep.use("a")
    assert sweep.started == ""


def test_a_skipped_operator_drops_its_read_and_the_rest_is_kept():
    sweep = Sweep("abcdef")
    assert sweep.use("ac") == "-+"
    assert sweep.ahead() == "def"
    assert sweep.alive() == set("cdef")
    assert sweep.started.count("d") == 1


def test_an_inserted_operator_misses_alone_and_what_was_ahead_is_used():
    sweep = Sweep("abcdef")
    assert sweep.use("abxcd") == "-+-++"
    assert sweep.started.count("c") == 1


def test_an_inserted_operator_is_expected_the_next_time():
    sweep = Sweep("abcd")
    sweep.use("abxcd")
    assert sweep.use("abxcdabxcd") == "++++++++++"


def test_a_skipped_operator_is_forgotten_the_next_time_and_learned_again_when_it_returns():
    sweep = Sweep("abcd")
    assert sweep.use("abcd" + "abd" + "abd") == "-+++" + "+++" + "+++"
    assert sweep.use("abcd") == "++-+"
    assert sweep.use("abcd") == "++++"


def test_two_unknown_operators_mean_another_path_and_the_reads_ahead_are_given_up():
    sweep = Sweep("abcdefgh")
    assert sweep.use("axy") == "---"
    assert sweep.alive() == set()
    assert sweep.use("e") == "-"
    assert sweep.ahead() == "fgh"


def test_leaving_a_known_path_for_an_unknown_operator_gives_up_what_was_ahead_at_once():
    sweep = Sweep("abcdef", limit=4 * SIZE)
    sweep.use("abcdefabcdef")
    assert sweep.ahead() == "abcd"
    assert sweep.use("x") == "-"
    assert sweep.ahead() == ""
    assert sweep.alive() == set()
    sweep.use("abc")
    assert sweep.ahead() == "defx"


def test_leaving_a_known_path_takes_over_the_reads_that_the_new_one_needs_too():
    sweep = Sweep("abcdef", limit=5 * SIZE)
    sweep.use("xabcdef" + "abcdef" * 2)
    assert sweep.ahead() == "abcde"
    begun = len(sweep.started)
    assert sweep.use("x") == "-"
    assert sweep.ahead() == "abcde"
    assert len(sweep.started) == begun


def test_a_shared_weight_is_used_several_times_a_sweep_from_one_read_where_they_overlap():
    sweep = Sweep("asbscs")
    sweep.use("asbscs" * 2)
    assert sweep.use("asbscs" * 2) == "+" * 12
    assert sweep.ahead() == "asb"


def test_a_shared_weight_ahead_twice_is_one_read():
    sweep = Sweep("", limit=4 * SIZE)
    sweep.use("asbscs" * 3)
    assert sweep.ahead() == "asbs"
    assert sweep.reader.queue[1] is sweep.reader.queue[3]


def test_a_weight_used_twice_running_is_followed_by_itself():
    sweep = Sweep("")
    sweep.use("abbc" * 2)
    assert sweep.use("abbc" * 2) == "++++" * 2


def test_the_farthest_read_is_dropped_first():
    sweep = Sweep("abcdef")
    sweep.use("a")
    assert sweep.reader.drop_farthest()
    assert sweep.ahead() == "bc"
    assert sweep.alive() == {"b", "c"}


def test_what_takes_no_window_is_only_dropped_with_what_lies_before_it():
    sweep = Sweep("abcdef")
    sweep.use("a")
    for fetch in sweep.reader.queue:
        fetch.in_place = fetch.weight.name != "c"
    assert sweep.reader.drop_farthest()
    assert sweep.ahead() == "b"


def test_there_may_be_nothing_to_drop():
    sweep = Sweep("abcdef")
    assert not sweep.reader.drop_farthest()
    sweep.use("a")
    for fetch in sweep.reader.queue:
        fetch.in_place = True
    assert not sweep.reader.drop_farthest()
    assert sweep.ahead() == "bcd"


def test_another_use_at_once_is_expected_until_the_trace_knows_better():
    sweep = Sweep("abc")
    a: Any = sweep.weights["a"]
    sweep.use("abca")
    assert sweep.reader.expects(a)  # "ca" was never followed by anything yet
    sweep.use("bca")
    assert not sweep.reader.expects(a)


def test_a_use_twice_running_that_was_seen_is_expected_again():
    sweep = Sweep("abc")
    a: Any = sweep.weights["a"]
    sweep.use("aabc" * 2 + "a")
    assert sweep.reader.expects(a)
    sweep.use("a")
    assert not sweep.reader.expects(a)


def test_forgetting_drops_every_read_and_keeps_the_place():
    sweep = Sweep("abcdef")
    sweep.use("ab")
    sweep.reader.forget()
    assert sweep.alive() == set()
    assert sweep.use("c") == "-"
    assert sweep.ahead() == "def"


@pytest.mark.parametrize("limit", [1, SIZE, 4 * SIZE, 100 * SIZE])
def test_a_steady_sweep_reads_each_weight_once_a_use_and_never_misses(limit):
    sweep = Sweep("abcdef", limit=limit)
    sweep.use("abcdef")
    begun = len(sweep.started)
    assert sweep.use("abcdef" * 4) == "+" * 24
    if limit <= 4 * SIZE:
        assert len(sweep.started) - begun == 24
