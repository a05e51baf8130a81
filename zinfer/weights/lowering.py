"""Turn expressions that only move bytes into placement: pure functions on plain data.

A placement is a list of runs in destination order; laid end to end they are the row-major tensor.
Views, stack, cat, split and slices lower; anything that changes bytes or order inside a row does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from zinfer.weights.symbolic import Apply, Expression, Leaf, children

aten = torch.ops.aten

MIN_MEAN_RUN = 4096  # bytes; below this a scatter of tiny reads is slower than replaying the operators
MAX_TINY_BLOCKS = 1 << 16  # more blocks below MIN_MEAN_RUN are not even listed: each costs microseconds

_RESHAPES = {
    aten.alias,
    aten.detach,
    aten.view,
    aten._unsafe_view,
    aten.unsqueeze,
    aten.squeeze,
    aten.lift_fresh,
}
_SAME_BYTES = _RESHAPES | {aten.clone, aten.contiguous}
_VIEWS = _RESHAPES | {aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes, aten.unbind}


@dataclass(frozen=True)
class Run:
    """`length` bytes at `offset` of the file `path`."""

    path: str
    offset: int
    length: int


Runs = list[Run]


@dataclass(frozen=True)
class Placed:
    """A tensor whose bytes are `runs`, end to end.

    `mapped`: the model in memory has it as a view of the mapped file; False where it was allocated
    (fused, copied), even if its bytes happen to be adjacent in the file. `residue`: where, modulo VECTOR, the
    live tensor stood that these bytes were written from. See layout.py for why it matters.
    """

    runs: tuple[Run, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    mapped: bool = True
    residue: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Replayed:
    """A tensor made by replaying `expression` over `leaves`, each a placed sub-expression."""

    expression: Expression
    leaves: tuple[tuple[Expression, Placed], ...]


Provenance = Placed | Replayed


def provenance_of(expression: Expression) -> Provenance:
    """How to obtain the value of `expression`: by placement where possible, else by replay."""
    if placed := _placed(expression):
        return placed
    return Replayed(expression, tuple(_maximal_leaves(expression)))


def _maximal_leaves(expression: Expression) -> Iterator[tuple[Expression, Placed]]:
    """The largest sub-expressions below `expression` that lower, each once."""
    seen: set[int] = set()
    stack = [expression]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        placed = None if node is expression else _placed(node)
        if placed is None and isinstance(node, Leaf):
            placed = _place_leaf(node)
        if placed is not None:
            yield node, placed
        elif isinstance(node, Apply):
            stack.extend(children(node))


def _place_leaf(leaf: Leaf) -> Placed:
    entry = leaf.entry
    run = Run(entry.path, entry.offset, entry.length)
    return Placed((run,), entry.shape, entry.dtype, residue=leaf.residue)


def _placed(expression: Expression) -> Placed | None:
    if isinstance(expression, Leaf):
        return _place_leaf(expression)
    if not expression.meta.is_contiguous():
        return None  # the model would hold a strided view; a kernel might take another path for it
    runs = lower(expression)
    if runs is None:
        return None
    merged = merge(runs)
    if len(merged) > 1 and sum(run.length for run in merged) < MIN_MEAN_RUN * len(merged):
        return None
    return Placed(tuple(merged), tuple(expression.meta.shape), expression.meta.dtype, _is_view(expression))


def _is_view(expression: Expression) -> bool:
    """Whether torch makes `expression` without copying its leaf."""
    while isinstance(expression, Apply):
        if expression.func.overloadpacket not in _VIEWS:
            return False
        expression = expression.args[0]
    return True


def lower(expression: Expression) -> Runs | None:
    """The runs of `expression` in row-major order, or None where bytes have to be computed."""
    if isinstance(expression, Leaf):
        return list(_place_leaf(expression).runs)
    func, args, kwargs = expression.func.overloadpacket, expression.args, expression.kwargs
    source = args[0]
    if func in _SAME_BYTES or (func is aten._to_copy and _dtype(source) == expression.meta.dtype):
        return lower(source)
    if func in (aten.cat, aten.stack):
        if any(_dtype(part) != expression.meta.dtype for part in source):
            return None  # torch promotes the operands
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return _cat(source, dim % expression.meta.dim())
    span = _span(expression)
    return None if span is None else _cut(source, *span)


def _span(expression: Apply) -> tuple[int, int, int] | None:
    """(dim, start, length) when `expression` takes a contiguous part of its operand along one dim."""
    func, args = expression.func.overloadpacket, expression.args
    shape = _shape(args[0])
    named = {**dict(zip(("input", "p1", "p2", "p3", "p4"), args, strict=False)), **expression.kwargs}
    if func is aten.slice:
        dim = named.get("p1", named.get("dim", 0)) % len(shape)
        start, end = named.get("p2", named.get("start")), named.get("p3", named.get("end"))
        if named.get("p4", named.get("step", 1)) != 1:
            return None
        begin, stop, _ = slice(start, end).indices(shape[dim])
        return dim, begin, max(0, stop - begin)
    if func is aten.select:
        dim = args[1] % len(shape)
        return dim, args[2] % shape[dim], 1
    if func is aten.narrow:
        return args[1] % len(shape), args[2], args[3]
    index = expression.index
    if index is None:
        return None
    dim = named.get("p2", named.get("dim", 0)) % len(shape)
    if func is aten.split:
        size = args[1]
        return dim, index * size, min(size, shape[dim] - index * size)
    if func is aten.split_with_sizes:
        return dim, sum(args[1][:index]), args[1][index]
    if func is aten.unbind:
        return (args[1] if len(args) > 1 else 0) % len(shape), index, 1
    return None


def _shape(expression: Expression) -> tuple[int, ...]:
    return expression.entry.shape if isinstance(expression, Leaf) else tuple(expression.meta.shape)


def _dtype(expression: Expression) -> torch.dtype:
    return expression.entry.dtype if isinstance(expression, Leaf) else expression.meta.dtype


def _cut(source: Expression, dim: int, start: int, length: int) -> Runs | None:
    runs = lower(source)
    if runs is None:
        return None
    shape = _shape(source)
    inner = prod(shape[dim + 1 :]) * _dtype(source).itemsize
    stride = shape[dim] * inner
    if _too_fine(prod(shape[:dim]), length * inner):
        return None
    blocks = ((outer * stride + start * inner, length * inner) for outer in range(prod(shape[:dim])))
    return take(runs, blocks)


def _cat(sources: Iterable[Expression], dim: int) -> Runs | None:
    """Join along `dim`; for stack every operand counts as one slice of the new dim, so shapes agree."""
    parts: list[tuple[Runs, int]] = []
    outer = 1
    for source in sources:
        if not prod(_shape(source)):
            continue  # adds nothing, and may be of another rank
        runs = lower(source)
        if runs is None:
            return None
        outer = prod(_shape(source)[:dim])
        block = sum(run.length for run in runs) // outer
        if _too_fine(outer, block):
            return None
        parts.append((runs, block))
    if outer == 1:
        return [run for runs, _ in parts for run in runs]
    sliced = [take(runs, ((i * block, block) for i in range(outer))) for runs, block in parts]
    flat: list[Run] = []
    cursors = [iter(_regroup(runs, block)) for runs, (_, block) in zip(sliced, parts, strict=True)]
    for _ in range(outer):
        for cursor in cursors:
            flat.extend(next(cursor))
    return flat


def _too_fine(blocks: int, nbytes: int) -> bool:
    return blocks > MAX_TINY_BLOCKS and nbytes < MIN_MEAN_RUN


def _regroup(runs: Runs, block: int) -> Iterator[Runs]:
    """Split `runs` into groups of exactly `block` bytes (take() already cut them at those bounds)."""
    group, size = [], 0
    for run in runs:
        group.append(run)
        size += run.length
        if size == block:
            yield group
            group, size = [], 0


def take(runs: Iterable[Run], blocks: Iterable[tuple[int, int]]) -> Runs:
    """The bytes of ascending, disjoint `blocks` (start, length) of the tensor that `runs` make up."""
    out: Runs = []
    cursor = iter(runs)
    run = next(cursor, None)
    base = 0  # position of `run` in the tensor
    for start, length in blocks:
        while length:
            while run is not None and base + run.length <= start:
                base += run.length
                run = next(cursor, None)
            if run is None:
                raise ValueError(f"block at {start} ends past the runs, which hold {base} bytes")
            size = min(length, base + run.length - start)
            out.append(Run(run.path, run.offset + start - base, size))
            start, length = start + size, length - size
    return out


def merge(runs: Iterable[Run]) -> Runs:
    """Join neighbours that are adjacent in the same file; drop empty runs."""
    out: Runs = []
    for run in runs:
        last = out[-1] if out else None
        if not run.length:
            continue
        if last and last.path == run.path and last.offset + last.length == run.offset:
            out[-1] = Run(run.path, last.offset, last.length + run.length)
        else:
            out.append(run)
    return out


def rows_of(placed: Placed, rows: Iterable[int]) -> Runs:
    """Runs of the given ascending, distinct indices along the first dimension, one after the other."""
    row = placed.nbytes // placed.shape[0]
    return take(placed.runs, ((index * row, row) for index in rows))


def describe(provenance: Provenance) -> dict[str, Any]:
    """Plain data for reports: kind, number of reads, bytes."""
    if isinstance(provenance, Placed):
        return {"kind": "placed", "runs": len(provenance.runs), "bytes": provenance.nbytes}
    leaves = [placed for _, placed in provenance.leaves]
    return {
        "kind": "replayed",
        "runs": sum(len(placed.runs) for placed in leaves),
        "bytes": sum(placed.nbytes for placed in leaves),
    }
