"""Tensors without bytes that remember how they were made.

A checkpoint tensor enters as a SymbolicTensor over a Leaf. Whatever transformers' loader does to it
(stack, cat, chunk, cast, transpose ...) is recorded as an expression over leaves; lowering.py turns the
expressions that only move bytes into plain placement, `evaluate` replays the others on real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zinfer.errors import CheckpointError
from zinfer.weights.safetensors_header import TensorEntry


@dataclass(frozen=True, eq=False)
class Leaf:
    """A checkpoint tensor. `residue`: the address, modulo 64, of the live tensor it was written from."""

    entry: TensorEntry
    residue: int | None = None


@dataclass(frozen=True, eq=False)
class Apply:
    """Output `index` (None: the only one) of the ATen operator `func`; `args` may hold expressions."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None
    meta: torch.Tensor  # shape, strides and dtype of this output


Expression = Leaf | Apply

_FACTORIES = {
    getattr(torch.ops.aten, name)
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
} | {getattr(torch.ops.aten, name) for name in ("new_empty", "new_zeros", "new_ones", "new_full")}

_INITIALISERS = {
    getattr(torch.ops.aten, name) for name in ("normal_", "uniform_", "bernoulli_", "exponential_")
}


class SymbolicTensor(torch.Tensor):
    """Shape, dtype and device of a tensor, and the expression that makes it; no storage."""

    expression: Expression

    @staticmethod
    def __new__(cls: type[SymbolicTensor], expression: Expression, like: torch.Tensor) -> SymbolicTensor:
        """`like`: a meta tensor with the shape, strides and dtype of the result."""
        tensor: SymbolicTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        tensor.expression = expression
        return tensor

    @classmethod
    def of(cls, entry: TensorEntry, residue: int | None = None) -> SymbolicTensor:
        """The symbolic tensor for one checkpoint tensor; `residue` as in Leaf."""
        return cls(Leaf(entry, residue), torch.empty(entry.shape, dtype=entry.dtype, device="meta"))

    def __getitem__(self, index: Any) -> Any:
        # With [...] transformers' loader asks for the bytes of each of the files' tensors: where those are tens of
        # thousands, dispatching it takes longer than all else that it does.
        return self if index is Ellipsis else super().__getitem__(index)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SymbolicTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func.overloadpacket in _INITIALISERS and _is_computed(args[0].expression):
            return args[
                0
            ]  # a weight that is computed (weight_norm): in memory, this is lost with the temporary
        if func._schema.is_mutable:
            raise CheckpointError(
                f"loading wants to write into a checkpoint tensor ({func}); this conversion is unsupported"
            )
        meta_args, meta_kwargs = tree_map_only(SymbolicTensor, _to_meta, (args, kwargs))
        if func.overloadpacket in _FACTORIES:  # initialisation code making a tensor of its own: a real one
            return func(*meta_args, **{**meta_kwargs, "device": kwargs.get("device") or "cpu"})
        if "device" in meta_kwargs:
            meta_kwargs["device"] = "meta"
        try:
            out = func(*meta_args, **meta_kwargs)
        except NotImplementedError as error:
            raise CheckpointError(
                f"loading this checkpoint needs the values of a tensor ({func}), which zinfer does not read "
                f"at load: {error}"
            ) from error
        expr_args, expr_kwargs = tree_map_only(SymbolicTensor, lambda t: t.expression, (args, kwargs))

        def wrap(meta: torch.Tensor, index: int | None) -> SymbolicTensor:
            return cls(Apply(func, tuple(expr_args), expr_kwargs, index, meta), meta)

        if isinstance(out, torch.Tensor):
            return wrap(out, None)
        if isinstance(out, (tuple, list)) and all(isinstance(item, torch.Tensor) for item in out):
            return type(out)(wrap(item, i) for i, item in enumerate(out))
        raise CheckpointError(f"loading this checkpoint applies {func} to a tensor, which is unsupported")


def _is_computed(expression: Expression) -> bool:
    """Whether writing to `expression` would leave the checkpoint's tensors as they are."""
    while isinstance(expression, Apply):
        if expression.func._schema.returns[0].alias_info is None:
            return True
        expression = expression.args[0]
    return False


def _to_meta(tensor: SymbolicTensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def children(expression: Apply) -> Iterator[Expression]:
    """The expressions that `expression` takes as operands, in order."""
    stack: list[Any] = [expression.args, tuple(expression.kwargs.values())]
    while stack:
        item = stack.pop(0)
        if isinstance(item, (Leaf, Apply)):
            yield item
        elif isinstance(item, (list, tuple)):
            stack[:0] = item


def evaluate(
    expression: Expression,
    known: Callable[[Expression], torch.Tensor | None],
    device: torch.device,
) -> torch.Tensor:
    """Replay `expression` on real tensors; `known` returns the tensor of a node that is already placed.

    Each shared node is computed once. Every leaf has to be known.
    """
    with torch.no_grad():
        return _Replay(known, device).value(expression)


class _Replay:
    """One evaluation. A class, not nested functions: those would form a cycle that keeps the leaves' memory."""

    def __init__(self, known: Callable[[Expression], torch.Tensor | None], device: torch.device) -> None:
        self._known = known
        self._device = device
        self._memo: dict[Any, Any] = {}

    def value(self, node: Expression) -> torch.Tensor:
        placed = self._known(node)
        if placed is not None:
            return placed
        if isinstance(node, Leaf):
            raise KeyError(f"leaf {node.entry.name!r} was not read")
        # Outputs of one multi-output call (split, unbind) are separate nodes that share the call's kwargs.
        key = id(node.kwargs)
        if key not in self._memo:
            args, kwargs = _substitute((node.args, node.kwargs), self.value)
            if "device" in kwargs:
                kwargs["device"] = self._device
            self._memo[key] = node.func(*args, **kwargs)
        return self._memo[key] if node.index is None else self._memo[key][node.index]


def _substitute(item: Any, value: Callable[[Expression], Any]) -> Any:
    if isinstance(item, (Leaf, Apply)):
        return value(item)
    if isinstance(item, (list, tuple)):
        return type(item)(_substitute(part, value) for part in item)
    if isinstance(item, dict):
        return {key: _substitute(part, value) for key, part in item.items()}
    return item
