"""Where a weight's bytes land inside one region of the pinned pool: pure functions.

O_DIRECT moves bytes only between a file offset and an address that agree modulo the block size, so a
tensor is placed at its file offset's own residue modulo PAGE and can be read, and used, in place:

    region   |<- residue ->|<------ tensor ------>|<- scratch to the page's end ->|

Exactness asks for one thing more. Single-precision BLAS kernels choose their summation order by the
operand's address modulo a vector, so a weight has to stand where the model in memory has it: at the
file's own residue if that maps the file, at a multiple of VECTOR if it was
allocated (fused from several runs), where the live tensor stood if it came from a live module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zinfer.weights.lowering import Placed, Provenance, Run

VECTOR = 64  # bytes: torch's CPU allocator aligns to it, and no vector register is wider
PAGE = 4096  # at least the O_DIRECT alignment of every drive we know (512 or 4096)


@dataclass(frozen=True)
class Piece:
    """`run` goes to byte `at` of the region; `slack`: the page around it is scratch the read may overwrite."""

    run: Run
    at: int
    slack: bool


@dataclass(frozen=True)
class Layout:
    """`nbytes` of region hold every piece; `starts[i]` is where the i-th placed tensor begins."""

    nbytes: int
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]


def round_up(count: int, unit: int = PAGE) -> int:
    """The smallest multiple of `unit` that is at least `count`."""
    return -(-count // unit) * unit


def lay_out(placements: Sequence[Placed], *, allocated: bool = False, unit: int = PAGE) -> Layout:
    """Lay `placements` one after the other, each from a multiple of `unit` plus its residue.

    `allocated`: the model in memory would have allocated them all, none is mapped from the file.
    """
    cursor, pieces, starts = 0, [], []
    for placed in placements:
        start = cursor + _residue(placed, allocated) % unit
        starts.append(start)
        at = start
        for run in placed.runs:
            in_place = at % PAGE == run.offset % PAGE and len(placed.runs) == 1 and unit == PAGE
            pieces.append(Piece(run, at, slack=in_place))
            at += run.length
        cursor = round_up(at, unit)
    return Layout(max(cursor, unit), tuple(pieces), tuple(starts))


def lay_out_apart(layout: Layout, placements: Sequence[Placed], unit: int, *, residues: bool) -> Layout:
    """Where tensors that `layout` places on the host stand on a device: each from a multiple of `unit`.

    With `residues`, plus what its address on the host is modulo VECTOR. `pieces` stay empty: nothing reads into it.
    """
    cursor, starts = 0, []
    for start, placed in zip(layout.starts, placements, strict=True):
        residue = start % VECTOR if residues else 0
        starts.append(cursor + (0 if residue % placed.dtype.itemsize else residue))
        cursor = round_up(starts[-1] + placed.nbytes, unit)
    return Layout(max(cursor, unit), (), tuple(starts))


def _residue(placed: Placed, allocated: bool) -> int:
    """Where in its page the tensor starts: its file's residue if it may keep that, else where copies shift it."""
    first = placed.runs[0].offset if placed.runs else 0
    wanted = first
    if placed.residue is not None:
        wanted = placed.residue
    elif allocated or not placed.mapped:
        wanted = 0
    exact = placed.dtype.itemsize >= 4 and placed.dtype.is_floating_point
    return wanted % VECTOR if exact and (first - wanted) % VECTOR else first % PAGE


def placements_of(provenance: Provenance) -> tuple[Placed, ...]:
    """The tensors that have to be read for `provenance`: itself, or the leaves of its replay."""
    return (provenance,) if isinstance(provenance, Placed) else tuple(p for _, p in provenance.leaves)
