"""Demand before look-ahead, a window shared fairly, and nothing left over after a failure or the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.coordinator.fakes import SIZE, FakeDevice, FakeWeight
from zinfer.coordinator import coordinator as module
from zinfer.coordinator.coordinator import Coordinator
from zinfer.errors import BudgetError, ClosedError, DriveError


class Scene:
    """A coordinator over weights named by letters; its guess at the order knows nothing of x and z."""

    def __init__(
        self, names: str, window: int | None, residents: str = "", sizes: dict[str, int] | None = None
    ) -> None:
        sizes = sizes or {}
        self.weights = {
            name: FakeWeight(name, sizes.get(name, SIZE), wants_residence=name in residents) for name in names
        }
        self.device = FakeDevice(window)
        self.settled: list[str] = []
        order: Any = [weight for name, weight in self.weights.items() if name not in "xz"]
        device: Any = self.device
        self.coordinator = Coordinator(device, order, lambda weight, tensor: self.settled.append(weight.name))

    def use(self, names: str) -> torch.Tensor:
        """Use weights in order, keeping no tensor but the last."""
        for name in names:
            weight: Any = self.weights[name]
            tensor = self.coordinator.whole(weight)
        return tensor


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Run a function to its end on another thread, always the same one."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result(10)


def test_a_demand_is_started_before_any_look_ahead():
    scene = Scene("abcd", window=3 * SIZE)
    scene.use("a")
    assert scene.device.started == [("a", True), ("b", False), ("c", False)]


def test_what_was_read_ahead_is_not_read_again():
    scene = Scene("abcd", window=3 * SIZE)
    scene.use("abcd")
    assert scene.device.names(urgent=True) == "a"
    assert scene.device.names() == "abcda"  # of the second sweep as little as can be
    assert (scene.coordinator.counters.misses, scene.coordinator.counters.hits) == (1, 3)


def test_what_lies_ahead_is_told_in_bytes():
    scene = Scene("abcdefgh", window=4 * SIZE)
    assert scene.coordinator.read_ahead_bytes == 0
    scene.use("a")
    assert scene.device.names(urgent=False) == "bcd"
    assert scene.coordinator.read_ahead_bytes == 3 * SIZE
    scene.use("b")
    assert scene.coordinator.read_ahead_bytes == 3 * SIZE
    scene.coordinator.drop_ahead()
    assert scene.coordinator.read_ahead_bytes == 0


def test_look_ahead_goes_on_across_the_end_of_a_sweep():
    scene = Scene("abcd", window=3 * SIZE)
    scene.use("abcd" * 3)
    assert scene.device.names() == "abcd" * 3 + "ab"
    assert scene.coordinator.counters.misses == 1


def test_the_window_never_overflows():
    scene = Scene("abcdef", window=3 * SIZE)
    window = scene.device.window
    assert window is not None
    scene.device.on_start = lambda name: pytest.fail("overflow") if window.in_use > window.capacity else None
    scene.use("abcdef" + "acef" + "fbdace" * 2)
    assert window.in_use <= window.capacity


def test_the_end_of_an_operator_gives_its_room_to_the_next_read_before_the_next_operator_asks():
    scene = Scene("abcd", window=3 * SIZE)
    scene.use("abcdabcda")
    assert scene.device.names() == "abcdabcdabc"
    a: Any = scene.weights["a"]
    scene.coordinator.done(a)
    assert scene.device.names() == "abcdabcdabcd"


def test_a_weight_that_is_used_again_at_once_is_kept_at_the_end_of_its_operator():
    scene = Scene("abcd", window=3 * SIZE)
    scene.use("aabcd" * 2 + "a")
    a: Any = scene.weights["a"]
    reads = scene.device.names().count("a")
    scene.coordinator.done(a)
    scene.use("a")
    assert scene.device.names().count("a") == reads
    scene.coordinator.done(a)
    assert scene.coordinator._reader().held is None


def test_the_end_of_an_operator_that_has_nothing_in_the_window_changes_nothing():
    scene = Scene("abcd", window=3 * SIZE)
    b: Any = scene.weights["b"]
    scene.coordinator.done(b)
    scene.use("a")
    scene.coordinator.done(b)
    assert scene.device.names() == "abc"
    scene.coordinator.close()
    scene.coordinator.done(b)


def test_a_resident_whose_place_is_not_present_yet_is_read_through_the_window_and_settles_later():
    scene = Scene("abcd", window=3 * SIZE, residents="c")
    scene.device.absent = {"c"}
    scene.use("abcd")
    assert scene.settled == []
    scene.device.absent = set()
    scene.use("abcd")
    assert scene.settled == ["c"]
    begun = len(scene.device.started)
    scene.use("abcd")
    assert "c" not in [name for name, _ in scene.device.started[begun:]]


def test_a_use_twice_running_is_one_read_and_one_tensor():
    scene = Scene("abc", window=3 * SIZE)
    assert scene.use("a") is scene.use("a")
    assert scene.device.names(urgent=True) == "a"


def test_a_skipped_operator_costs_its_own_read_and_no_other():
    scene = Scene("abcdef", window=4 * SIZE)
    scene.use("abcdef" * 2)
    misses, begun = scene.coordinator.counters.misses, len(scene.device.started)
    scene.use("abdef")
    assert scene.coordinator.counters.misses == misses
    assert len(scene.device.started) - begun <= 6


def test_an_inserted_operator_misses_once_and_the_sweep_is_joined_again():
    scene = Scene("abcdefx", window=4 * SIZE)
    scene.use("abcdef" * 3)
    misses = scene.coordinator.counters.misses
    scene.use("abxcdef")
    assert scene.coordinator.counters.misses <= misses + 2
    misses = scene.coordinator.counters.misses
    scene.use("abxcdef" * 2)
    assert scene.coordinator.counters.misses == misses


def test_a_weight_that_is_used_several_times_a_sweep_hits_every_time():
    scene = Scene("asbc", window=3 * SIZE)
    scene.use("asbscs" * 3)
    misses = scene.coordinator.counters.misses
    scene.use("asbscs" * 3)
    assert scene.coordinator.counters.misses == misses


def test_an_unforeseen_demand_takes_the_room_of_what_is_needed_last():
    scene = Scene("abcdez", window=5 * SIZE, sizes={"z": 3 * SIZE})
    scene.use("ab")
    assert sorted(scene.device.alive()) == ["a", "b", "c", "d", "e"]
    scene.use("z")
    assert scene.device.alive() == ["c", "d", "z"]
    assert ("z", True) in scene.device.started


def test_a_demand_may_take_the_whole_window():
    scene = Scene("abcz", window=3 * SIZE, sizes={"z": 3 * SIZE})
    scene.use("abcz" * 3)
    assert scene.device.names(urgent=True).count("z") <= 3
    assert scene.device.alive() == ["z"]


def test_a_window_full_of_tensors_in_use_is_an_error_after_the_deadline():
    scene = Scene("ab", window=SIZE)
    weight: Any = scene.weights["a"]
    scene.use("a")
    assert weight.fetch is not None
    in_use = weight.fetch()  # as an operator's operand would
    with pytest.raises(BudgetError, match=rf"'b' needs {SIZE} bytes.*still in use"):
        scene.use("b")
    del in_use
    scene.use("b")


# -- residents ------------------------------------------------------------------------------------------


def test_a_resident_is_read_once_and_settled_once():
    scene = Scene("abc", window=2 * SIZE, residents="b")
    scene.use("abc" * 3)
    assert scene.settled == ["b"]
    assert scene.device.names().count("b") == 1
    assert scene.weights["b"].resident is scene.use("b")


def test_residents_are_read_ahead_only_until_they_are_there():
    scene = Scene("abcd", window=2 * SIZE, residents="bd")
    scene.use("abcd")
    begun = len(scene.device.started)
    scene.use("acac")
    assert set(scene.device.names()[begun:]) <= {"a", "c"}


def test_loading_makes_every_weight_resident_and_tells_the_progress():
    scene = Scene("abcd", window=None, residents="abcd")
    seen: list[int] = []
    weights: Any = list(scene.weights.values())
    scene.coordinator.load(weights, seen.append)
    assert seen == [SIZE] * 4
    assert scene.settled == list("abcd")
    assert scene.device.names() == "abcd"
    assert scene.device.names(urgent=True) == "a"


def test_rows_are_read_now_and_counted():
    scene = Scene("ab", window=2 * SIZE)
    weight: Any = scene.weights["a"]
    assert scene.coordinator.rows(weight, [1, 5]).shape == (2, 4)
    assert scene.device.rows == [("a", [1, 5])]
    assert (scene.coordinator.counters.row_reads, scene.coordinator.counters.row_bytes) == (1, 32)
    assert scene.device.started == []


# -- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"], ids=["on demand", "read ahead"])
def test_a_failed_read_is_raised_by_its_own_use_and_read_anew_by_the_next(name):
    scene = Scene("abcd", window=3 * SIZE)
    scene.device.fail = {name}
    scene.use("abcd"[: "abcd".index(name)] or "d")
    with pytest.raises(DriveError) as info:
        scene.use(name)
    scene.device.fail = set()
    begun = len(scene.device.started)
    assert scene.use(name) is not None
    assert name in scene.device.names()[begun:]
    assert info.value.path == name  # alive, with the traceback that holds the failed read


def test_a_read_that_keeps_failing_is_tried_at_each_use():
    scene = Scene("abcd", window=3 * SIZE)
    scene.device.fail = {"b"}
    scene.use("a")
    for _ in range(3):
        with pytest.raises(DriveError):
            scene.use("b")
    assert scene.device.names().count("b") >= 3


def test_a_failure_is_not_raised_by_another_weights_use():
    scene = Scene("abcd", window=4 * SIZE)
    scene.device.fail = {"c"}
    scene.use("ab")
    scene.use("d")
    assert scene.coordinator.counters.hits >= 1


def test_after_a_failure_no_room_is_lost():
    scene = Scene("abcd", window=2 * SIZE)
    scene.device.fail = {"b"}
    for _ in range(5):
        scene.use("a")
        with pytest.raises(DriveError):
            scene.use("b")
        scene.use("cd")
    scene.device.fail = set()
    scene.use("abcd" * 2)
    window = scene.device.window
    assert window is not None
    scene.coordinator.close()
    assert (scene.device.alive(), window.in_use) == ([], 0)


# -- threads --------------------------------------------------------------------------------------------


def test_readers_at_the_same_place_share_a_read(in_thread):
    scene = Scene("abcd", window=4 * SIZE)
    mine = scene.use("a")
    begun = len(scene.device.started)
    assert in_thread(lambda: scene.use("a")) is mine
    assert len(scene.device.started) == begun


def test_readers_at_different_places_have_queues_of_their_own(in_thread):
    scene = Scene("abcdef", window=6 * SIZE)
    scene.use("abcdef" * 2)
    in_thread(lambda: scene.use("abc"))
    misses = scene.coordinator.counters.misses
    scene.use("abc")
    in_thread(lambda: scene.use("de"))
    scene.use("de")
    assert scene.coordinator.counters.misses == misses


def test_the_window_is_shared_between_active_readers(in_thread):
    scene = Scene("abcdefgh", window=4 * SIZE)
    scene.use("a")
    assert scene.device.alive() == ["a", "b", "c", "d"]
    scene.coordinator._reader().forget()
    in_thread(lambda: scene.use("e"))
    assert [name for name in scene.device.alive() if name in "efgh"] == ["e", "f", "g"]


def test_an_idle_reader_no_longer_shares_the_window(monkeypatch, in_thread):
    monkeypatch.setattr(module, "IDLE_READER", 0.0)
    scene = Scene("abcdefgh", window=4 * SIZE)
    scene.use("a")
    scene.coordinator._reader().forget()
    in_thread(lambda: scene.use("e"))
    assert scene.device.alive() == ["e", "f", "g", "h"]


def test_a_demand_takes_room_from_another_readers_look_ahead(in_thread):
    scene = Scene("abcdz", window=4 * SIZE)
    scene.use("a")
    in_thread(lambda: scene.use("z"))
    assert ("z", True) in scene.device.started
    assert "b" in scene.device.alive()


def test_the_reads_of_a_thread_that_ended_are_given_back():
    scene = Scene("abcd", window=4 * SIZE)
    thread = threading.Thread(target=scene.use, args=("a",))
    thread.start()
    thread.join()
    del thread
    assert scene.device.alive() == []


def test_no_thread_waits_for_bytes_under_the_lock(in_thread):
    scene = Scene("abcd", window=4 * SIZE)
    scene.device.hold_back = {"b"}
    scene.use("a")
    weight: Any = scene.weights["b"]
    assert weight.fetch is not None
    fetch = weight.fetch()
    assert fetch is not None
    waiting = threading.Thread(target=scene.use, args=("b",))
    waiting.start()
    in_thread(lambda: scene.use("c"))
    fetch.release()
    waiting.join(10)
    assert not waiting.is_alive()


def test_waiting_is_counted_by_weight():
    scene = Scene("ab", window=2 * SIZE)
    scene.device.hold_back = {"a"}
    release = threading.Timer(0.05, lambda: [ref.release() for ref in [scene.weights["a"].fetch()] if ref])  # type: ignore[misc]
    release.start()
    scene.use("a")
    release.join()
    assert scene.coordinator.counters.waits_by_weight["a"] >= 0.02
    assert scene.coordinator.counters.wait_seconds == sum(scene.coordinator.counters.waits_by_weight.values())


# -- rows ------------------------------------------------------------------------------------------------


def test_a_weight_of_which_rows_are_asked_for_comes_to_stay_where_it_is_to():
    scene = Scene("abz", window=2 * SIZE, residents="z")
    weight: Any = scene.weights["z"]
    tensor = scene.coordinator.settled(weight)
    assert tensor is not None and scene.settled == ["z"] and weight.resident is tensor
    assert scene.coordinator.settled(weight) is tensor
    assert scene.device.names() == "z"


def test_rows_go_on_being_asked_for_where_it_is_not_to_stay_or_has_no_place_yet():
    scene = Scene("abz", window=2 * SIZE, residents="z")
    streamed: Any = scene.weights["a"]
    assert scene.coordinator.settled(streamed) is None
    scene.device.absent = {"z"}
    absent: Any = scene.weights["z"]
    assert scene.coordinator.settled(absent) is None
    assert scene.device.started == []


def test_the_trace_learns_nothing_of_weights_that_come_to_stay_by_their_rows():
    scene = Scene("abcz", window=4 * SIZE, residents="z")
    weight: Any = scene.weights["z"]
    for name in "aabc":
        scene.use(name)
        scene.coordinator.settled(weight)
    scene.coordinator.change_residents([weight], [], lambda _: None)
    started = len(scene.device.started)
    scene.use("abcabc")
    assert "z" not in {name for name, _ in scene.device.started[started:]}


def test_rows_are_enough_where_there_is_no_room_for_all_of_it(monkeypatch):
    scene = Scene("az", window=SIZE, residents="z", sizes={"z": 3 * SIZE})
    weight: Any = scene.weights["z"]
    weight.placed = None  # a conversion: it passes through the window
    monkeypatch.setattr(scene.device, "patience", 0.05)
    assert scene.coordinator.settled(weight) is None
    assert scene.coordinator.rows(weight, [0]).shape == (1, 4)


# -- the end --------------------------------------------------------------------------------------------


def test_closing_drops_every_read_of_every_thread_and_closes_the_device(in_thread):
    scene = Scene("abcd", window=4 * SIZE)
    scene.use("a")
    in_thread(lambda: scene.use("c"))
    scene.coordinator.close()
    assert scene.device.alive() == []
    assert scene.device.closed
    assert scene.coordinator.closed


def test_use_after_closing_is_refused():
    scene = Scene("ab", window=2 * SIZE)
    scene.use("a")
    scene.coordinator.close()
    weight: Any = scene.weights["a"]
    for use in (
        lambda: scene.coordinator.whole(weight),
        lambda: scene.coordinator.settled(weight),
        lambda: scene.coordinator.rows(weight, [0]),
    ):
        with pytest.raises(ClosedError, match=r"zinfer\.run again"):
            use()
