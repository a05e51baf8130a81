"""Streamed parameters: nn.Parameters with shape, dtype and device but no bytes.

Any torch operator that touches one runs with the real tensor instead. `__torch_function__` sees calls
made from Python, `__torch_dispatch__` what slips past it (`weight.T`, scripted code). What an operator
needs in full comes from `source.whole`; a lookup of rows (F.embedding, `weight[i]`) from `source.rows`, unless
the weight is to stay: then `source.settled` brings all of it, once. Where memory runs out in an operator, the source
gives some back, and it runs once more.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from zinfer.errors import ReadOnlyError, ZinferError
from zinfer.weights.shortage import ran_out
from zinfer.weights.weight import Weight

CPU = torch.device("cpu")


class WeightSource(Protocol):
    """What a streamed parameter asks for its bytes; the coordinator implements it."""

    def whole(self, weight: Weight) -> torch.Tensor:
        """The tensor of `weight`. It stays valid as long as it, or a view of it, is referenced."""
        ...

    def rows(self, weight: Weight, rows: list[int]) -> torch.Tensor:
        """Rows `rows` (ascending, distinct) along the first dimension, stacked; of several, perhaps all there are."""
        ...

    def settled(self, weight: Weight) -> torch.Tensor | None:
        """The tensor of `weight`, if it is to stay and can come to do so now; None: ask for rows."""
        ...

    def done(self, weight: Weight) -> None:
        """Told when the operator that asked for all of `weight` has ended."""
        ...

    def relieve(self, weight: Weight, words: str) -> None:
        """Give memory back: it ran out, as `words` say, in an operator that takes `weight` and will run once more."""
        ...

    def exhausted(self, weight: Weight, words: str) -> Exception:
        """What to raise where memory ran out again then."""
        ...


class StreamedParameter(torch.Tensor):
    """See the module's docstring. Read-only; deep copies share the weight.

    `requires_grad` says what the parameter in memory would say, because torch chooses kernels by it (matmul
    folds a batch when the weight requires grad); but operators run without autograd: nothing trains.
    """

    weight: Weight
    source: WeightSource
    _is_param: bool

    @staticmethod
    def __new__(
        cls: type[StreamedParameter], weight: Weight, source: WeightSource, device: torch.device = CPU
    ) -> StreamedParameter:
        """A parameter that stands for `weight` and gets its bytes, on `device`, from `source`."""
        parameter: StreamedParameter = torch.Tensor._make_wrapper_subclass(
            cls,
            weight.shape,
            strides=weight.stride,
            dtype=weight.dtype,
            device=device,
            requires_grad=weight.requires_grad,
        )
        parameter.weight = weight
        parameter.source = source
        parameter._is_param = True  # what isinstance(p, nn.Parameter) looks at
        return parameter

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        weight = self.weight
        return f"StreamedParameter({weight.name!r}, {list(weight.shape)}, {weight.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedParameter:
        return memo.setdefault(id(self), StreamedParameter(self.weight, self.source, self.device))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ZinferError(
            f"{self.weight.name!r} is streamed and has no bytes to pickle or save; its bytes are in the "
            "checkpoint it came from"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return _run(func, args, kwargs or {})
        except BaseException as error:
            # Whoever keeps the error (a notebook keeps the last one) must not keep weights in the window with it.
            traceback.clear_frames(error.__traceback__)
            parameter = _repeatable(func, args, kwargs or {}) if ran_out(error) else None
            if parameter is None:
                raise
            return _once_more(_run, func, args, kwargs or {}, parameter, str(error))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return _dispatch(func, args, kwargs or {})
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            parameter = _repeatable(func, args, kwargs or {}) if ran_out(error) else None
            if parameter is None:
                raise
            return _once_more(_dispatch, func, args, kwargs or {}, parameter, str(error))


def _repeatable(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StreamedParameter | None:
    """A streamed parameter that `func` takes, if it can run twice: if it changes none of what it is given."""
    name = getattr(func, "__name__", "").partition(".")[0]
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
    if in_place or kwargs.get("inplace") or kwargs.get("out") is not None:
        return None
    return next((leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is StreamedParameter), None)


def _once_more(
    run: Callable[..., Any],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameter: StreamedParameter,
    words: str,
) -> Any:
    """`run` what memory ran out for, after some was given back. What it held is gone: its frames were cleared."""
    parameter.source.relieve(parameter.weight, words)
    try:
        return run(func, args, kwargs)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        if not ran_out(error):
            raise
        raise parameter.source.exhausted(parameter.weight, str(error)) from error


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func`, called from Python, with the real tensors."""
    handler = _HANDLERS.get(func)
    if handler is not None:
        return handler(func, args, kwargs)
    name = getattr(func, "__name__", "").partition(".")[0]  # an ATen overload is called "add_.Scalar"
    if kwargs or (name.endswith("_") and not name.endswith("__")):
        _refuse_to_write(name, args, kwargs)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return _without_autocast_cache(func, args, kwargs)
    if not kwargs and not torch.is_grad_enabled():
        out = func(*_real(args))
        _ended(args)
        return out
    trained = _input_that_requires_grad(args) if torch.is_grad_enabled() else None
    with torch.no_grad():
        out = func(*_real(args), **{key: _real(value) for key, value in kwargs.items()})
    _ended(args)
    return NoGradient.apply(trained, out) if trained is not None and isinstance(out, torch.Tensor) else out


def _without_autocast_cache(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As _run, under autocast: its cache would hold every weight, and so its region, until the context ends."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            return func(*_real(args), **{key: _real(value) for key, value in kwargs.items()})
    finally:
        torch.set_autocast_cache_enabled(cached)


class NoGradient(torch.autograd.Function):
    """Passes the result of an operator on, and refuses the backward pass that would skip a streamed weight."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out`, as if computed from `source`."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raises ReadOnlyError."""
        raise ReadOnlyError(
            "gradients cannot flow through streamed weights; load with offload='none' to train"
        )


def _input_that_requires_grad(args: tuple[Any, ...]) -> torch.Tensor | None:
    for value in args:
        if (
            isinstance(value, torch.Tensor)
            and not isinstance(value, torch.nn.Parameter)
            and value.requires_grad
        ):
            return value
    return None


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func`, an ATen operator, with the real tensors."""
    if func._schema.is_mutable:
        values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        for argument in func._schema.arguments:
            value = values.get(argument.name, kwargs.get(argument.name))
            if argument.is_write and isinstance(value, StreamedParameter):
                raise _read_only(value, str(func))
    real_args, real_kwargs = tree_map_only(StreamedParameter, _whole, (args, kwargs))
    with torch.no_grad():
        return func(*real_args, **real_kwargs)


def _whole(parameter: StreamedParameter) -> torch.Tensor:
    resident = parameter.weight.resident
    return parameter.source.whole(parameter.weight) if resident is None else resident


def _real(value: Any) -> Any:
    """`value` with every streamed parameter in it (also inside lists, tuples and dicts) made real."""
    if type(value) is StreamedParameter:
        return _whole(value)
    if type(value) in (tuple, list):
        return type(value)(_real(item) for item in value)
    if type(value) is dict:
        return {key: _real(item) for key, item in value.items()}
    return value


def _ended(args: tuple[Any, ...]) -> None:
    """Tell the sources that the operator has ended which took `args`; those inside lists learn it at the next use."""
    for value in args:
        if type(value) is StreamedParameter and value.weight.resident is None:
            value.source.done(value.weight)


def _read_only(parameter: StreamedParameter, name: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"{name} would change {parameter.weight.name!r}, which is streamed from a checkpoint and read-only; "
        "load the model with offload='none' to change its weights"
    )


def _refuse_to_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In-place methods and functions (torch.nn.init names its target), `inplace=True`, and `out=`."""
    targets = [kwargs.get("out")]
    if kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")):
        targets.append(args[0] if args else kwargs.get("tensor"))
    for target in targets:
        for item in target if isinstance(target, (list, tuple)) else (target,):
            if isinstance(item, StreamedParameter):
                raise _read_only(item, name)


def _metadata(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _one_by_one(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of several weights that is written in Python: each operator in it gets its own, in turn."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return func(*args, **kwargs)


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """detach() and .data: the parameter itself, since there is nothing to detach from."""
    return args[0]


def _set_requires_grad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    args[0].weight.requires_grad = bool(wanted)
    return _metadata(func, args, kwargs)


def _assign_items(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x[index] = value`, where `x` is any tensor and a streamed weight is the index or the value.

    As of other operators' results, no gradient flows through what is assigned; torch's own rules for `x` hold.
    """
    target, index, value = args
    if type(target) is StreamedParameter:
        raise _read_only(target, "item assignment")
    value = _real(value)
    if isinstance(value, torch.Tensor) and type(args[2]) is StreamedParameter:
        value = value.detach()
        if target.requires_grad and torch.is_grad_enabled():
            value = NoGradient.apply(target, value)
    func(target, _real(index), value)
    _ended((*(index if isinstance(index, tuple) else (index,)), args[2]))


def _refuse_write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise _read_only(args[0], getattr(func, "__name__", "assignment"))


def _no_bytes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ZinferError(
        f"{args[0].weight.name!r} is streamed: it has no storage of its own. Use it in an operator, or "
        f"clone() it to get a tensor that has one"
    )


def _embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """F.embedding(ids, weight, ...): fetch each distinct row once, then look up among those, or in all of them."""
    ids = args[0] if args else kwargs["input"]
    parameter = args[1] if len(args) > 1 else kwargs["weight"]
    max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
    if max_norm is not None:
        raise _read_only(parameter, "F.embedding(max_norm=...)")
    weight = parameter.weight
    if weight.resident is not None or weight.row_source is None:
        return F.embedding(_real(ids), _whole(parameter))
    if not ids.numel():
        return torch.empty((*ids.shape, *weight.shape[1:]), dtype=weight.dtype, device=ids.device)
    distinct, positions = torch.unique(_real(ids), return_inverse=True)
    rows = distinct.tolist()
    if rows[0] < 0 or rows[-1] >= weight.shape[0]:
        raise IndexError(f"token id {rows[0] if rows[0] < 0 else rows[-1]} outside 0..{weight.shape[0] - 1}")
    table = parameter.source.settled(weight)
    if table is None:
        table = parameter.source.rows(weight, rows)
    return F.embedding(positions if table.shape[0] == len(rows) else _real(ids), table)


def _getitem(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`weight[e]` with an integer: only that slice is read, unless all of the weight is to stay."""
    parameter, index = args
    if type(parameter) is StreamedParameter and _is_integer(index):
        weight, row = parameter.weight, int(index)
        if weight.slices is not None and (at_hand := weight.slices.tensors.get(row)) is not None:
            return at_hand
        if (
            weight.resident is None
            and weight.row_source is not None
            and -weight.shape[0] <= row < weight.shape[0]
        ):
            table = parameter.source.settled(weight)
            if table is not None:
                return func(table, _real(index))
            return parameter.source.rows(weight, [row % weight.shape[0]])[0]
    return func(_real(parameter), _real(index))


def _is_integer(index: Any) -> bool:
    if isinstance(index, torch.Tensor):
        return index.dim() == 0 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, int) and not isinstance(index, bool)


def _handlers() -> dict[Any, Callable[..., Any]]:
    tensor: Any = torch.Tensor
    getters = (
        *(
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "itemsize",
            "nbytes",
            "names",
            "requires_grad",
            "is_leaf",
        ),
        *("grad", "grad_fn", "output_nr", "retains_grad", "_version", "_base", "_backward_hooks", "is_cpu"),
        *("is_cuda", "is_meta", "is_mps", "is_xpu", "is_ipu", "is_maia", "is_mtia", "is_vulkan", "is_xla"),
        *("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
    )
    methods = (
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_inference"),
        *("get_device", "has_names", "register_hook", "__len__", "__hash__"),
    )
    table: dict[Any, Callable[..., Any]] = {}
    table |= {getattr(tensor, name).__get__: _metadata for name in getters if hasattr(tensor, name)}
    table |= {getattr(tensor, name): _metadata for name in methods if hasattr(tensor, name)}
    no_storage = (tensor.data_ptr, tensor.untyped_storage, tensor.storage, tensor.numpy, tensor.__dlpack__)
    answers: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (
            _metadata,
            (torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size, torch.is_signed),
        ),
        (_same, (tensor.detach, torch.detach, tensor.data.__get__)),
        (_set_requires_grad, (tensor.requires_grad_, tensor.requires_grad.__set__)),
        (_assign_items, (tensor.__setitem__,)),
        (_refuse_write, (tensor.data.__set__, tensor.grad.__set__)),
        (_no_bytes, no_storage),
    ]
    table |= {function: answer for answer, functions in answers for function in functions}
    table[F.embedding] = _embedding
    table[F.multi_head_attention_forward] = _one_by_one
    table[tensor.__getitem__] = _getitem
    table[tensor.__repr__] = lambda func, args, kwargs: StreamedParameter.__repr__(args[0])
    return table


_HANDLERS = _handlers()
