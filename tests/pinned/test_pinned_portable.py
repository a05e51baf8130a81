"""What is particular to the portable pool: what it refuses, and regions that are arrays."""

import gc
import threading

import numpy
import pytest

from zinfer.errors import BudgetError, OptionError
from zinfer.pinned import COMPILED
from zinfer.pinned.compiled import portable_wanted
from zinfer.pinned.portable import Pool, Region
from zinfer.pinned.portable.numa import online_nodes

PAGE = 4096


def test_a_page_lock_that_is_demanded_is_a_budget_error_that_names_the_remedy():
    with pytest.raises(BudgetError, match=r'compiled modules.*page_lock="auto"'):
        Pool(PAGE, page_lock="on")


def test_a_page_lock_that_cannot_be_had_is_told():
    pool = Pool(PAGE)
    assert (pool.page_locked, pool.locked_bytes, pool.slab_bytes) == (False, 0, 1 << 30)
    assert "compiled modules" in pool.page_lock_reason


def test_a_numa_node_is_not_ignored_in_silence():
    pool = Pool(PAGE, numa_node=online_nodes()[0])
    assert "compiled modules" in pool.numa_reason
    assert Pool(PAGE).numa_reason == ""


@pytest.mark.parametrize(
    ("text", "nodes"), [("0\n", [0]), ("0-1,3\n", [0, 1, 3]), ("", [0]), ("2-3", [2, 3])]
)
def test_nodes_are_listed_as_the_compiled_module_lists_them(tmp_path, text, nodes):
    (tmp_path / "online").write_text(text)
    path = str(tmp_path / "online")
    assert online_nodes(path) == nodes
    if COMPILED:
        from zinfer.pinned._native import online_nodes as compiled

        assert compiled(path) == nodes


def test_every_kind_of_view_keeps_the_run():
    pool = Pool(4 * PAGE, page_lock="off")
    views = [
        lambda region: region[100:200],
        lambda region: region[::2][5:],
        lambda region: numpy.asarray(region),
        lambda region: numpy.asarray(region)[7:9],
        lambda region: region.view(numpy.ndarray).view(numpy.int64),
        lambda region: region.reshape(2, -1).T,
        lambda region: numpy.frombuffer(region, dtype=numpy.float32),
        lambda region: memoryview(region)[3:].cast("b"),
    ]
    for make in views:
        view = make(pool.acquire(PAGE))
        gc.collect()
        assert pool.in_use == PAGE
        del view
        assert pool.in_use == 0


def test_a_region_is_true_and_equal_to_itself_alone():
    pool = Pool(2 * PAGE, page_lock="off")
    first, second = pool.acquire(PAGE), pool.acquire(PAGE)
    assert first and isinstance(first, Region)
    assert (first == first, first == second, first != second) == (True, False, True)
    assert [second, first].index(first) == 1
    assert "4096 bytes" in repr(first)


def test_a_region_that_dies_while_its_thread_has_the_lock_returns_all_the_same():
    pool = Pool(2 * PAGE, page_lock="off")
    region = pool.acquire(PAGE)
    with pool._locked():  # where the cycle collector may run
        del region
    assert not pool._returned
    assert pool.in_use == 0


def test_a_region_that_dies_while_another_thread_has_the_lock_wakes_who_waits():
    pool = Pool(PAGE, page_lock="off")
    held, got = [pool.acquire(PAGE)], []
    thread = threading.Thread(target=lambda: got.append(pool.acquire(PAGE, timeout=20)))
    thread.start()
    with pool._locked():
        other = threading.Thread(target=held.clear)
        other.start()
        other.join(20)
        assert not other.is_alive()
    thread.join(20)
    assert got[0] is not None


@pytest.mark.parametrize(
    ("values", "wanted"),
    [(["1", "true", "Yes", "ON", " 1 "], True), (["", "0", "false", "No", "OFF"], False)],
)
def test_portable_code_is_asked_for_in_the_usual_words(values, wanted, monkeypatch):
    for value in values:
        monkeypatch.setenv("ZINFER_PORTABLE", value)
        assert portable_wanted() is wanted
    monkeypatch.delenv("ZINFER_PORTABLE")
    assert portable_wanted() is False


@pytest.mark.parametrize("value", ["2", "maybe", "-1"])
def test_another_word_is_no_silent_no(value, monkeypatch):
    monkeypatch.setenv("ZINFER_PORTABLE", value)
    with pytest.raises(OptionError, match=f'ZINFER_PORTABLE must be "1".*not "{value}"'):
        portable_wanted()
