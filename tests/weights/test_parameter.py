"""A streamed parameter answers metadata itself, asks for bytes for operators alone, is never written to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zinfer.errors import BudgetError, OutOfMemoryError, ReadOnlyError, ZinferError
from zinfer.weights.lowering import provenance_of
from zinfer.weights.parameter import StreamedParameter
from zinfer.weights.safetensors_header import TensorEntry
from zinfer.weights.shortage import ShortageError, asked_bytes, ran_out
from zinfer.weights.symbolic import SymbolicTensor
from zinfer.weights.weight import Weight


class CountingSource:
    """A source that holds the bytes and writes down what it is asked for."""

    def __init__(self, real: torch.Tensor) -> None:
        self.real = real
        self.asked: list[Any] = []
        self.ended = 0
        self.fail: Callable[[], None] = lambda: None
        self.relieved: list[str] = []

    def whole(self, weight: Weight) -> torch.Tensor:
        self.asked.append("whole")
        self.fail()
        return self.real

    def rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        self.asked.append(rows)
        return self.real[rows]

    def done(self, weight: Weight) -> None:
        self.ended += 1

    def relieve(self, weight: Weight, words: str) -> None:
        self.relieved.append(words)

    def exhausted(self, weight: Weight, words: str) -> Exception:
        return OutOfMemoryError(f"{weight.name}: again: {words}")


class Streamed:
    """A streamed parameter, its source and the tensor it stands for."""

    def __init__(
        self,
        *shape: int,
        convert: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
        requires_grad: bool = True,
    ) -> None:
        entry = TensorEntry("w", "file", 0, 4 * torch.Size(shape).numel(), torch.float32, shape)
        symbolic = convert(SymbolicTensor.of(entry))
        self.weight = Weight(
            "layer.weight",
            symbolic.shape,
            symbolic.stride(),
            symbolic.dtype,
            provenance_of(symbolic.expression),
            requires_grad=requires_grad,
        )
        self.source = CountingSource(convert(torch.randn(shape)))
        self.parameter = StreamedParameter(self.weight, self.source)

    @property
    def real(self) -> torch.Tensor:
        return self.source.real

    @property
    def asked(self) -> list[Any]:
        return self.source.asked


@pytest.fixture
def streamed() -> Streamed:
    return Streamed(6, 4)


METADATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda t: t.shape,
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
    "layout": lambda t: t.layout,
    "ndim": lambda t: t.ndim,
    "itemsize": lambda t: t.itemsize,
    "nbytes": lambda t: t.nbytes,
    "requires_grad": lambda t: t.requires_grad,
    "is_leaf": lambda t: t.is_leaf,
    "grad": lambda t: t.grad,
    "grad_fn": lambda t: t.grad_fn,
    "is_cpu, is_cuda, is_meta": lambda t: (t.is_cpu, t.is_cuda, t.is_meta),
    "is_sparse, is_quantized, is_nested": lambda t: (t.is_sparse, t.is_quantized, t.is_nested),
    "size": lambda t: (t.size(), t.size(0), t.size(-1)),
    "stride": lambda t: (t.stride(), t.stride(0)),
    "dim": lambda t: (t.dim(), t.ndimension()),
    "numel": lambda t: (t.numel(), t.nelement(), torch.numel(t)),
    "element_size": lambda t: t.element_size(),
    "storage_offset": lambda t: t.storage_offset(),
    "is_contiguous": lambda t: t.is_contiguous(),
    "kind of number": lambda t: (
        t.is_floating_point(),
        torch.is_floating_point(t),
        t.is_complex(),
        t.is_signed(),
    ),
    "get_device": lambda t: t.get_device(),
    "len": len,
    "is_tensor": torch.is_tensor,
    "isinstance": lambda t: (isinstance(t, nn.Parameter), isinstance(t, torch.Tensor)),
    "is_inference": lambda t: t.is_inference(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_source_is_told_when_an_operator_with_the_weight_has_ended(streamed, mode):
    with mode():
        F.linear(torch.ones(1, 4), streamed.parameter)
        assert streamed.source.ended == 1
        F.linear(input=torch.ones(1, 4), weight=streamed.parameter)
    with pytest.raises(RuntimeError):
        F.linear(torch.ones(1, 5), streamed.parameter)
    assert streamed.source.ended == 1  # by keyword, or with an error: it learns at the next use


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("question", METADATA.values(), ids=METADATA)
def test_metadata_is_that_of_a_parameter_in_memory_and_costs_no_read(question, shape):
    streamed = Streamed(*shape)
    assert question(streamed.parameter) == question(nn.Parameter(streamed.real))
    assert streamed.asked == []


def test_a_transposed_weight_reports_its_strides():
    streamed = Streamed(6, 4, convert=lambda t: t.T)
    assert (streamed.parameter.stride(), streamed.parameter.is_contiguous()) == ((1, 4), False)
    assert streamed.asked == []


def test_what_torch_modules_do_with_parameters_costs_no_read(streamed):
    module = nn.Module()
    module.weight = streamed.parameter
    module.eval().requires_grad_(False).zero_grad()
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert module.state_dict()["weight"] is streamed.parameter
    assert sum(p.numel() for p in module.parameters()) == 24
    assert streamed.parameter in {streamed.parameter}
    assert "layer.weight" in repr(streamed.parameter)
    assert streamed.asked == []


def test_detach_and_data_are_the_parameter_itself(streamed):
    assert streamed.parameter.detach() is streamed.parameter
    assert streamed.parameter.data is streamed.parameter
    assert streamed.asked == []


def test_a_deep_copy_shares_the_weight_and_ties_inside_it(streamed):
    module = nn.Module()
    module.first = module.second = streamed.parameter
    twin = copy.deepcopy(module)
    assert twin.first is twin.second
    assert twin.first.weight is streamed.weight
    assert streamed.asked == []


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_the_weights_and_may_be_set(requires_grad):
    streamed = Streamed(6, 4, requires_grad=requires_grad)
    assert streamed.parameter.requires_grad is requires_grad
    streamed.parameter.requires_grad_(not requires_grad)
    assert streamed.parameter.requires_grad is streamed.weight.requires_grad is not requires_grad
    streamed.parameter.requires_grad = requires_grad
    assert streamed.parameter.requires_grad is streamed.weight.requires_grad is requires_grad


# -- operators ------------------------------------------------------------------------------------------

X = torch.randn(3, 4)


def assigned(shape: tuple[int, ...], index: Any, value: torch.Tensor) -> torch.Tensor:
    """A tensor of zeros to whose items `value` was assigned."""
    out = torch.zeros(shape)
    out[index] = value
    return out


OPERATORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "F.linear": lambda w: F.linear(X, w),
    "F.linear by name": lambda w: F.linear(input=X, weight=w),
    "matmul with weight.T": lambda w: X @ w.T,
    "weight.mT": lambda w: X @ w.mT,
    "on the left": lambda w: w @ X.T,
    "on the right of a tensor": lambda w: X[:1] * w,
    "comparison": lambda w: w > 0,
    "inside a list": lambda w: torch.cat([w, X]),
    "inside a nested tuple": lambda w: torch.block_diag(*(w, X)),
    "twice": lambda w: torch.stack([w, w]),
    "einsum": lambda w: torch.einsum("bi,oi->bo", X, w),
    "view": lambda w: w.view(4, 6),
    "float": lambda w: w.double(),
    "to": lambda w: w.to(torch.float16),
    "clone": lambda w: w.clone(),
    "slice": lambda w: w[1:3],
    "column": lambda w: w[:, 2],
    "mask": lambda w: w[w > 0],
    "iteration": lambda w: torch.stack(list(w)),
    "reduction": lambda w: w.sum(dim=0),
    "chunk": lambda w: w.chunk(2)[1],
    "index of a plain tensor": lambda w: X[(w.sum() > 1e9).long()],
    "copied into a tensor": lambda w: torch.empty(6, 4).copy_(w),
    "assigned to all of a tensor": lambda w: assigned((6, 4), ..., w),
    "assigned to an item": lambda w: assigned((3, 6, 4), 1, w),
    "assigned where it is positive": lambda w: assigned((6, 4), w > 0, w[w > 0]),
    "the index of an assignment": lambda w: assigned((6, 4), (torch.arange(6), w.argmax(1)), w[:, 1]),
    "out= of a plain tensor": lambda w: torch.mul(w, 2, out=torch.empty(6, 4)),
    "zeros_like": lambda w: torch.zeros_like(w),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_operator_runs_with_the_real_tensor(streamed, operator, grad):
    with torch.set_grad_enabled(grad):
        found = operator(streamed.parameter)
    assert torch.equal(found, operator(streamed.real))
    assert "whole" in streamed.asked
    assert type(found) is torch.Tensor
    assert not found.requires_grad


def test_a_weight_assigned_to_items_takes_no_gradient_and_the_tensor_keeps_torchs_rules(streamed):
    leaf = torch.zeros(6, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        leaf[...] = streamed.parameter
    computed = leaf * 2
    computed[1:3] = streamed.parameter[1:3]
    computed[4] = streamed.parameter[4]
    computed[...] = streamed.parameter
    assert torch.equal(computed, streamed.real)
    with pytest.raises(ReadOnlyError, match="gradients cannot flow"):
        computed.sum().backward()


def test_a_low_level_operator_runs_with_the_real_tensor(streamed):
    found = torch.ops.aten.mm.default(X, torch.ops.aten.t.default(streamed.parameter))
    assert torch.equal(found, X @ streamed.real.T)


def test_two_streamed_parameters_meet_in_one_operator():
    left, right = Streamed(3, 4), Streamed(5, 4)
    assert torch.equal(left.parameter @ right.parameter.T, left.real @ right.real.T)
    assert (left.asked, right.asked) == (["whole"], ["whole"])


def test_a_resident_weight_is_not_asked_for_again(streamed):
    streamed.weight.resident = streamed.real
    assert torch.equal(F.linear(X, streamed.parameter), F.linear(X, streamed.real))
    assert torch.equal(streamed.parameter[2], streamed.real[2])
    assert torch.equal(F.embedding(torch.tensor([1]), streamed.parameter), streamed.real[[1]])
    assert streamed.asked == []


# -- rows -----------------------------------------------------------------------------------------------


def test_an_embedding_asks_for_each_distinct_row_once_in_order(streamed):
    ids = torch.tensor([[5, 0, 5], [2, 2, 0]])
    assert torch.equal(F.embedding(ids, streamed.parameter), F.embedding(ids, streamed.real))
    assert streamed.asked == [[0, 2, 5]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_either_integer_type_and_by_name_are_looked_up(streamed, dtype):
    ids = torch.tensor([3, 1], dtype=dtype)
    assert torch.equal(F.embedding(input=ids, weight=streamed.parameter), streamed.real[[3, 1]])
    assert streamed.asked == [[1, 3]]


@pytest.mark.parametrize("padding", [0, -1, 3])
def test_a_padding_index_changes_nothing_without_gradients(streamed, padding):
    ids = torch.tensor([3, 0, 5])
    found = F.embedding(ids, streamed.parameter, padding_idx=padding)
    assert torch.equal(found, F.embedding(ids, streamed.real, padding_idx=padding))
    assert torch.equal(F.embedding(ids, streamed.parameter, padding), found)
    assert streamed.asked == [[0, 3, 5]] * 2


def test_an_embedding_module_reads_rows(streamed):
    module = nn.Embedding(6, 4, padding_idx=1)
    module.weight = streamed.parameter
    assert torch.equal(module(torch.tensor([1, 4])), streamed.real[[1, 4]])
    assert streamed.asked == [[1, 4]]


@pytest.mark.parametrize("ids", [[6], [-1], [0, 99], [-7, 2]], ids=str)
def test_an_id_outside_the_table_is_an_index_error_before_any_read(streamed, ids):
    with pytest.raises(IndexError, match=r"outside 0\.\.5"):
        F.embedding(torch.tensor(ids), streamed.parameter)
    assert streamed.asked == []


def test_no_ids_need_no_bytes(streamed):
    found = F.embedding(torch.empty(2, 0, dtype=torch.int64), streamed.parameter)
    assert (found.shape, found.dtype) == ((2, 0, 4), torch.float32)
    assert streamed.asked == []


@pytest.mark.parametrize(
    "index", [0, 5, -1, -6, torch.tensor(3), torch.tensor(-2, dtype=torch.int32)], ids=str
)
def test_an_integer_index_reads_that_row_alone(streamed, index):
    assert torch.equal(streamed.parameter[index], streamed.real[index])
    assert streamed.asked == [[int(index) % 6]]


def test_one_expert_of_a_stack_is_one_slice():
    streamed = Streamed(8, 3, 4)
    assert torch.equal(F.linear(X, streamed.parameter[5]), F.linear(X, streamed.real[5]))
    assert streamed.asked == [[5]]


@pytest.mark.parametrize("index", [6, -7, torch.tensor(6)], ids=str)
def test_an_integer_index_out_of_range_is_torchs_index_error(streamed, index):
    with pytest.raises(IndexError):
        streamed.parameter[index]


def test_a_boolean_index_is_not_a_row(streamed):
    assert torch.equal(streamed.parameter[True], streamed.real[True])
    assert streamed.asked == ["whole"]


def test_a_streamed_index_into_a_plain_tensor_is_read_whole():
    streamed = Streamed(3, convert=lambda t: t.abs().long() % 3, requires_grad=False)
    plain = torch.randn(3, 2)
    assert torch.equal(plain[streamed.parameter], plain[streamed.real])


def test_a_weight_that_is_only_cast_gives_rows_and_a_transposed_one_does_not():
    cast, turned = Streamed(6, 4, convert=lambda t: t.half()), Streamed(4, 6, convert=lambda t: t.T)
    for streamed, asked in ((cast, [[2], [2]]), (turned, ["whole", "whole"])):
        assert torch.equal(streamed.parameter[2], streamed.real[2])
        assert torch.equal(F.embedding(torch.tensor([2]), streamed.parameter), streamed.real[[2]])
        assert streamed.asked == asked


# -- refusals -------------------------------------------------------------------------------------------


def add_in_place(w: torch.Tensor) -> None:
    w += 1


def assign_data(w: torch.Tensor) -> None:
    w.data = torch.zeros(6, 4)


def assign_grad(w: torch.Tensor) -> None:
    w.grad = torch.zeros(6, 4)


def assign_row(w: torch.Tensor) -> None:
    w[0] = 1


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(6, 4)),
    "zero_ of detach": lambda w: w.detach().zero_(),
    "normal_ of data": lambda w: w.data.normal_(),
    "+=": add_in_place,
    "item assignment": assign_row,
    "data assignment": assign_data,
    "grad assignment": assign_grad,
    "torch.relu_": lambda w: torch.relu_(w),
    "F.relu inplace": lambda w: F.relu(w, inplace=True),
    "F.dropout inplace": lambda w: F.dropout(w, inplace=True),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "init.trunc_normal_": lambda w: nn.init.trunc_normal_(w),
    "out=": lambda w: torch.add(torch.zeros(6, 4), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "a low-level write": lambda w: torch.ops.aten.add_.Scalar(w, 1),
    "a low-level out": lambda w: torch.ops.aten.add.out(torch.zeros(6, 4), 1, out=w),
    "F.embedding with max_norm": lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused_and_names_the_weight(streamed, write):
    before = streamed.real.clone()
    with torch.no_grad(), pytest.raises(ReadOnlyError, match=r"'layer\.weight'.*offload='none'"):
        write(streamed.parameter)
    assert torch.equal(streamed.real, before)


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w.data_ptr(),
        lambda w: w.untyped_storage(),
        lambda w: w.numpy(),
        lambda w: w.__dlpack__(),
        lambda w: pickle.dumps(w),
        lambda w: copy.copy(w),
    ],
    ids=["data_ptr", "untyped_storage", "numpy", "dlpack", "pickle", "copy"],
)
def test_asking_for_storage_says_that_there_is_none(streamed, ask):
    with pytest.raises(ZinferError, match=r"'layer\.weight' is streamed"):
        ask(streamed.parameter)
    assert streamed.asked == []


# Memory that runs out


def failing(times: int, error: Exception) -> Callable[[], None]:
    left = [error] * times

    def fail() -> None:
        if left:
            raise left.pop()

    return fail


def test_an_operator_that_ran_out_of_memory_runs_once_more_after_some_was_given_back(streamed):
    streamed.source.fail = failing(1, torch.OutOfMemoryError("Tried to allocate 7 bytes"))
    x = torch.randn(3, 4)
    assert torch.equal(F.linear(x, streamed.parameter), F.linear(x, streamed.real))
    assert streamed.source.relieved == ["Tried to allocate 7 bytes"]
    assert streamed.asked == ["whole", "whole"]


def test_it_runs_no_third_time(streamed):
    streamed.source.fail = failing(3, torch.OutOfMemoryError("Tried to allocate 7 bytes"))
    with pytest.raises(OutOfMemoryError, match="again") as caught:
        F.linear(torch.randn(3, 4), streamed.parameter)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert streamed.asked == ["whole", "whole"]
    assert len(streamed.source.relieved) == 1


def test_an_operator_that_slips_past_python_runs_once_more_too(streamed):
    streamed.source.fail = failing(1, torch.OutOfMemoryError())
    with torch._C.DisableTorchFunctionSubclass():
        out = torch.mm(torch.ones(1, 6), streamed.parameter)
    assert torch.equal(out, torch.mm(torch.ones(1, 6), streamed.real))
    assert len(streamed.source.relieved) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda into, w: into.add_(w),
        lambda into, w: into.__iadd__(w),
        lambda into, w: torch.add(into, w, out=into),
        lambda into, w: torch.ops.aten.add_.Tensor(into, w),
    ],
)
def test_what_changes_its_input_is_not_repeated(streamed, write):
    streamed.source.fail = failing(1, torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        write(torch.zeros(6, 4), streamed.parameter)
    assert streamed.source.relieved == []


def test_an_error_of_another_kind_is_raised_as_it_is(streamed):
    streamed.source.fail = failing(1, RuntimeError("no such kernel"))
    with pytest.raises(RuntimeError, match="no such kernel"):
        F.linear(torch.randn(3, 4), streamed.parameter)
    assert streamed.source.relieved == []


@pytest.mark.parametrize(
    ("words", "nbytes"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", 5 << 29),
        ("HIP out of memory. Tried to allocate 20.00 MiB (GPU", 20 << 20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes. Error code 12", 1000),
        ("CUDA error: out of memory", None),
    ],
)
def test_torch_says_how_much_was_missing(words, nbytes):
    assert asked_bytes(words) == nbytes


def test_what_counts_as_a_shortage_that_nobody_has_done_anything_about():
    assert not ran_out(ShortageError("memory ran out"))
    assert ran_out(OutOfMemoryError("the device has no more"))
    assert not ran_out(BudgetError("too little"))
    assert ran_out(torch.OutOfMemoryError("no more"))
    assert not ran_out(MemoryError())
