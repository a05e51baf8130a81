"""Whatever moves bytes lowers to runs that hold exactly torch's bytes; the rest replays to torch's tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from zinfer.weights import lowering
from zinfer.weights.lowering import (
    Placed,
    Replayed,
    Run,
    describe,
    lower,
    merge,
    provenance_of,
    rows_of,
    take,
)
from zinfer.weights.safetensors_header import TensorEntry, read_header
from zinfer.weights.symbolic import Leaf, SymbolicTensor, evaluate
from zinfer.weights.weight import Weight

SHAPES = [(4, 6), (6, 4), (4, 6), (12,), (2, 3, 4), (2, 3, 4), (1, 8), (3, 1, 2), (0, 4), ()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@dataclass(frozen=True)
class Pair:
    """The same tensor twice: without bytes and with."""

    symbolic: torch.Tensor
    real: torch.Tensor


class Files:
    """One safetensors file of small random tensors."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"{index}.{dtype}": (torch.randn(shape, generator=generator) * 50).abs().to(dtype)
            for dtype in DTYPES
            for index, shape in enumerate(SHAPES)
        }
        save_file(tensors, self.path)
        self.raw = Path(self.path).read_bytes()
        self.entries = read_header(self.path)
        self.tensors = load_file(self.path)

    def pair(self, name: str) -> Pair:
        return Pair(SymbolicTensor.of(self.entries[name]), self.tensors[name])

    def read(self, runs: Any) -> bytes:
        assert all(run.path == self.path for run in runs)
        return b"".join(self.raw[run.offset : run.offset + run.length] for run in runs)

    def value(self, placed: Placed) -> torch.Tensor:
        data = self.read(placed.runs)
        assert len(data) == placed.nbytes
        if not data:
            return torch.empty(placed.shape, dtype=placed.dtype)
        return torch.frombuffer(bytearray(data), dtype=placed.dtype).view(placed.shape)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("lowering"))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of `tensor`."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return bytes(flat.view(torch.uint8).numpy())


# -- random expressions ---------------------------------------------------------------------------------


def one_of_dims(draw: Any, tensor: torch.Tensor) -> int:
    return draw(st.integers(-tensor.dim(), tensor.dim() - 1))


def split_sizes(draw: Any, count: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=2)))
    return [high - low for low, high in zip([0, *cuts], [*cuts, count], strict=True)]


def draw_operator(draw: Any, tensor: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """Some operator of one operand, with arguments that suit `tensor`."""
    names = ["alias", "detach", "clone", "contiguous", "flatten", "unsqueeze", "cast", "same cast", "scale"]
    if tensor.dim():
        names += [
            "slice",
            "slice",
            "step",
            "split",
            "sizes",
            "chunk",
            "unbind",
            "select",
            "narrow",
            "squeeze",
        ]
        names += ["transpose", "reshape", "roll"]
    if (
        tensor.is_contiguous()
        and tensor.dim()
        and tensor.stride(-1) == 1
        and tensor.shape[-1]
        and tensor.dtype.itemsize > 1
    ):
        names.append("as bytes")
    name = draw(st.sampled_from(names))
    if name in ("alias", "detach"):
        return torch.detach if name == "detach" else torch.ops.aten.alias
    if name == "clone":
        return torch.clone
    if name == "contiguous":
        return lambda t: t.contiguous()
    if name == "flatten":
        return torch.flatten
    if name == "unsqueeze":
        where = draw(st.integers(-tensor.dim() - 1, tensor.dim()))
        return lambda t: t.unsqueeze(where)
    if name == "cast":
        dtype = draw(st.sampled_from(DTYPES))
        return lambda t: t.to(dtype)
    if name == "same cast":
        return lambda t: t.to(t.dtype, copy=True)
    if name == "scale":
        return lambda t: t * 2
    if name == "as bytes":
        return lambda t: t.view(torch.uint8)
    dim = one_of_dims(draw, tensor)
    count = tensor.shape[dim]
    if name == "squeeze":
        return lambda t: t.squeeze(dim)
    if name == "transpose":
        other = one_of_dims(draw, tensor)
        return lambda t: t.transpose(dim, other)
    if name == "roll":
        return lambda t: t.roll(1, dim)
    if name == "reshape":
        shape = draw(st.permutations(tensor.shape))
        return lambda t: t.reshape(shape)
    if name == "chunk":
        pieces = draw(st.integers(1, 4))
        return lambda t: t.chunk(pieces, dim)
    if name == "sizes":
        sizes = split_sizes(draw, count)
        return lambda t: torch.split(t, sizes, dim)
    if not count:
        return torch.clone
    if name in ("slice", "step"):
        bound = st.none() | st.integers(-count - 1, count + 1)
        start, stop = draw(bound), draw(bound)
        step = 1 if name == "slice" else draw(st.integers(1, 3))
        index = (slice(None),) * (dim % tensor.dim()) + (slice(start, stop, step),)
        return lambda t: t[index]
    if name == "split":
        size = draw(st.integers(1, count))
        return lambda t: t.split(size, dim)
    if name == "unbind":
        return lambda t: t.unbind(dim)
    if name == "select":
        at = draw(st.integers(-count, count - 1))
        return lambda t: t.select(dim, at)
    assert name == "narrow"
    start = draw(st.integers(-count, count - 1))
    length = draw(st.integers(0, count - start % count))
    return lambda t: t.narrow(dim, start, length)


def join(draw: Any, pool: list[Pair], pair: Pair) -> Pair:
    """`pair` and its like in the pool, stacked or concatenated; dtypes may differ."""
    shape = pair.real.shape
    kind = draw(st.sampled_from(("cat", "stack") if shape else ("stack",)))
    if kind == "stack":
        alike = [other for other in pool if other.real.shape == shape]
        dim = draw(st.integers(-len(shape) - 1, len(shape)))
        function = torch.stack
    else:
        dim = one_of_dims(draw, pair.real)
        fixed = lambda t: (t.dim(), *(n for i, n in enumerate(t.shape) if i != dim % t.dim()))  # noqa: E731
        alike = [other for other in pool if other.real.dim() and fixed(other.real) == fixed(pair.real)]
        alike += [other for other in pool if other.real.shape == (0,)]  # cat skips them, whatever their rank
        function = torch.cat
    operands = draw(st.lists(st.sampled_from([*alike, pair]), min_size=1, max_size=3))
    operands.insert(draw(st.integers(0, len(operands))), pair)
    return Pair(function([p.symbolic for p in operands], dim), function([p.real for p in operands], dim))


def expressions(draw: Any, files: Files) -> Pair:
    """The last of a few random steps, each applied to checkpoint tensors or to earlier results."""
    names = draw(st.lists(st.sampled_from(sorted(files.entries)), min_size=1, max_size=4))
    pool = [files.pair(name) for name in names]
    for _ in range(draw(st.integers(1, 6))):
        pair = pool[-1] if draw(st.booleans()) else draw(st.sampled_from(pool))
        if draw(st.integers(0, 2)) == 0:
            pool.append(join(draw, pool, pair))
            continue
        operator = draw_operator(draw, pair.real)
        symbolic, real = operator(pair.symbolic), operator(pair.real)
        if isinstance(real, torch.Tensor):
            pool.append(Pair(symbolic, real))
        elif real:
            picked = draw(st.integers(0, len(real) - 1))
            pool.append(Pair(symbolic[picked], real[picked]))
    return pool[-1]


def strides(tensor: torch.Tensor) -> list[int]:
    """Strides that lead anywhere: not those of a dimension of one element, nor of an empty tensor."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1] if tensor.numel() else []


def assert_same(found: torch.Tensor, real: torch.Tensor) -> None:
    assert (found.shape, found.dtype, strides(found)) == (real.shape, real.dtype, strides(real))
    assert raw_bytes(found) == raw_bytes(real)


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_runs_of_any_expression_that_lowers_hold_the_bytes_torch_gives(files, data):
    pair = expressions(data.draw, files)
    runs = lower(pair.symbolic.expression)
    if runs is not None:
        assert files.read(runs) == raw_bytes(pair.real)
        assert files.read(merge(runs)) == raw_bytes(pair.real)


@pytest.mark.parametrize("min_mean_run", [1, lowering.MIN_MEAN_RUN])
@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data())
def test_placed_or_replayed_the_value_is_torchs_strides_included(files, min_mean_run, data):
    pair = expressions(data.draw, files)
    assert pair.symbolic.stride() == pair.real.stride()
    with mock.patch.object(lowering, "MIN_MEAN_RUN", min_mean_run):
        provenance = provenance_of(pair.symbolic.expression)
    if isinstance(provenance, Placed):
        found = files.value(provenance)
    else:
        leaves = {id(node): files.value(placed) for node, placed in provenance.leaves}
        assert len(leaves) == len(provenance.leaves)
        found = evaluate(provenance.expression, lambda node: leaves.get(id(node)), torch.device("cpu"))
    assert_same(found, pair.real)


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_rows_read_alone_are_the_rows_of_the_whole(files, data):
    pair = expressions(data.draw, files)
    with mock.patch.object(lowering, "MIN_MEAN_RUN", 1):
        weight = weight_of(pair.symbolic)
    source = weight.row_source
    if source is None or not pair.real.dim() or not pair.real.numel():
        return
    rows = sorted(data.draw(st.sets(st.integers(0, pair.real.shape[0] - 1), min_size=1)))
    stored = torch.frombuffer(bytearray(files.read(rows_of(source, rows))), dtype=source.dtype)
    found = stored.view(len(rows), *pair.real.shape[1:]).to(weight.dtype)
    assert raw_bytes(found) == raw_bytes(pair.real[rows])


# -- the cases that models need, by name ----------------------------------------------------------------


def leaf(*shape: int, offset: int = 0, path: str = "a", dtype: torch.dtype = torch.float32) -> SymbolicTensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return SymbolicTensor.of(TensorEntry("t", path, offset, size, dtype, shape))


def weight_of(tensor: torch.Tensor) -> Weight:
    return Weight("w", tensor.shape, tensor.stride(), tensor.dtype, provenance_of(tensor.expression))


def runs_of(tensor: torch.Tensor) -> tuple[Run, ...]:
    provenance = provenance_of(tensor.expression)
    assert isinstance(provenance, Placed)
    return provenance.runs


def test_a_checkpoint_tensor_is_one_run():
    assert runs_of(leaf(64, 64, offset=100)) == (Run("a", 100, 16384),)


def test_fused_experts_interleave_gate_and_up_slice_by_slice():
    gates = [leaf(32, 64, offset=i * 8192, path="gate") for i in range(2)]
    ups = [leaf(32, 64, offset=i * 8192, path="up") for i in range(2)]
    fused = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
    assert runs_of(fused) == (
        Run("gate", 0, 8192),
        Run("up", 0, 8192),
        Run("gate", 8192, 8192),
        Run("up", 8192, 8192),
    )


def test_joining_neighbours_in_the_file_is_one_run():
    assert runs_of(torch.cat([leaf(64, 64), leaf(64, 64, offset=16384)])) == (Run("a", 0, 32768),)


def test_a_split_of_a_fused_projection_is_one_run_each():
    query, key = leaf(96, 64).split([64, 32])
    assert runs_of(query) == (Run("a", 0, 16384),)
    assert runs_of(key) == (Run("a", 16384, 8192),)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.T,
        lambda t: t.T.contiguous(),
        lambda t: t.half(),
        lambda t: t * 2,
        lambda t: t[:, :32],
        lambda t: t[::2],
        lambda t: t.flip(0),
        lambda t: t.expand(2, 64, 64),
        lambda t: torch.cat([t, t.half()]),
        lambda t: torch.stack([t.half(), t]),
    ],
    ids=[
        "a view",
        "transpose",
        "cast",
        "arithmetic",
        "strided",
        "step",
        "flip",
        "expand",
        "promoting cat",
        "promoting stack",
    ],
)
def test_what_changes_bytes_or_their_order_is_replayed_from_whole_leaves(convert):
    provenance = provenance_of(convert(leaf(64, 64)).expression)
    assert isinstance(provenance, Replayed)
    assert [placed.runs for _, placed in provenance.leaves] == [(Run("a", 0, 16384),)]


def test_a_replay_reads_only_the_part_it_needs():
    provenance = provenance_of(leaf(128, 64)[64:].half().expression)
    assert isinstance(provenance, Replayed)
    assert [placed.runs for _, placed in provenance.leaves] == [(Run("a", 64 * 256, 64 * 256),)]


def test_a_scatter_of_tiny_reads_is_replayed_instead():
    columns = torch.cat([leaf(64, 4), leaf(64, 4, path="b")], dim=1)
    assert lower(columns.expression) is not None
    assert isinstance(provenance_of(columns.expression), Replayed)


def test_an_interleave_of_single_elements_does_not_take_time_or_memory_for_each():
    big = leaf(4096, 4096)
    started = time.perf_counter()
    for interleaved in (torch.stack([big, big], dim=-1), torch.stack(big.unbind(1)[:4], dim=-1)):
        assert isinstance(provenance_of(interleaved.expression), Replayed)
    assert time.perf_counter() - started < 2.0


def test_an_empty_operand_of_another_rank_adds_nothing_wherever_it_stands():
    nothing, full = leaf(0), leaf(64, 64)
    for operands in ([nothing, full, full], [full, nothing, full], [full, full, nothing]):
        joined = torch.cat(operands, dim=1)
        assert sum(run.length for run in lower(joined.expression) or []) == 2 * 16384


def test_rows_come_from_the_placement_or_from_what_a_cast_reads():
    assert weight_of(leaf(64, 64)).row_source == weight_of(leaf(64, 64)).placed
    assert weight_of(leaf(64, 64).half()).row_source == weight_of(leaf(64, 64)).placed
    assert weight_of(leaf(64, 64).half().detach()).row_source is not None


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.T.half(),
        lambda t: t.T.contiguous().half(),
        lambda t: t.half().float(),
        lambda t: (t * 2).half(),
    ],
    ids=["transposed", "transposed copy", "cast twice", "scaled"],
)
def test_rows_of_a_square_weight_that_is_more_than_cast_are_not_taken_from_the_file(convert):
    assert weight_of(convert(leaf(64, 64))).row_source is None


def test_a_description_tells_kind_reads_and_bytes():
    assert describe(provenance_of(leaf(64, 64).expression)) == {"kind": "placed", "runs": 1, "bytes": 16384}
    assert describe(provenance_of(leaf(64, 64).half().expression)) == {
        "kind": "replayed",
        "runs": 1,
        "bytes": 16384,
    }


# -- runs -----------------------------------------------------------------------------------------------

FILE = {path: bytes((i * step) % 251 for i in range(200)) for path, step in (("a", 1), ("b", 7))}


def bytes_of(runs: Any) -> bytes:
    return b"".join(FILE[run.path][run.offset : run.offset + run.length] for run in runs)


run_lists = st.lists(
    st.builds(Run, st.sampled_from("ab"), st.integers(0, 150), st.integers(0, 50)), max_size=6
)


@given(run_lists)
def test_merging_keeps_the_bytes_and_leaves_no_neighbours_and_no_empty_runs(runs):
    merged = merge(runs)
    assert bytes_of(merged) == bytes_of(runs)
    assert all(run.length for run in merged)
    for first, second in pairwise(merged):
        assert (first.path, first.offset + first.length) != (second.path, second.offset)


@given(run_lists, st.data())
def test_taking_blocks_is_slicing_the_joined_bytes(runs, data):
    whole = bytes_of(runs)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    blocks = [(low, high - low) for low, high in pairwise_apart(cuts)]
    assert bytes_of(take(runs, blocks)) == b"".join(whole[start : start + n] for start, n in blocks)


def pairwise_apart(cuts: list[int]) -> Iterator[tuple[int, int]]:
    return zip(cuts[::2], cuts[1::2], strict=False)


def test_taking_past_the_end_is_an_error_not_a_short_answer():
    with pytest.raises(ValueError, match="past the runs, which hold 10 bytes"):
        take([Run("a", 0, 10)], [(8, 3)])


def test_rows_are_cut_out_of_scattered_runs():
    placed = Placed((Run("a", 0, 6), Run("b", 10, 10)), (4, 4), torch.uint8)
    assert rows_of(placed, [0, 1, 3]) == [Run("a", 0, 4), Run("a", 4, 2), Run("b", 10, 2), Run("b", 16, 4)]


def test_leaves_are_found_once_even_where_they_are_used_twice():
    base = leaf(64, 64)
    provenance = provenance_of((base * base + base[:1]).expression)
    assert isinstance(provenance, Replayed)
    nodes = [node for node, _ in provenance.leaves]
    assert len(nodes) == len({id(node) for node in nodes}) == 2
    assert sum(isinstance(node, Leaf) for node in nodes) == 1
