"""Extents -> pieces, in Python. Pure functions on plain data, with the same results as csrc/aio/split.

    file     |----A----|----A----|----A----|----A----|        A = alignment
    wanted         [=========================)
    slack    [-----================================--)        one aligned superset, straight to memory
    exact    [head)    [===== interior =====)[tail)           head and tail through a bounce slot
    written  [edge)    [===== interior =====)[edge)           an edge is one block: read, changed, written

All sizes, offsets and addresses are in bytes. Pieces are cut at multiples of `block_bytes` of the file's offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# Below this, one bounced read beats a head, an interior and a tail read of their own.
SMALL_BYTES = 64 << 10


class Extent(NamedTuple):
    """Bytes [offset, offset + length) of file number `file`, wanted at `address`.

    slack: the bytes around the destination, out to the aligned superset, are scratch.
    """

    file: int
    offset: int
    length: int
    address: int
    slack: bool


class Piece(NamedTuple):
    """One operation: move the span so that [offset, +length) comes to, or from, `address`.

    Not bounced: the span in memory starts at address - (offset - span_offset).
    """

    file: int
    offset: int
    length: int
    address: int
    span_offset: int
    span_length: int
    bounced: bool


class Geometry(NamedTuple):
    """`alignment` is a power of two (1: no constraint), `slot_bytes` a multiple of it."""

    alignment: int
    block_bytes: int
    slot_bytes: int


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours that are contiguous in file and in memory; drop empty extents; keep the order."""
    merged: list[Extent] = []
    for extent in extents:
        if extent.length == 0:
            continue
        if merged:
            last = merged[-1]
            same = last.file == extent.file and last.slack == extent.slack
            ends = (last.offset + last.length, last.address + last.length)
            if same and ends == (extent.offset, extent.address):
                merged[-1] = last._replace(length=last.length + extent.length)
                continue
        merged.append(extent)
    return merged


def split(extent: Extent, geometry: Geometry) -> list[Piece]:
    """The pieces of one extent in file order, to read it."""
    alignment = geometry.alignment
    block = _up(geometry.block_bytes, alignment)
    bounce_cut = min(block, _down(geometry.slot_bytes, alignment))
    first, last = extent.offset, extent.offset + extent.length
    if extent.length == 0:
        return []
    if extent.address % alignment != first % alignment:
        return list(_cut(extent, first, last, bounce_cut, alignment, bounced=True))
    inner_first, inner_last = _up(first, alignment), _down(last, alignment)
    if extent.slack or (inner_first, inner_last) == (first, last):
        return list(_cut(extent, first, last, block, alignment, bounced=False))
    superset = _up(last, alignment) - _down(first, alignment)
    if inner_first >= inner_last or superset <= min(SMALL_BYTES, bounce_cut):
        return list(_cut(extent, first, last, bounce_cut, alignment, bounced=True))
    return [
        *_cut(extent, first, inner_first, bounce_cut, alignment, bounced=True),
        *_cut(extent, inner_first, inner_last, block, alignment, bounced=False),
        *_cut(extent, inner_last, last, bounce_cut, alignment, bounced=True),
    ]


def split_write(extent: Extent, geometry: Geometry) -> list[Piece]:
    """The same, to write it: a piece is an edge (part of one block) or its span is exactly what is wanted."""
    alignment = geometry.alignment
    block = _up(geometry.block_bytes, alignment)
    bounce_cut = min(block, _down(geometry.slot_bytes, alignment))
    first, last = extent.offset, extent.offset + extent.length
    bounced = extent.address % alignment != first % alignment
    inner_first = min(_up(first, alignment), last)
    inner_last = max(_down(last, alignment), inner_first)
    return [
        *_cut(extent, first, inner_first, alignment, alignment, bounced=True),
        *_cut(extent, inner_first, inner_last, bounce_cut if bounced else block, alignment, bounced=bounced),
        *_cut(extent, inner_last, last, alignment, alignment, bounced=True),
    ]


def split_rows(
    extents: Sequence[tuple[int, int, int, int, bool]],
    alignment: int,
    block_bytes: int,
    slot_bytes: int,
    *,
    writing: bool = False,
) -> list[Piece]:
    """What becomes of whole requests, for the tests: the compiled module's `_split`."""
    geometry = Geometry(alignment, block_bytes, slot_bytes)
    cut = split_write if writing else split
    return [piece for extent in merge(Extent(*row) for row in extents) for piece in cut(extent, geometry)]


def _cut(
    extent: Extent, first: int, last: int, unit: int, alignment: int, *, bounced: bool
) -> Iterator[Piece]:
    """Cut [first, last) at multiples of `unit`; each span is its aligned superset."""
    at = first
    while at < last:
        end = min(last, _down(at, unit) + unit)
        span = _down(at, alignment)
        address = extent.address + (at - extent.offset)
        yield Piece(extent.file, at, end - at, address, span, _up(end, alignment) - span, bounced)
        at = end


def _down(value: int, unit: int) -> int:
    return value // unit * unit


def _up(value: int, unit: int) -> int:
    return _down(value + unit - 1, unit)
