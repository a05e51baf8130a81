"""Which tensors a checkpoint of a config has: names, shapes and dtypes as on the hub, and initial values.

The model is built on the meta device and transformers' own `_init_weights` runs over it. Small tensors
(below `SMALL_BYTES`) and integer ones are on the CPU meanwhile, so they take exactly the values that
transformers gives them: norms, biases, the special parameters of state-space models, position ids. For
large ones `InitRecorder` only notes the distribution asked for, so each keeps its own deviation (GPT-2's
scaled projections, T5's factors) without a byte allocated.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as transformers_init
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from zinfer.errors import CheckpointError
from zinfer.weights.loading import REFUSALS

logger = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20
DEFAULT_STD = 0.02
BIAS_STD = 0.02  # transformers starts biases at zero; a read of the wrong bias would not show


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to write: `value` as it is, or normal values of `mean` and `std` where that is None."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None
    mean: float
    std: float

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Inventory:
    """Everything a checkpoint's weight files hold, in the order of the model's names."""

    model: PreTrainedModel
    tensors: list[TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def take_inventory(config: PreTrainedConfig, dtype: torch.dtype, seed: int | None) -> Inventory:
    """Build the model of `config` without its weights and list its checkpoint's tensors.

    `seed`: of the small tensors' values; None where only names, shapes and dtypes count: values take their time.
    Raises CheckpointError for an architecture that transformers does not know or cannot build.
    """
    cls = model_class(config)
    try:
        with torch.device("meta"), transformers_init.meta_device_safe_creation_ops():
            model = cls._from_config(config, dtype=dtype)
    except REFUSALS as error:
        raise CheckpointError(f"{cls.__name__} cannot be built from this config: {error}") from error
    recorder = InitRecorder(getattr(config.get_text_config(), "initializer_range", None) or DEFAULT_STD)
    if seed is None:
        tensors = _checkpoint_tensors(model, contextlib.nullcontext())
        return Inventory(model, _specs(model, tensors, recorder))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dtypes = _materialise_small(model)
        _initialise(model, recorder)
        _settle_values(model, recorder.default.std)
    _cast_small(model, dtypes)
    return Inventory(model, _specs(model, _checkpoint_tensors(model, recorder), recorder))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class `config.architectures` names, else that with a language-model head, else the bare one."""
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if not names:
        autos = (
            transformers.AutoModelForCausalLM,
            transformers.AutoModelForSeq2SeqLM,
            transformers.AutoModel,
        )
        for auto in autos:
            if type(config) in auto._model_mapping:
                mapped: Any = auto._model_mapping[type(config)]
                return mapped[0] if isinstance(mapped, tuple) else mapped
    raise CheckpointError(
        f"config: architectures {names} of model type {config.model_type!r} are unknown to transformers "
        f"{transformers.__version__}; upgrade transformers, or name one of its classes in `architectures`"
    )


@dataclass(frozen=True)
class _Fill:
    """What an initialiser asked for: a distribution, or real values."""

    mean: float
    std: float
    value: torch.Tensor | None = None


class InitRecorder(TorchDispatchMode):
    """Notes what initialisers do to meta tensors, by storage, and carries it through later operators.

    Real and meta tensors may be mixed: the result is then meta. Used by one thread at a time.
    """

    def __init__(self, default_std: float) -> None:
        super().__init__()
        self.default = _Fill(0.0, default_std)
        self._fills: dict[int, tuple[Any, _Fill]] = {}  # storage -> (keeps its address taken, fill)

    def fill_of(self, tensor: torch.Tensor) -> _Fill:
        """The fill last noted for `tensor`'s storage, or the default."""
        return self._find(tensor) or self.default

    def _find(self, tensor: torch.Tensor) -> _Fill | None:
        return self._fills.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def _note(self, tensor: torch.Tensor, fill: _Fill) -> None:
        storage = tensor.untyped_storage()
        self._fills[storage._cdata] = (storage, fill)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_"):
            target = args[0]
            if not target.is_meta:  # a small tensor made from a large one: left to `_settle_values`
                return target
            self._note_in_place(name[:-1], target, args[1:])
            return target
        on_meta, meta_kwargs = tree_map(_to_meta, (args, kwargs))
        result = func(*on_meta, **meta_kwargs)
        source = next((fill for tensor in tensors if (fill := self._find(tensor))), None)
        if source is not None:
            fill = _scaled(name, replace(source, value=None), args[1:])
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and self._find(leaf) is None:
                    self._note(leaf, fill)
        return result

    def _note_in_place(self, name: str, target: torch.Tensor, args: tuple[Any, ...]) -> None:
        partial = target.numel() * target.dtype.itemsize < target.untyped_storage().nbytes()
        if name == "normal":
            mean, std = (*args, *(0.0, 1.0)[len(args) :])[:2]
            self._note(target, _Fill(float(mean), float(std)))
        elif name == "uniform":
            low, high = (*args, *(0.0, 1.0)[len(args) :])[:2]
            self._note(target, _Fill((low + high) / 2, (high - low) / math.sqrt(12)))
        elif name == "erfinv":  # trunc_normal_: uniform, then this, then a factor and an offset
            self._note(target, _Fill(0.0, math.sqrt(0.5)))
        elif partial:
            return  # a padding row set to zero does not tell how the rest is filled
        elif name in ("zero", "fill"):
            value = float(args[0]) if args and not getattr(args[0], "is_meta", False) else 0.0
            # A large tensor of zeros would hide a misplaced read: it is random as any other.
            self._note(target, _Fill(value, 0.0) if value else self.default)
        elif name == "copy":
            self._note(target, self._copied(args[0]))
        else:
            self._note(target, _scaled(name, self.fill_of(target), args))

    def _copied(self, source: torch.Tensor) -> _Fill:
        if source.is_meta:
            return self.fill_of(source)
        if source.untyped_storage().nbytes() < SMALL_BYTES or not source.is_floating_point():
            return _Fill(0.0, 0.0, source)
        return _Fill(float(source.float().mean()), float(source.float().std()))


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf


def _scaled(name: str, fill: _Fill, args: tuple[Any, ...]) -> _Fill:
    factor = args[0] if args else None
    if isinstance(factor, torch.Tensor):
        factor = float(factor) if factor.numel() == 1 and not factor.is_meta else None
    if not isinstance(factor, (int, float)):
        return fill
    if name == "mul":
        return _Fill(fill.mean * factor, fill.std * abs(factor))
    if name == "div" and factor:
        return _Fill(fill.mean / factor, fill.std / abs(factor))
    if name == "add":
        return _Fill(fill.mean + factor, fill.std)
    return fill


def _is_persistent(module: nn.Module, name: str) -> bool:
    return name in module._parameters or name not in module._non_persistent_buffers_set


def _saved_slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and _is_persistent(module, name):
                yield module, name, tensor


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _materialise_small(model: nn.Module) -> dict[int, torch.dtype]:
    """Put small and integer tensors on the CPU, floats in float32, ties kept; the dtypes they came with."""
    made: dict[int, torch.Tensor] = {}
    keep: list[torch.Tensor] = []  # an id stays taken
    dtypes: dict[int, torch.dtype] = {}
    for module, name, tensor in list(_saved_slots(model)):
        floating = tensor.is_floating_point()
        if floating and tensor.numel() * tensor.dtype.itemsize >= SMALL_BYTES:
            continue
        if id(tensor) not in made:
            keep.append(tensor)
            real = torch.empty(tensor.shape, dtype=torch.float32 if floating else tensor.dtype, device="cpu")
            real.fill_(_unset(real.dtype))
            _replace(module, name, real)
            made[id(tensor)] = getattr(module, name)
            dtypes[id(made[id(tensor)])] = tensor.dtype
        elif name in module._parameters:
            module._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
        else:
            module._buffers[name] = made[id(tensor)]
    return dtypes


def _unset(dtype: torch.dtype) -> float | int:
    """The value of an element that no initialiser has touched."""
    if dtype.is_floating_point:
        return math.nan
    return 0 if dtype.is_complex or dtype == torch.bool else torch.iinfo(dtype).min


def _initialise(model: PreTrainedModel, recorder: InitRecorder) -> None:
    """Run transformers' initialisers, children first, each by the (sub)model that owns the module."""

    def visit(module: nn.Module, owner: PreTrainedModel) -> None:
        if isinstance(module, PreTrainedModel):
            owner = module
        for child in module.children():
            visit(child, owner)
        try:
            owner._init_weights(module)
        except REFUSALS as error:
            logger.debug("%s: initialiser not run without weights: %s", type(module).__name__, error)

    with recorder, transformers_init.guard_torch_init_functions():
        visit(model, model)


def _settle_values(model: nn.Module, std: float) -> None:
    """Give what no initialiser set a value, and biases some noise."""
    seen: set[int] = set()
    for module, name, tensor in _saved_slots(model):
        if tensor.is_meta or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point():
            _settle_floats(module, name, tensor, std)
        elif tensor.dtype != torch.bool and (unset := tensor == _unset(tensor.dtype)).any():
            positions = tensor.dim() > 0 and name.endswith("position_ids")
            default = (
                torch.arange(tensor.shape[-1]).expand_as(tensor) if positions else torch.zeros_like(tensor)
            )
            tensor.copy_(torch.where(unset, default, tensor))


def _settle_floats(module: nn.Module, name: str, tensor: torch.Tensor, std: float) -> None:
    unset = tensor.isnan()
    if unset.any():
        if tensor.dim() <= 1 and ("norm" in type(module).__name__.lower() or "norm" in name):
            default = torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor)
        else:
            default = torch.randn_like(tensor) * std
        tensor.copy_(torch.where(unset, default, tensor))
    if name.endswith("bias") and tensor.numel() and not tensor.count_nonzero():
        tensor.normal_(0.0, BIAS_STD)


def _cast_small(model: nn.Module, dtypes: dict[int, torch.dtype]) -> None:
    for _, _, tensor in _saved_slots(model):
        if (dtype := dtypes.pop(id(tensor), None)) is not None and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _checkpoint_tensors(
    model: PreTrainedModel, recorder: AbstractContextManager[Any]
) -> dict[str, torch.Tensor]:
    """The model's tensors without duplicates, under the hub's names and in the hub's pieces."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    try:
        state = remove_tied_weights_from_state_dict(state, model)
        with recorder, torch.no_grad():
            return revert_weight_conversion(model, state)
    except REFUSALS as error:
        raise CheckpointError(
            f"{type(model).__name__}: transformers {transformers.__version__} cannot name its checkpoint's "
            f"tensors without weights: {error}"
        ) from error


def _specs(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], recorder: InitRecorder
) -> list[TensorSpec]:
    specs = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not tensor.is_meta:
            specs.append(TensorSpec(name, shape, tensor.dtype, tensor.detach(), 0.0, 0.0))
            continue
        fill = recorder.fill_of(tensor)
        value = fill.value
        if value is not None:
            value = value.expand(shape).to(tensor.dtype) if value.numel() == tensor.numel() else None
            fill = recorder.default if value is None else fill
        specs.append(TensorSpec(name, shape, tensor.dtype, value, fill.mean, fill.std))
    return specs
