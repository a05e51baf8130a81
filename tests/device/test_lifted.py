"""A weight on its way to a device: what waits for what, and what is held how long."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import architectures
from tests.device.test_arena import Gate
from tests.streaming.test_attached import MEMORY, run_within
from tests.streaming.test_exactness import IDS
from zinfer.device import host, moved, residents, rows
from zinfer.device.arena import Arena
from zinfer.device.assembly import at_slab_edges
from zinfer.device.lifted import LiftedFetch
from zinfer.device.page_locks import PageLocks
from zinfer.device.staged import StagedProcessor
from zinfer.kv_offload import space
from zinfer.pinned import Pool


@pytest.fixture
def folder(saved) -> str:
    return str(saved("llama"))


@pytest.fixture
def total(folder) -> int:
    return architectures.parameter_bytes(architectures.ALL["llama"][0].from_pretrained(folder))


def streamed(model: Any) -> Any:
    """A weight of the third layer that passes through the window."""
    weights = model.zinfer._streaming.weights
    return next(w for w in weights if ".1." in w.name and not w.wants_residence and not w.rows_only)


def start(model: Any, weight: Any) -> Any:
    device = model.zinfer._streaming.coordinator.device
    fetch = device.start(weight, urgent=True)
    assert fetch is not None and device.lift(fetch)
    return fetch


def test_copies_go_on_while_the_main_thread_is_blocked_in_python(folder, total, nothing_left):
    done = []

    def delay(kind: str) -> float:
        done.append(kind)
        return 0.0

    processor = StagedProcessor(MEMORY, delay=delay)
    with run_within(folder, processor, total // 2, 1, offload="nvme") as model:
        model(IDS)
        device = model.zinfer._streaming.coordinator.device
        weight = streamed(model)
        fetch = device.start(weight, urgent=False)
        copied = len(done)
        assert device.lift(fetch)
        for _ in range(1000):  # no operator runs, nothing is asked for: only threads can get on
            if len(done) > copied:
                break
            threading.Event().wait(0.01)
        assert len(done) > copied, "the copy waits for somebody to ask"
        assert fetch.wait().shape == weight.shape


def test_host_memory_returns_when_its_copy_is_done_and_not_before(folder, total, nothing_left):
    gate = Gate("ordinary", "urgent")
    processor = StagedProcessor(MEMORY, delay=gate)
    with run_within(folder, processor, total // 2, 1, offload="nvme") as model:
        device = model.zinfer._streaming.coordinator.device
        fetch = start(model, streamed(model))
        assert fetch.landed(10)
        fetch.issue(urgent=False)
        del fetch
        held = device.window.in_use
        gate.let("ordinary")
        gate.let("urgent")
        assert held > 0, "the copy's source was given away under it"
        for _ in range(1000):
            if device.window.in_use == 0:
                break
            threading.Event().wait(0.01)
        assert device.window.in_use == 0


def test_what_is_to_stay_is_there_when_it_is_handed_out(folder, total, nothing_left):
    gate = Gate("urgent", "ordinary")
    processor = StagedProcessor(MEMORY, delay=gate)
    processor.follow = lambda event: None  # type: ignore[method-assign]  # a stream would wait, not this thread
    with run_within(folder, processor, 4 * total, 2 * total, offload="nvme") as model:
        coordinator = model.zinfer._streaming.coordinator
        weight = next(w for w in model.zinfer._streaming.weights if w.wants_residence)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(coordinator.whole(weight)))
        thread.start()
        thread.join(0.2)
        assert weight.resident is None and not got, (
            "another stream could be given it before its bytes are there"
        )
        gate.let("urgent")
        gate.let("ordinary")
        thread.join(10)
        assert weight.resident is not None
        reference = architectures.ALL["llama"][0].from_pretrained(folder)
        assert torch.equal(got[0], dict(reference.named_parameters())[weight.name])


def test_what_leaves_the_device_comes_from_host_memory_from_then_on(folder, total, monkeypatch, nothing_left):
    processor = StagedProcessor(MEMORY, check=True)
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with run_within(folder, processor, int(total * 0.9), 4 * total, offload="nvme") as model:
        ids = torch.arange(40).reshape(4, 10)
        with torch.no_grad():
            expected = reference(ids).logits
            model(IDS[:1, :2])
            stayed = {w.name for w in model.zinfer._streaming.weights if w.wants_residence}
            cache = model(torch.arange(200).reshape(20, 10), use_cache=True).past_key_values
            left = stayed - {w.name for w in model.zinfer._streaming.weights if w.wants_residence}
            assert left, "nothing had to leave: the test proves nothing"
            model(ids, use_cache=False)
            device, read = model.zinfer._streaming.coordinator.device, []
            monkeypatch.setattr(device, "read", lambda *args: read.append(args))
            assert torch.equal(model(ids, use_cache=False).logits, expected)
            assert read == [], "the drive was asked though the host has room"
            monkeypatch.undo()
            del cache
            model(IDS[:1, :2], use_cache=False)
            model(IDS[:1, :2], use_cache=False)
            assert left & {w.name for w in model.zinfer._streaming.weights if w.wants_residence}, (
                "none returned"
            )
            assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert processor.races == []


def test_a_weight_that_leaves_again_is_not_read_again(folder, total, monkeypatch, nothing_left):
    with run_within(folder, StagedProcessor(MEMORY), int(total * 0.9), 4 * total, offload="nvme") as model:
        model(IDS)
        coordinator, weights = model.zinfer._streaming.coordinator, model.zinfer._streaming.weights
        some = [weight for weight in weights if weight.resident is not None and not weight.rows_only][:3]
        unsettle = model.zinfer._streaming.unsettle
        expected = model(IDS).logits
        coordinator.change_residents(some, (), unsettle)
        assert torch.equal(model(IDS).logits, expected)
        coordinator.change_residents((), some, unsettle)
        read: list[Any] = []
        monkeypatch.setattr(coordinator.device, "read", lambda *args: read.append(args))
        assert torch.equal(model(IDS).logits, expected)
        coordinator.change_residents(some, (), unsettle)
        assert torch.equal(model(IDS).logits, expected)
        assert read == []
        monkeypatch.undo()


def test_spare_host_memory_goes_to_what_left_last_and_is_never_exceeded(folder, total, nothing_left):
    with run_within(folder, StagedProcessor(MEMORY), 4 * total, 4 * total, offload="nvme") as model:
        model(IDS)
        coordinator, weights = model.zinfer._streaming.coordinator, model.zinfer._streaming.weights
        device, unsettle = coordinator.device, model.zinfer._streaming.unsettle
        first, second = [w for w in weights if w.name.endswith("down_proj.weight")][:2]
        device._moved._spare._left = first.layout.nbytes
        coordinator.change_residents([first], (), unsettle)
        coordinator.change_residents([second], (), unsettle)
        assert (device.in_place(first), device.in_place(second)) == (True, False)
        coordinator.change_residents((), [first], unsettle)
        coordinator.change_residents((), [second], unsettle)
        coordinator.change_residents([second], (), unsettle)
        assert (device.in_place(first), device.in_place(second)) == (False, True)
        assert device._moved._spare._left == 0


LARGE = torch.arange(200).reshape(20, 10)  # its caches make residents leave


def notes_of_places(model: Any) -> list[str]:
    return [line for line in model.zinfer.report().fallbacks if "for caches" in line]


@pytest.mark.parametrize("kv_offload", [None, "cpu"])
def test_what_finds_no_room_in_host_memory_is_told_with_the_budget_that_has_it(
    kv_offload, folder, total, caplog, nothing_left
):
    """All weights were to be in memory: nobody would look for reads of the drive."""
    options = {"offload": "cpu", "kv_offload": kv_offload}
    with run_within(folder, StagedProcessor(MEMORY), int(total * 0.9), 1, **options) as model:
        host = model.zinfer._streaming.host.ceiling
        model(IDS[:1, :2], use_cache=False)
        assert notes_of_places(model) == []
        weights, unsettle = model.zinfer._streaming.weights, model.zinfer._streaming.unsettle
        some = [weight for weight in weights if weight.resident is not None][:2]
        for weight in some:
            model.zinfer._streaming.coordinator.change_residents([weight], (), unsettle)
        (note,) = notes_of_places(model)
        assert note.startswith("2 weights, ") and "that left staged for caches stream from the drive" in note
        told = [record.getMessage() for record in caplog.records if "for caches" in record.getMessage()]
        assert len(told) == 1, "once for all of them"
        more = int(re.search(r"raise max_memory\['cpu'\] by (\d+) bytes", note)[1])
        names = {weight.name for weight in some}
        model.zinfer._streaming.coordinator.change_residents((), some[:1], unsettle)
        (note,) = notes_of_places(model)
        assert note.startswith(repr(some[1].name)), "the other one is back"
        model.zinfer._streaming.coordinator.change_residents((), some[1:], unsettle)
        assert notes_of_places(model) == []
    for budget, enough in ((host + more, True), (host + more - 8, False)):
        with run_within(folder, StagedProcessor(MEMORY), int(total * 0.9), budget, **options) as model:
            model(IDS[:1, :2], use_cache=False)
            some = [weight for weight in model.zinfer._streaming.weights if weight.name in names]
            leave(model, some)
            assert (notes_of_places(model) == []) == enough


def test_caches_and_what_leaves_the_device_share_the_host(folder, total, nothing_left):
    """Of what the weights leave, caches have all that no weight could ask for, and a quarter of the budget before."""
    options = {"offload": "cpu", "kv_offload": "cpu"}
    with run_within(folder, StagedProcessor(MEMORY), int(total * 0.9), 8 * total, **options) as model:
        streaming = model.zinfer._streaming
        device, host = streaming.coordinator.device, streaming.host
        there = sum(w.layout.nbytes for w in streaming.weights if w.wants_residence)
        assert device.spare_bytes == there > 0
        planned = host.residents + host.window + host.conversions + host.bounce
        assert model.zinfer.caches._space.limit == 8 * total - planned - there
        reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
        with torch.no_grad():
            expected = reference(LARGE).logits
            model(IDS[:1, :2])
            leave(model, [w for w in streaming.weights if w.resident is not None][:2])
            read = model.zinfer.bytes_read
            assert torch.equal(model(LARGE).logits, expected)
            assert model.zinfer.bytes_read > read
            read = model.zinfer.bytes_read
            assert torch.equal(model(LARGE).logits, expected)
            assert model.zinfer.bytes_read == read, "all weights are in memory"


def test_threads_that_want_one_table_at_once_read_it_once(folder, total, monkeypatch, nothing_left):
    with run_within(folder, StagedProcessor(MEMORY), 4 * total, 4 * total, offload="nvme") as model:
        model(IDS)
        coordinator = model.zinfer._streaming.coordinator
        device, weight = coordinator.device, streamed_or_not(model)
        coordinator.change_residents([weight], (), model.zinfer._streaming.unsettle)
        reads, original, found = [], device.read, []
        monkeypatch.setattr(device, "read", lambda *args, **how: reads.append(1) or original(*args, **how))
        threads = [threading.Thread(target=lambda: found.append(device.bring(weight))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert found == [True] * 4 and len(reads) == 1
        reads.clear()
        monkeypatch.undo()


def streamed_or_not(model: Any) -> Any:
    return next(w for w in model.zinfer._streaming.weights if w.name.endswith("down_proj.weight"))


def test_copies_end_at_the_edges_of_slabs():
    slab = 2 << 20
    pool = Pool(3 * slab, page_lock="off", slab_bytes=slab)
    first, memory = pool.acquire(slab // 2), pool.acquire(2 * slab)
    source = torch.frombuffer(memory, dtype=torch.uint8)
    parts = at_slab_edges(torch.empty(2 * slab, dtype=torch.uint8), source, pool)
    assert [part.nbytes for _, part in parts] == [slab // 2, slab, slab // 2]
    assert all(
        (part.data_ptr() - pool.base_address) // slab
        == (part.data_ptr() + part.nbytes - 1 - pool.base_address) // slab
        for _, part in parts
    )
    assert [target.nbytes for target, _ in parts] == [part.nbytes for _, part in parts]
    del first


class LateRead:
    """A read that is told to have landed only once it was let go."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.let_go = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        return self.let_go.wait(timeout) and self._request.wait(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def test_what_is_in_host_memory_is_copied_though_an_older_read_has_not_landed(
    folder, total, monkeypatch, nothing_left
):
    with run_within(folder, StagedProcessor(MEMORY), total, 2 * total, offload="nvme") as model:
        model(IDS)
        device, late = model.zinfer._streaming.coordinator.device, []
        unsettle = model.zinfer._streaming.unsettle
        small = [
            w for w in model.zinfer._streaming.weights if w.name.endswith(("k_proj.weight", "v_proj.weight"))
        ]
        model.zinfer._streaming.coordinator.change_residents(small, (), unsettle)
        older, ready, newest = small[:3]
        assert device.bring(ready)
        original = device.read
        monkeypatch.setattr(
            device, "read", lambda *args, **how: late.append(LateRead(original(*args, **how))) or late[-1]
        )
        most = max(weight.layout.nbytes for weight in small)
        monkeypatch.setattr(device, "_arena", Arena(device.processor, 4 * most))
        fetches = [device.start(weight, urgent=False) for weight in (older, ready, newest)]
        assert len(late) == 2, "the one that is ready was read: the test proves nothing"
        assert all(device.lift(fetch) for fetch in fetches)
        wait_for(lambda: fetches[1].done)
        assert [fetch.done for fetch in fetches] == [False, True, False]
        late[1].let_go.set()
        wait_for(lambda: fetches[2].done)
        assert not fetches[0].done
        late[0].let_go.set()
        wait_for(lambda: fetches[0].done)
        late.clear()
        fetches.clear()
        monkeypatch.undo()


def wait_for(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_a_weight_that_lost_its_place_while_it_came_is_not_kept_there(folder, total, nothing_left):
    with run_within(folder, StagedProcessor(MEMORY), int(total * 0.9), 4 * total, offload="nvme") as model:
        model(IDS)
        coordinator, weights = model.zinfer._streaming.coordinator, model.zinfer._streaming.weights
        device, unsettle = coordinator.device, model.zinfer._streaming.unsettle
        first, second = [w for w in weights if w.resident is not None and w.name.endswith("k_proj.weight")][
            :2
        ]
        device._moved._spare._left = first.layout.nbytes
        coordinator.change_residents([first], (), unsettle)
        place = device._moved.pool(first)
        assert place is not None
        fetch = device.start(first, urgent=True)
        coordinator.change_residents((), [first], unsettle)
        # The memory of `first` counts as taken until nobody holds it.
        device._moved._spare._left += (
            second.layout.nbytes if second.layout.nbytes > first.layout.nbytes else 0
        )
        coordinator.change_residents([second], (), unsettle)
        assert device._moved.pool(first) is None, "its place was not taken: the test proves nothing"
        coordinator.drop_ahead()
        assert device.lift(fetch)
        fetch.wait()
        assert first not in device._kept
        del fetch, place


def test_what_is_kept_knows_the_mapping_it_lies_in(folder, total, nothing_left):
    with run_within(folder, StagedProcessor(MEMORY), int(total * 0.6), 4 * total, offload="nvme") as model:
        model(IDS)
        coordinator, weights = model.zinfer._streaming.coordinator, model.zinfer._streaming.weights
        device = coordinator.device
        some = [w for w in weights if w.resident is not None and not w.rows_only][:2]
        coordinator.change_residents(some, (), model.zinfer._streaming.unsettle)
        model(IDS)
        assert set(some) <= set(device._kept) and len(device._kept) > len(some)
        for weight, kept in device._kept.items():
            assert kept.pool is (device._moved.pool(weight) or device.residents.pool)
            address = torch.frombuffer(kept.memory, dtype=torch.uint8).data_ptr()
            assert 0 <= address - kept.pool.base_address < kept.pool.capacity


class Unlockable(StagedProcessor):
    """Would have page-locked memory, which nobody gives it here."""

    page_locks = True


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be page-locked here")
def test_memory_that_cannot_be_page_locked_is_told_with_what_it_costs(folder, total, caplog, nothing_left):
    with run_within(folder, Unlockable(MEMORY), total // 2, 1, offload="nvme") as model:
        (note,) = [line for line in model.zinfer.report().fallbacks if "page-locked" in line]
        assert re.search(r"at [0-9.]+ GB/s here", note)
        assert note in caplog.text
        assert model(IDS).logits.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be page-locked here")
def test_memory_for_caches_that_cannot_be_page_locked_is_told_too_and_once(
    folder, total, caplog, nothing_left
):
    options = {"offload": "nvme", "kv_offload": "cpu"}
    with run_within(folder, Unlockable(MEMORY), total // 2, 4 * total, **options) as model:
        cache = model(IDS[:1, :2], use_cache=True).past_key_values
        pools = len(model.zinfer.caches._space._pools)
        more = model(torch.arange(200).reshape(20, 10), use_cache=True).past_key_values
        assert len(model.zinfer.caches._space._pools) > pools > 0, "one pool: the test proves nothing"
        report = model.zinfer.report()
        weights, caches = [line for line in report.fallbacks if "page-locked" in line]
        assert weights.startswith("host memory is not page-locked")
        assert re.fullmatch(
            r"memory for key-value caches is not page-locked \(.+\): copies .* at [0-9.]+ GB/s here.*", caches
        )
        assert caches in str(report) and caches in report.as_dict()["fallbacks"]
        assert caplog.text.count(caches) == 1
        del cache, more


class Locked(Pool):
    """Says that it is page-locked."""

    page_locked = True


def test_what_copies_of_caches_cost_is_measured_where_only_their_memory_is_refused(
    folder, total, monkeypatch, nothing_left
):
    for module in (moved, host, residents):
        monkeypatch.setattr(module, "Pool", Locked)
    options = {"offload": "nvme", "kv_offload": "cpu"}
    with run_within(folder, Unlockable(MEMORY), 16 << 20, 4 * total, **options) as model:
        assert not [line for line in model.zinfer.report().fallbacks if "page-locked" in line]
        cache = model(IDS, use_cache=True).past_key_values
        (note,) = [line for line in model.zinfer.report().fallbacks if "page-locked" in line]
        assert "key-value caches" in note and re.search(r"at [0-9.]+ GB/s here", note)
        del cache


@pytest.mark.parametrize(("left", "told"), [(4 << 20, True), (1000, False)])
def test_the_cost_is_measured_with_what_the_device_has_left(left, told):
    processor = Unlockable(left)
    locks = PageLocks(processor)
    locks.check([Pool(4096, page_lock="off")], "memory")
    (note,) = locks.notes
    assert ("GB/s" in note) == told
    assert processor.memory()[0] == left, "it keeps what it tried it in"
    processor.close()


def test_a_resident_that_the_device_has_no_memory_for_streams_and_that_is_told(folder, total, nothing_left):
    processor = StagedProcessor(MEMORY)
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with run_within(folder, processor, int(total * 0.9), 2 * total, offload="nvme") as model:
        processor.limit(processor.peak)  # another process takes the rest
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(IDS).logits, reference(IDS).logits)
        assert any("short of memory" in line for line in model.zinfer.report().fallbacks)


class OneStreamAThread(StagedProcessor):
    """Writes down which streams it was told to read what others made: `told`, as address and stream."""

    def __init__(self) -> None:
        super().__init__(MEMORY)
        self.told: list[tuple[int, Any]] = []

    def stream(self) -> Any:
        """See Processor."""
        return threading.current_thread().name

    def used(self, memory: Any, stream: Any) -> None:
        """See Processor."""
        if isinstance(memory, torch.Tensor):
            self.told.append((memory.data_ptr(), stream))


def on_thread(name: str, work: Any) -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_a_conversion_made_is_kept_for_every_stream_that_it_is_given_to(folder, dtype, nothing_left):
    processor = OneStreamAThread()
    with run_within(folder, processor, 1, 1, offload="nvme", dtype=dtype) as model:
        weight = streamed(model)
        fetch = start(model, weight)
        tensor = fetch.wait()
        assert processor.told == [], "its own stream needs nothing"
        on_thread("second", fetch.wait)
        converted = weight.placed is None
        assert converted == (dtype == "bfloat16")
        assert processor.told == ([(tensor.data_ptr(), "second")] if converted else [])
        del fetch, tensor


def leave(model: Any, weights: list[Any]) -> None:
    model.zinfer._streaming.coordinator.change_residents(weights, [], model.zinfer._streaming.unsettle)


def close(model: Any, weights: list[Any]) -> None:
    model.zinfer.close()


def drop(model: Any, weights: list[Any]) -> None:
    """Nothing: the caller's own reference was the last."""


@pytest.mark.parametrize("end", [leave, close, drop])
def test_a_resident_that_a_conversion_made_dies_when_all_streams_are_done(folder, total, end, nothing_left):
    processor = OneStreamAThread()
    model = run_within(folder, processor, 4 * total, 2 * total, offload="nvme", dtype="bfloat16")
    for name in ("first", "second"):
        on_thread(name, partial(model, IDS))
    weights = [w for w in model.zinfer._streaming.weights if w.resident is not None and w.placed is None]
    assert weights, "nothing was converted: the test proves nothing"
    died: dict[int, set[str]] = {}

    def note(address: int) -> None:  # from here on torch may give its memory away
        died[address] = {stream for where, stream in processor.told if where == address}

    for weight in weights:
        weakref.finalize(weight.resident.untyped_storage(), note, weight.resident.data_ptr()).atexit = False
    count = len(weights)
    end(model, weights)
    del model, weights, weight
    gc.collect()
    assert len(died) == count, "a resident lives on: the test proves nothing"
    assert all(streams >= {"first", "second"} for streams in died.values())


class Chosen(StagedProcessor):
    """Knows which threads have chosen it, and makes pools that tell of those which have not."""

    def __init__(self) -> None:
        super().__init__(MEMORY)
        self.threads: set[str] = set()  # that have chosen it at some time
        self.pools: list[bool] = []  # whether the thread had, of each pool
        self._mine = threading.local()

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Processor."""
        self.threads.add(threading.current_thread().name)
        self._mine.chosen = True
        try:
            yield
        finally:
            self._mine.chosen = False

    def pool(self, *args: Any, **options: Any) -> Pool:
        """A pool."""
        self.pools.append(getattr(self._mine, "chosen", False))
        return Pool(*args, **options)


@pytest.mark.parametrize("kv_offload", [None, "cpu"])
def test_the_device_is_chosen_where_its_runtime_is_asked(
    folder, total, kv_offload, monkeypatch, nothing_left
):
    processor = Chosen()
    for module in (moved, host, residents, rows, space):
        monkeypatch.setattr(module, "Pool", processor.pool)
    options = {"offload": "nvme", "kv_offload": kv_offload}
    with run_within(folder, processor, int(total * 0.9), 4 * total, **options) as model:
        at_first = len(processor.pools)
        model(IDS[:1, :2])
        cache = model(torch.arange(200).reshape(20, 10), use_cache=True).past_key_values
        assert len(processor.pools) > at_first, "nothing went to host memory: the test proves nothing"
        assert all(processor.pools)
        assert {"zinfer-copy", "zinfer-copied"} <= processor.threads
        del cache


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be page-locked here")
def test_on_rocm_nobody_is_sent_to_install_cuda(folder, total, monkeypatch, nothing_left):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with run_within(folder, Unlockable(MEMORY), total // 2, 1, offload="nvme") as model:
        (note,) = [line for line in model.zinfer.report().fallbacks if "page-locked" in line]
    assert "ROCm" in note and "CUDA build" not in note


def test_whoever_is_told_that_a_copy_has_ended_finds_its_host_memory_free():
    class Memory:
        pass

    class Done:
        done = True

    memory, free = Memory(), []
    alive = weakref.ref(memory)

    def started(event: Any, sources: list[Any]) -> None:
        sources.clear()  # as the thread does that waits for copies, if this one has ended already
        free.append(alive() is None)

    weight: Any = SimpleNamespace(name="w", placed=None)

    def start(memory: Any, lease: Any, urgent: bool) -> Any:
        return Done(), [memory]

    nothing: Any = None
    fetch = LiftedFetch(
        weight, None, memory, start, started, nothing, nothing, in_place=False, settles=False, generation=0
    )
    del memory
    fetch.lease = SimpleNamespace()
    fetch.issue(urgent=False)
    assert free == [True]
