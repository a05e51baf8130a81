"""Notes what one pass of a model computes, operator by operator, alike ones once.

Flops come from torch.utils.flop_counter's registry, bytes from the operands.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from zinfer.planner.cost import Operator, PassWork

aten = torch.ops.aten

_ROW_LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}

_Key = tuple[str, str, float, float, float]  # an Operator, but for its count


class _Alike(NamedTuple):
    """What an operator did: what it was noted as, and its results' shape, strides and dtype.

    `several`: it returned a tuple of them. `asks`: it read the whole of the weights that it was given.
    """

    operator: _Key
    shapes: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    several: bool
    asks: bool


class Recorder(TorchDispatchMode):
    """Notes every operator of one pass: its rows, flops and bytes, the weights it asks for, and memory in use.

    `weights`: storage -> index. `on_demand`: only the experts that are chosen count as asked for,
    `chosen` of them for each token. One thread only.
    """

    def __init__(self, weights: Mapping[int, int], on_demand: bool, chosen: int = 1) -> None:
        super().__init__()
        self._chosen = chosen
        self._weights = weights
        self._on_demand = on_demand
        self._operators: Counter[_Key] = Counter()
        self._known: dict[Any, _Alike] = {}
        self._asks: dict[int, float] = {}
        self._live: dict[int, set[int]] = {}  # storage -> tensors on it that are alive
        self._watch: dict[int, weakref.ref[torch.Tensor]] = {}
        self._fused = _Fused(self)
        self._used = self.peak = 0

    def finish(self) -> PassWork:
        """What was noted, as plain data."""
        operators = tuple(Operator(*key, count=count) for key, count in self._operators.items())
        return PassWork(operators, tuple(sorted(self._asks.items())))

    def __enter__(self) -> Recorder:
        self._fused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._fused.__exit__(*exception)
        self._watch.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is aten._local_scalar_dense and args[0].dtype == torch.bool:
            return True  # "is the whole mask set?": it is
        storages: dict[int, int] = {}
        key = (func, self._signature(args, storages), self._signature(kwargs, storages))
        if (alike := self._known.get(key)) is not None:
            return self._repeat(alike, storages)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        fresh = [tensor for tensor in outputs if storage_of(tensor) not in storages]
        for tensor in outputs:
            self._follow(tensor)
        if fresh or func._schema.is_mutable:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            operator = self._note(func, args, kwargs, inputs, outputs, result)
            repeatable = not func._schema.is_mutable and all(tensor.is_meta for tensor in inputs)
            if repeatable and (shapes := _shapes(result, storages)) is not None:
                asks = func.overloadpacket not in _ROW_LOOKUPS
                self._known[key] = _Alike(operator, shapes, isinstance(result, tuple), asks)
        return result

    def _signature(self, value: Any, storages: dict[int, int]) -> Any:
        """All that an operator without data can tell of an argument; the storages in it are numbered in `storages`."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            name = storage._cdata
            number = storages.setdefault(name, len(storages))
            place = (value.shape, value.stride(), value.storage_offset(), number, name in self._weights)
            return (value.dtype, value.device, storage.nbytes(), value.is_conj(), value.is_neg(), *place)
        if isinstance(value, (list, tuple)):
            return type(value), *(self._signature(item, storages) for item in value)
        if isinstance(value, dict):
            return *value, *(self._signature(item, storages) for item in value.values())
        return type(value), value  # 1, 1.0 and True are equal, and make tensors of different types

    def _repeat(self, alike: _Alike, storages: Iterable[int]) -> Any:
        """What an operator did before, once more: layers are alike, and torch takes long to work out shapes."""
        outputs = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in alike.shapes
        )
        for tensor in outputs:
            self._follow(tensor)
        if alike.asks:
            self._asks.update((self._weights[name], 1.0) for name in storages if name in self._weights)
        self._operators[alike.operator] += 1
        return outputs if alike.several else outputs[0]

    def note_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
    ) -> None:
        """A fused attention: 2 flops for each product of a query with a key, and as many with a value."""
        length, span = query.shape[-2], key.shape[-2]
        flops = 2 * query.shape[:-2].numel() * length * span * (query.shape[-1] + value.shape[-1])
        if causal and length > 1:
            flops //= 2
        nbytes = sum(map(_nbytes, (query, query, key, value)))
        self._add("attention", query.dtype, length, flops, nbytes)

    def note_experts(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Rows times the matrices of the experts they go to.

        A token has a row for each of its k experts, which are distinct: of E, E(1 - (1 - k/E)^tokens) are chosen, if
        each token chooses at random.
        """
        experts, each = right.shape[0], min(self._chosen, right.shape[0])
        tokens = left.shape[0] / each
        chosen = experts * -math.expm1(tokens * math.log1p(-each / experts)) if each < experts else experts
        if (index := self._weights.get(storage_of(right))) is not None:
            self._asks[index] = chosen / experts if self._on_demand else 1.0
        flops = 2 * left.numel() * right.shape[-1]
        nbytes = _nbytes(left) + left.shape[0] * right.shape[-1] * left.element_size()
        nbytes += int(_nbytes(right) * chosen / experts)
        self._add("matmul", left.dtype, max(1.0, left.shape[0] / chosen), flops, nbytes)

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        result: Any,
    ) -> _Key:
        """Count an operator; what it was counted as."""
        packet = func.overloadpacket
        out_bytes = sum(map(_nbytes, outputs))
        dtype = outputs[0].dtype if outputs else torch.float32
        if packet in _ROW_LOOKUPS:
            return self._add("copy", dtype, 1, 0, 2 * out_bytes)
        held = {storage_of(tensor): tensor for tensor in inputs if storage_of(tensor) in self._weights}
        for storage in held:
            self._asks[self._weights[storage]] = 1.0
        nbytes = out_bytes + sum(map(_nbytes, inputs))
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        rows = 1.0
        if flops:
            matrices = [tensor for tensor in inputs if tensor.dim() > 1]
            right = max(held.values(), key=torch.Tensor.numel) if held else matrices[-1]
            rows = max(1.0, flops / (2 * max(right.numel(), 1)))
        return self._add("matmul" if flops else "copy", dtype, rows, flops, nbytes)

    def _add(self, kind: str, dtype: torch.dtype, rows: float, flops: float, nbytes: float) -> _Key:
        key = (kind, str(dtype).removeprefix("torch."), rows, flops, nbytes)
        self._operators[key] += 1
        return key

    def _follow(self, tensor: torch.Tensor) -> None:
        """Count `tensor`'s storage as in use until the last tensor on it dies."""
        storage, name = storage_of(tensor), id(tensor)
        if storage in self._weights or name in self._watch:
            return
        nbytes = tensor.untyped_storage().nbytes()
        if storage not in self._live:
            self._live[storage] = set()
            self._used += nbytes
            self.peak = max(self.peak, self._used)
        self._live[storage].add(name)

        def forget(_: Any) -> None:
            self._watch.pop(name, None)
            holders = self._live.get(storage, set())
            holders.discard(name)
            if not holders and self._live.pop(storage, None) is not None:
                self._used -= nbytes

        self._watch[name] = weakref.ref(tensor, forget)


class _Fused(TorchFunctionMode):
    """Takes fused attention and products with experts for one operator, whichever kernel a device would choose."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        if name.startswith(("grouped_mm", "_grouped_mm")):
            return self._multiply(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        self._recorder.note_attention(query, key, value, is_causal)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def _multiply(self, left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self._recorder.note_experts(left, right)
        return left.new_empty(left.shape[0], right.shape[-1])


def _shapes(
    result: Any, storages: Collection[int]
) -> tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...] | None:
    """Shape, strides and dtype of each tensor in `result`; None unless they are all that there is to tell of it.

    So it is not where a tensor lies in one of `storages`, with another, or in a part of its own storage.
    """
    outputs = result if isinstance(result, tuple) else (result,)
    shapes, names = [], set(storages)
    for tensor in outputs:
        if type(tensor) is not torch.Tensor or not tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            return None
        name = storage_of(tensor)
        shape = (tensor.shape, tensor.stride(), tensor.dtype)
        alone = torch.empty_strided(*shape[:2], dtype=tensor.dtype, device="meta")
        same_size = alone.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
        if name in names or tensor.storage_offset() or not same_size:
            return None
        names.add(name)
        shapes.append(shape)
    return tuple(shapes) or None


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors on one storage have in common, as long as one of them lives."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes that an operator reads of `tensor`: of an expanded one, those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
