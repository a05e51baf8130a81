"""What sweep.py and growth.py make of their runs. No process is started here."""

import dataclasses

import pytest
import torch

from benchmarks import bound, growth
from benchmarks.bench import Run
from benchmarks.bound import Cell, Overhead, Point, counted, requirements
from benchmarks.growth import Fit
from benchmarks.spans import disturbed
from benchmarks.tools.memory import swept_bytes
from benchmarks.worker import Outcome
from tests.benchmarks.runs import GB, USAGE, span

HALF = Cell(50, 4 * GB, 1)
ALL = Cell(100, 8 * GB, 1)


WINDOW = GB // 4
REPORT = {"window_bytes": WINDOW, "small_bytes": 0, "bounce_bytes": 0, "conversion_bytes": 0}


def a_run(
    seconds, read=0, resident=None, foreign_cpu=0.0, first=8 * GB, report=None, ahead=(0, 0), rested=None
):
    outcome = Outcome(
        "zinfer",
        first_token=span(3.0, first),
        tokens_each=[span(seconds, read)] * 3,
        decode=span(3 * seconds, 3 * read, foreign_cpu=foreign_cpu),
        probe_rates=[5 * GB, 5 * GB],
        memory_rates=[3 * GB, 5 * GB],
        resident=resident,
        resident_each=[resident] * 4,
        rested=span(4 * seconds, 4 * read if rested is None else rested),
        read_ahead=list(ahead),
        report=report,
    )
    return Run(outcome, USAGE)


def a_point(
    cell=HALF,
    seconds=1.04,
    read=4 * GB,
    resident=4 * GB,
    compute=0.3,
    foreign_cpu=0.0,
    first=8 * GB,
    cache=0,
    window=WINDOW,
):
    mine = {**REPORT, "planned_resident_bytes": resident, "window_bytes": window, "cache_bytes": cache}
    counted = {"swept_bytes": 8 * GB, "first_swept_bytes": 8 * GB}
    return Point(
        cell,
        a_run(seconds, read, resident, foreign_cpu, first, mine),
        a_run(compute, report=counted),
    )


def required(points, predicted=None, overheads=None, tokens_equal=True):
    overheads = overheads or [Overhead([1.0], [1.0], True)]
    predicted = predicted or dict.fromkeys(points, 1.0)
    return {item.name: item for item in requirements(points, overheads, predicted, tokens_equal)}


def test_a_sweep_limited_by_the_drive_is_held_against_the_bytes_that_are_not_resident():
    point = a_point()
    assert point.drive_bound
    assert point.bound == pytest.approx(1.0)
    assert point.over_bound == pytest.approx(1.04)
    assert point.over_plain_bound == pytest.approx(1.3)


def test_a_sweep_limited_by_compute_is_held_against_the_model_in_memory():
    point = a_point(ALL, seconds=1.5, read=0, resident=8 * GB, compute=1.2)
    assert not point.drive_bound
    assert point.over_bound == pytest.approx(1.25)
    found = required({HALF: [a_point()], ALL: [point]})
    assert found["limited by the drive: s a token / bound"].met
    assert not found["limited by compute: s a token / in memory"].met


def test_a_group_without_cells_requires_nothing():
    assert "limited by compute: s a token / in memory" not in required({HALF: [a_point()]})


def test_residents_that_no_sweep_needs_in_full_leave_nothing_to_read():
    assert a_point(ALL, resident=9 * GB).streamed == 0


def test_the_worst_cell_counts_and_of_a_cell_its_median():
    points = {HALF: [a_point(seconds=s) for s in (1.0, 1.02, 9.0)], ALL: [a_point(ALL, seconds=1.1)]}
    assert required(points)["limited by the drive: s a token / bound"].measured == pytest.approx(1.1)


def test_bytes_read_twice_and_budgets_left_empty_or_exceeded_are_misses():
    names = [
        "bytes read a sweep / (W - R)",
        "budget - resident - KV cache, bytes",
        "zinfer's account with the KV cache / budget",
    ]
    good = a_point(resident=4 * GB - WINDOW, read=4 * GB + WINDOW)
    assert all(required({HALF: [good]})[name].met for name in names)
    assert not required({HALF: [a_point(read=4.1 * GB)]})[names[0]].met
    assert not required({HALF: [a_point(resident=3 * GB)]})[names[1]].met
    assert required({HALF: [a_point(resident=3 * GB, cache=GB)]})[names[1]].met
    assert not required({HALF: [a_point(resident=4 * GB - WINDOW + 1)]})[names[2]].met
    assert not required({HALF: [a_point(resident=4 * GB - WINDOW, cache=1)]})[names[2]].met


def test_what_is_read_ahead_counts_for_the_token_that_needs_it():
    run = a_run(1.0, resident=0, ahead=(GB, 3 * GB), rested=4 * 4 * GB + 2 * GB)
    assert Point(HALF, run, run).read == 4 * GB
    run = a_run(1.0, resident=0, ahead=(GB, GB), rested=4 * 4 * GB + 2 * GB)
    assert Point(HALF, run, run).read == 4.5 * GB


def test_bytes_are_held_against_what_was_resident_at_each_token():
    point = a_point(resident=4 * GB, read=4 * GB)
    assert point.read_ratio == pytest.approx(1.0, abs=1e-5)
    point.run.outcome.resident_each[:2] = [5 * GB] * 2  # left while caches grew: the end alone would flatter
    assert point.read_ratio == pytest.approx(4 / 3.5, abs=1e-5)


def test_the_first_token_may_read_a_little_for_the_second_but_not_a_window():
    name = "bytes read to the first token / W"
    ahead = a_point(first=8.125 * GB)
    assert ahead.first_ratio == pytest.approx(8.125 / 8)
    assert required({HALF: [ahead]})[name].measured == pytest.approx(8.125 / 8)
    assert required({HALF: [a_point(first=8.16 * GB)]})[name].met
    assert not required({HALF: [a_point(first=8 * GB + WINDOW)]})[name].met


def test_undisturbed_rounds_count_where_there_are_enough():
    loud = a_point(foreign_cpu=90.0, seconds=9.0)
    assert loud.disturbed
    assert counted([a_point(), loud, a_point(), a_point()]) == [a_point()] * 3
    assert counted([loud, loud, a_point()]) == [loud, loud, a_point()]


def test_a_prediction_is_held_against_the_median_of_each_cell():
    points = {HALF: [a_point(seconds=s) for s in (1.0, 2.0, 9.0)], ALL: [a_point(ALL, seconds=1.0)]}
    assert bound.prediction_error(points, {HALF: 1.8, ALL: 1.3}) == pytest.approx(0.2)


def test_overhead_is_the_median_over_pairs_of_neighbours():
    assert Overhead([1.0, 4.0, 3.0], [1.0, 2.0, 2.0], True).ratio == pytest.approx(1.5)


def test_each_cell_has_a_row_in_both_tables():
    points = {HALF: [a_point()], ALL: [a_point(ALL)]}
    assert "| 50 %, batch 1 | 1.040 | 0.300 | 1.000 | drive | 1.040 |" in bound.cell_rows(
        points, {HALF: 1.0, ALL: 1.0}
    )
    assert "| 100 %, batch 1 | 8.000 | 8.000 | 4.000 | 4.000 | 4.000 |" in bound.byte_rows(points)


def test_a_table_of_rows_counts_a_row_a_token_unless_it_is_tied_to_a_matrix():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    assert swept_bytes(model, 3) == (3 * 4 + 10 * 4) * 4
    assert swept_bytes(model, 99) == (10 * 4 + 10 * 4) * 4
    model[1].weight = model[0].weight
    assert swept_bytes(model, 3) == 10 * 4 * 4


def test_spans_add_up():
    both = span(1.0, 5, foreign_cpu=0.25) + span(2.0, 6, foreign_cpu=0.5)
    assert both == span(3.0, 11, foreign_cpu=0.75)
    assert not disturbed([both])
    assert disturbed([span(1.0, 5, foreign_cpu=0.5)])


def test_a_line_through_points_on_a_line_explains_all_of_them():
    line = Fit.of([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
    assert dataclasses.astuple(line) == pytest.approx((2.0, 1.0, 1.0))
    assert Fit.of([1.0, 2.0, 3.0], [1.0, 5.0, 1.0]).r_squared == pytest.approx(0.0)


def test_growth_is_the_farthest_median_from_the_smallest_models():
    assert growth.growth([[100.0], [99.0, 99.0, 500.0], [101.0]]) == pytest.approx(0.01)
    assert growth.growth([[100.0], [103.0], [101.0]]) == pytest.approx(0.03)
