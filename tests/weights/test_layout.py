"""Pieces of a region: disjoint, inside, and congruent to their file offsets where O_DIRECT may spill."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.weights.layout import PAGE, VECTOR, lay_out, placements_of, round_up
from zinfer.weights.lowering import Placed, Replayed, Run
from zinfer.weights.safetensors_header import TensorEntry
from zinfer.weights.symbolic import Leaf

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)

offsets = (
    st.integers(0, 1 << 40)
    | st.integers(0, 64).map(lambda k: k * VECTOR)
    | st.integers(0, 9).map(lambda k: k * PAGE)
)


@st.composite
def placed(draw) -> Placed:
    dtype = draw(st.sampled_from(DTYPES))
    counts = draw(st.lists(st.integers(1, 3 * PAGE // dtype.itemsize), max_size=4))
    runs = tuple(Run(draw(st.sampled_from("ab")), draw(offsets), count * dtype.itemsize) for count in counts)
    mapped = len(counts) == 1 and draw(st.booleans())
    return Placed(runs, (sum(counts),), dtype, mapped)


placements = st.lists(placed(), max_size=5)
units = st.sampled_from((PAGE, VECTOR))


@given(st.integers(0, 1 << 50), st.sampled_from((1, VECTOR, PAGE)))
def test_rounding_up_reaches_the_next_multiple_and_no_further(count, unit):
    assert 0 <= round_up(count, unit) - count < unit
    assert round_up(count, unit) % unit == 0


@settings(deadline=None)
@given(placements, st.booleans(), units)
def test_pieces_are_the_runs_in_order_disjoint_and_inside_the_region(items, allocated, unit):
    layout = lay_out(items, allocated=allocated, unit=unit)

    assert [piece.run for piece in layout.pieces] == [run for item in items for run in item.runs]
    assert layout.nbytes % unit == 0
    end = 0
    for piece in layout.pieces:
        assert piece.at >= end
        end = piece.at + piece.run.length
    assert end <= layout.nbytes


@settings(deadline=None)
@given(placements, st.booleans(), units)
def test_each_tensor_is_its_runs_end_to_end_from_its_start(items, allocated, unit):
    layout = lay_out(items, allocated=allocated, unit=unit)
    pieces = iter(layout.pieces)
    assert len(layout.starts) == len(items)
    for item, start in zip(items, layout.starts, strict=True):
        at = start
        for run in item.runs:
            assert next(pieces).at == at
            at += run.length


@settings(deadline=None)
@given(placements, st.booleans(), units)
def test_a_piece_with_slack_agrees_with_its_file_and_has_its_pages_to_itself(items, allocated, unit):
    layout = lay_out(items, allocated=allocated, unit=unit)
    for piece in layout.pieces:
        if piece.slack:
            assert piece.at % PAGE == piece.run.offset % PAGE
            low, high = piece.at // PAGE * PAGE, round_up(piece.at + piece.run.length)
            assert high <= layout.nbytes
            others = [other for other in layout.pieces if other is not piece]
            assert all(other.at >= high or other.at + other.run.length <= low for other in others)


@settings(deadline=None)
@given(placements, st.booleans())
def test_small_tensors_are_packed_without_slack(items, allocated):
    layout = lay_out(items, allocated=allocated, unit=VECTOR)
    assert not any(piece.slack for piece in layout.pieces)
    assert layout.nbytes <= VECTOR + sum(round_up(item.nbytes, VECTOR) + VECTOR for item in items)


@settings(deadline=None)
@given(placements, units)
def test_a_tensor_mapped_from_the_file_keeps_the_files_residue(items, unit):
    layout = lay_out(items, unit=unit)
    for item, start in zip(items, layout.starts, strict=True):
        if item.mapped:
            assert start % unit == item.runs[0].offset % unit


@settings(deadline=None)
@given(placements, units)
def test_a_float_tensor_that_was_allocated_starts_at_a_vector(items, unit):
    for allocated in (False, True):
        layout = lay_out(items, allocated=allocated, unit=unit)
        for item, start in zip(items, layout.starts, strict=True):
            if (allocated or not item.mapped) and item.dtype in (torch.float32, torch.float64):
                assert start % VECTOR == 0


@settings(deadline=None)
@given(placements, st.integers(0, VECTOR - 1), units, st.booleans())
def test_a_float_tensor_of_a_live_module_stands_where_the_live_one_stood(items, residue, unit, allocated):
    items = [replace(item, residue=residue) for item in items]
    layout = lay_out(items, allocated=allocated, unit=unit)
    for item, start in zip(items, layout.starts, strict=True):
        if item.dtype in (torch.float32, torch.float64):
            assert start % VECTOR == residue


def test_an_empty_layout_still_has_a_region():
    assert lay_out([]).nbytes == PAGE
    assert lay_out([Placed((), (0, 4), torch.float32)]).starts == (0,)


def test_a_replay_reads_its_leaves_and_a_placement_itself():
    leaf = Leaf(TensorEntry("t", "a", 0, 8, torch.float32, (2,)))
    item = Placed((Run("a", 0, 8),), (2,), torch.float32)
    assert placements_of(item) == (item,)
    assert placements_of(Replayed(leaf, ((leaf, item), (leaf, item)))) == (item, item)
