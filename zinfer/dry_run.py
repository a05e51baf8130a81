"""What a model would compute, found by running it on tensors without data (torch's meta device).

Flops come from torch.utils.flop_counter's registry, bytes from the operands, the cache from what the model returns, so
that sliding windows, latent attention and linear attention count for what they are, whatever the architecture.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.utils import logging as transformers_logging

from zinfer.parts import Held
from zinfer.planner.cost import Operator, PassWork, Work
from zinfer.weights.loading import REFUSALS, parameter_slots

aten = torch.ops.aten

_ROW_LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
_CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")
# Experts that each token goes to, as configs call them; transformers maps most names to the first.
_CHOSEN_NAMES = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
    *("num_selected_experts", "top_k"),
)


def dry_run(model: Any, held: Sequence[Held], batch: int, prompt: int, new_tokens: int) -> Work:
    """The work of generating `new_tokens` after `prompt` tokens, `batch` sequences at once.

    `model` is a symbolic one, of which gather() found `held`, to which Work's indices refer; its tensors are replaced
    by empty ones, so it is of no other use afterwards. The decode pass is taken at the mean length of the cache.
    Raises DryRunError where the model cannot run without data.
    """
    weights = _strip(model, held)
    experts: dict[str, Any] = {"on_demand": _fuse_experts(model), "chosen": _experts_of_a_token(model.config)}
    before = 0 if model.config.is_encoder_decoder else prompt  # tokens in the decoder's cache at the start
    try:
        with torch.no_grad(), _quiet():
            with Recorder(weights, **experts) as first:
                output, memory = _first(model, batch, prompt)
            if not model.can_generate():
                return Work(batch, first.finish(), first.finish(), 0, first.peak)
            prompt_cache = _tensor_bytes(output)
            del output
            with Recorder(weights, **experts):
                cache = _cache_at(model, batch, before + new_tokens // 2, memory)
                longest = _tensor_bytes(_cache_at(model, batch, before + new_tokens - 1, memory))
            with Recorder(weights, **experts) as later:
                _step(model, batch, 1, cache, memory)
    except REFUSALS as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DryRunError(f"{type(error).__name__}: {reason}") from error
    activations = max(0, first.peak - prompt_cache)
    return Work(batch, first.finish(), later.finish(), longest, activations)


class DryRunError(Exception):
    """The model needs real data to run; the message says what it asked for."""


def _strip(model: nn.Module, held: Sequence[Held]) -> dict[int, int]:
    """Put empty meta tensors in all places of `model`; storage -> index in `held`."""
    index_of: dict[int, int] = {}
    for index, item in enumerate(held):
        like = item.tensor
        empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        for slot in item.slots:
            slot.fill(nn.Parameter(empty, requires_grad=False) if slot.is_parameter else empty)
        index_of[_storage(empty)] = index
    for owner, attribute, _, tensor, is_parameter in list(parameter_slots(model)):
        if not tensor.is_meta:
            table: dict[str, Any] = owner._parameters if is_parameter else owner._buffers
            moved = tensor.detach().to("meta")
            table[attribute] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return index_of


def _fuse_experts(model: Any) -> bool:
    """Make experts run without looking at which are chosen; whether the model reads only those that are."""
    on_demand = getattr(model.config, "_experts_implementation", None) == "eager"
    with contextlib.suppress(ValueError, AttributeError):  # a model without experts
        model.set_experts_implementation("grouped_mm")
    return on_demand


def _experts_of_a_token(config: Any) -> int:
    """How many experts each token goes to, as the config says; 1 where it does not."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, name, None) for name in _CHOSEN_NAMES)
    return next((value for value in values if type(value) is int and value > 0), 1)


def _first(model: Any, batch: int, prompt: int) -> tuple[Any, Any]:
    """The cache that the pass over the prompt leaves, and the encoder's output where there is an encoder."""
    if not model.config.is_encoder_decoder:
        if model.can_generate():
            return _step(model, batch, prompt, None, None), None
        return _call(model, input_ids=_ids(batch, prompt)), None
    if not model.can_generate():
        return _call(model, input_ids=_ids(batch, prompt), decoder_input_ids=_ids(batch, prompt)), None
    memory = model.get_encoder()(input_ids=_ids(batch, prompt), return_dict=True)
    return _step(model, batch, 1, None, memory), memory


def _cache_at(model: Any, batch: int, tokens: int, memory: Any) -> Any:
    """The cache as it is after `tokens` tokens, of which there is at least one."""
    return _step(model, batch, max(tokens, 1), None, memory)


def _step(model: Any, batch: int, tokens: int, cache: Any, memory: Any) -> Any:
    """Feed `tokens` tokens after `cache`; returns the cache that comes back."""
    name, value = cache or (None, None)
    fields: dict[str, Any] = {"use_cache": True} | ({} if name is None else {name: value})
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        fields["logits_to_keep"] = 1  # as generate() does
    if memory is None:
        fields["input_ids"] = _ids(batch, tokens)
    else:
        fields |= {"encoder_outputs": memory, "decoder_input_ids": _ids(batch, tokens)}
    output = _call(model, **fields)
    found = next((key for key in _CACHE_NAMES if output.get(key) is not None), None)
    return None if found is None else (found, output[found])


def _call(model: Any, **fields: Any) -> Any:
    return model(**fields, return_dict=True)


def _ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long, device="meta")


def _tensor_bytes(value: Any) -> int:
    """Bytes of the distinct tensors that `value` holds, at any depth."""
    total, seen, stack = 0, set(), [value]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (str, int, float, type, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif type(item).__module__.startswith("transformers"):
            stack.extend(getattr(item, "__dict__", {}).values())
    return total


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' remarks on inputs that are no real ones would only mislead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


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
        fresh = [tensor for tensor in outputs if _storage(tensor) not in storages]
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
        if (index := self._weights.get(_storage(right))) is not None:
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
        held = {_storage(tensor): tensor for tensor in inputs if _storage(tensor) in self._weights}
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
        storage, name = _storage(tensor), id(tensor)
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
        name = _storage(tensor)
        shape = (tensor.shape, tensor.stride(), tensor.dtype)
        alone = torch.empty_strided(*shape[:2], dtype=tensor.dtype, device="meta")
        same_size = alone.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
        if name in names or tensor.storage_offset() or not same_size:
            return None
        names.add(name)
        shapes.append(shape)
    return tuple(shapes) or None


def _storage(tensor: torch.Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes that an operator reads of `tensor`: of an expanded one, those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
