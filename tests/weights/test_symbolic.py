"""Symbolic tensors record what is done to them, say no to what needs bytes, and replay the rest."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from zinfer.errors import CheckpointError
from zinfer.weights.safetensors_header import TensorEntry
from zinfer.weights.symbolic import Apply, Leaf, SymbolicTensor, children, evaluate

CPU = torch.device("cpu")


def symbol(*shape: int, dtype: torch.dtype = torch.float32) -> SymbolicTensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return SymbolicTensor.of(TensorEntry("t", "file", 0, size, dtype, shape))


def replay(result: torch.Tensor, *pairs: tuple[SymbolicTensor, torch.Tensor]) -> torch.Tensor:
    known = {id(symbolic.expression): real for symbolic, real in pairs}
    return evaluate(result.expression, lambda node: known.get(id(node)), CPU)


def test_a_checkpoint_tensor_has_shape_dtype_and_device_and_is_a_leaf():
    tensor = symbol(3, 5, dtype=torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == (
        (3, 5),
        torch.bfloat16,
        CPU,
        (5, 1),
    )
    assert isinstance(tensor.expression, Leaf)
    assert "(3, 5)" in repr(tensor)


def test_an_operator_yields_its_shape_and_remembers_its_operands():
    a, b = symbol(2, 3), symbol(4, 3)
    out = torch.cat([a, b])
    assert isinstance(out, SymbolicTensor)
    assert out.shape == (6, 3)
    assert list(children(out.expression)) == [a.expression, b.expression]


def test_strides_are_those_of_the_real_operator():
    assert symbol(3, 5).T.stride() == (1, 5)
    assert symbol(3, 5)[:, 1:3].stride() == (5, 1)
    assert symbol(3, 5).T.contiguous().stride() == (3, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.zero_(),
        lambda t: t.copy_(torch.zeros(2, 3)),
        lambda t: t.T.mul_(2),
        lambda t: torch.nn.init.normal_(t),
        lambda t: torch.add(torch.zeros(2, 3), 1, out=t),
    ],
    ids=["add_", "zero_", "copy_", "a view's mul_", "init.normal_", "out="],
)
def test_writing_to_a_checkpoint_tensor_is_refused(change):
    with torch.no_grad(), pytest.raises(CheckpointError, match="write into a checkpoint tensor"):
        change(symbol(2, 3))


@pytest.mark.parametrize(
    "ask",
    [lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.masked_select(t > 0)],
    ids=["nonzero", "mask", "masked_select"],
)
def test_a_shape_that_depends_on_values_says_that_none_are_read_at_load(ask):
    with pytest.raises(CheckpointError, match="does not read at load"):
        ask(symbol(2, 3))


@pytest.mark.parametrize("ask", [lambda t: t.sum().item(), lambda t: bool(t.any())], ids=["item", "bool"])
def test_a_value_is_never_invented(ask):
    with pytest.raises((CheckpointError, RuntimeError), match="cannot be called on meta tensors"):
        ask(symbol(2, 3))


@pytest.mark.parametrize("make", [torch.zeros_like, torch.empty_like, lambda t: t.new_zeros(2, 3)])
def test_a_tensor_made_after_the_likeness_of_another_is_a_real_one(make):
    made = make(symbol(2, 3))
    assert (type(made), made.shape, made.device) == (torch.Tensor, (2, 3), CPU)


def test_replay_gives_what_the_operators_give_strides_included():
    a, b = symbol(4, 6), symbol(4, 6)
    real_a, real_b = torch.randn(4, 6), torch.randn(4, 6)

    def convert(x, y):
        return torch.stack([x.T, y.T], dim=1).chunk(2, dim=0)[1].half().transpose(0, 2)

    expected, found = convert(real_a, real_b), replay(convert(a, b), (a, real_a), (b, real_b))
    assert torch.equal(found, expected)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())


def test_replay_starts_from_an_inner_node_that_is_known():
    a = symbol(4, 6)
    inner = a[1:3]
    real = torch.randn(2, 6)
    assert torch.equal(replay((inner + 1) * 2, (inner, real)), (real + 1) * 2)


def test_replay_makes_tensors_on_its_own_device_whatever_was_asked():
    a = symbol(4)
    moved = a.to(device="meta", dtype=torch.float64)
    assert replay(moved, (a, torch.ones(4))).device == CPU


def test_a_shared_node_and_every_output_of_one_call_are_computed_once():
    a = symbol(6, 2)
    calls = []
    left, right = (a * 2).split(3)
    node = left.expression
    assert isinstance(node, Apply)
    counting = Apply(
        lambda *args: calls.append(1) or node.func(*args), node.args, node.kwargs, node.index, node.meta
    )
    other = right.expression
    assert isinstance(other, Apply)
    sibling = Apply(counting.func, other.args, other.kwargs, other.index, other.meta)
    both = SymbolicTensor(counting, counting.meta) - SymbolicTensor(sibling, sibling.meta)
    real = torch.randn(6, 2)

    assert torch.equal(replay(both, (a, real)), 2 * real[:3] - 2 * real[3:])
    assert len(calls) == 1


def test_calls_that_differ_only_in_a_number_stay_apart():
    a, real = symbol(4), torch.randn(4)
    assert torch.equal(replay(a * 1.00001 - a * 1.00002, (a, real)), real * 1.00001 - real * 1.00002)


def test_calls_that_differ_only_in_a_scalar_tensor_stay_apart():
    one, two = torch.tensor(1.00001), torch.tensor(1.00002)  # both print as 1.0000
    a, real = symbol(4), torch.randn(4)
    assert torch.equal(replay(a * one - a * two, (a, real)), real * one - real * two)


def test_a_leaf_that_was_not_read_is_named():
    with pytest.raises(KeyError, match="'t'"):
        replay(symbol(2) + 1)


def test_replay_records_no_autograd_graph():
    a = symbol(2)
    assert not replay(a + 1, (a, torch.ones(2, requires_grad=True))).requires_grad


def test_nothing_of_a_replay_outlives_it_even_without_the_collector():
    a = symbol(8)
    real = torch.randn(8)
    gone = weakref.ref(real)
    gc.collect()
    gc.disable()
    try:
        result = replay((a + 1) * 2, (a, real))
        del real
        assert gone() is None
        assert result.numel() == 8
    finally:
        gc.enable()
