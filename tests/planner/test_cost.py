"""The formula: the largest of drive, PCIe and compute, each from its own bytes or flops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.machines import cpu, gpu
from zinfer.planner.assumed import Matrix, assumed_work
from zinfer.planner.cost import (
    MOST_BATCH,
    Bounds,
    Operator,
    PassWork,
    Work,
    compute_seconds,
    largest_batch,
    sweep,
)
from zinfer.planner.plan import times

GB = 10**9
ROW = Operator("matmul", "float32", 1, flops=2 * GB, nbytes=4 * GB)
EMPTY = PassWork((), ((0, 1.0), (1, 1.0), (2, 0.5)))
SIZES = [GB, 2 * GB, 4 * GB]


def test_an_operator_takes_as_long_as_the_slower_of_flops_and_bytes():
    assert compute_seconds([ROW], cpu()) == pytest.approx(0.2)  # both 0.2: a matrix times a vector
    many = Operator("matmul", "float32", 16, flops=32 * GB, nbytes=4 * GB)
    assert compute_seconds([many], cpu()) == pytest.approx(0.2)  # 32e9 / 1.6e11: the rows are for nothing
    assert compute_seconds([Operator("copy", "float32", 1, 0, 4 * GB)], cpu()) == pytest.approx(0.2)


def test_operators_add_up_and_each_costs_its_start():
    thrice = Operator("copy", "float32", 1, 0, 4 * GB, count=3)
    assert compute_seconds([thrice, ROW], cpu(operator_seconds=1e-3)) == pytest.approx(0.8 + 4e-3)


def test_a_device_works_while_the_host_starts_what_comes_next():
    many = Operator("copy", "float32", 1, 0, 10 * GB, count=100)  # 10 ms each
    assert compute_seconds([many], gpu(operator_seconds=1e-4)) == pytest.approx(1.0)
    few = Operator("copy", "float32", 1, 0, GB // 1000, count=100)  # a microsecond each
    assert compute_seconds([few], gpu(operator_seconds=1e-4)) == pytest.approx(0.01)


def test_the_drive_carries_what_is_resident_nowhere():
    bounds = sweep(EMPTY, SIZES, cpu(), host={1})
    assert bounds == Bounds(drive=3.0, pcie=0.0, compute=0.0)  # all of 0 and half of 2
    assert bounds.bottleneck == "drive"


def test_pcie_carries_what_is_not_on_the_device():
    bounds = sweep(EMPTY, SIZES, gpu(), device={0}, host={1})
    assert bounds == Bounds(drive=2.0, pcie=0.4, compute=0.0)
    assert sweep(EMPTY, SIZES, gpu(), device={0, 1, 2}).seconds == 0


@pytest.mark.parametrize("busy", ["drive", "pcie", "compute"])
def test_the_bottleneck_is_the_busiest_and_its_time_the_sweeps(busy):
    bounds = Bounds(**{"drive": 1.0, "pcie": 1.0, "compute": 1.0, busy: 2.0})
    assert (bounds.bottleneck, bounds.seconds) == (busy, 2.0)


def test_rates_follow_from_the_two_kinds_of_sweep():
    found = times(Bounds(0.5, 0.0, 0.25), Bounds(3.0, 0.0, 1.0), batch=4, new_tokens=3)
    assert found["tokens_per_second"] == 8
    assert found["throughput"] == 12 / (3.0 + 2 * 0.5)
    assert found["first_token_bottleneck"] == "drive"


@given(st.integers(0, MOST_BATCH))
def test_the_largest_batch_is_the_last_that_fits(last):
    asked = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= last

    assert largest_batch(fits) == last
    assert len(asked) < 45
    assert max(asked) <= MOST_BATCH


def test_no_batch_beyond_the_limit_of_the_search_is_tried():
    asked = []
    assert largest_batch(lambda batch: asked.append(batch) or True) == MOST_BATCH
    assert max(asked) == MOST_BATCH


def test_the_cache_grows_with_the_batch():
    work = Work(2, EMPTY, EMPTY, cache_bytes=111, activation_bytes=11)
    assert [work.cache(batch) for batch in (1, 2, 4)] == [56, 111, 222]


def test_where_nothing_is_known_a_weight_is_two_flops_a_row():
    matrices = [Matrix(0, 10, 20, "bfloat16"), Matrix(3, 100, 200, "bfloat16")]
    work = assumed_work(matrices, 2, 8, 4, cache_at=lambda tokens: 96 * tokens, hidden=4)
    assert work.prefill.flops == 2 * 110 * 16
    assert work.decode.flops == 2 * 110 * 2
    assert work.decode.asks == ((0, 1.0), (3, 1.0))
    assert work.cache_bytes == 96 * (8 + 3)
    assert work.decode.operators[-1].nbytes == 96 * (8 + 2)
