"""What a streaming model does differently from its class: call, move, copy, save, close."""

from __future__ import annotations

import copy
import functools
import traceback
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zinfer.caches_on_host import CACHE
from zinfer.decoding import with_its_experts, without_compiling
from zinfer.errors import OptionError, ReadOnlyError, ZinferError
from zinfer.kv_offload.refusals import check_cache_implementation
from zinfer.runtime import Runtime
from zinfer.weights.parameter import StreamedParameter
from zinfer.weights.shortage import ran_out

# Methods that would read all weights into memory to write them, or change some weights and fail at the next.
_NEEDS_BYTES = {
    "save_pretrained": "save the weights: they are in its checkpoint already, copy those files",
    "push_to_hub": "upload the weights: they are in its checkpoint already, upload those files",
    "load_state_dict": "take other weights: pass a checkpoint that holds them to zinfer.run",
    "resize_token_embeddings": "resize its embeddings: resize and save them with offload='none' first",
}


def attach(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Give `model` its handle as `.zinfer` and make it a context manager, without touching its class.

    The instance gets a subclass of its class with the same name (as FSDP2 does), which adds
    `__enter__` and `__exit__`; `__call__` without autograd (streamed weights do not train, and a graph would
    hold every activation); copies that share the streamed weights; and an explanation where a method
    cannot do what it does on a model in memory: `.to()`, pickling and those in _NEEDS_BYTES. generate()
    prefills in chunks where memory asks for it, never compiles, and computes experts in one way throughout. Where
    caches go to host memory, it says which are its own, and refuses kinds that cannot go there.
    """
    base = type(model)
    extra: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__enter__": lambda self: self,
        "__exit__": lambda self, *_: self.zinfer.close(),
        "__copy__": _copy,
        "__reduce_ex__": _refuse_to_pickle,
    }
    if runtime.offload != "none":
        extra |= {"__call__": _without_autograd(base), "_apply": _apply, "__deepcopy__": _deepcopy}
        extra |= {name: _refused(base, name) for name in _NEEDS_BYTES if hasattr(base, name)}
    else:
        extra["__deepcopy__"] = _deepcopy_in_memory
    if runtime.offload != "none":  # not every version of transformers has all of these, nor every model
        own = {
            "_prefill": _prefill,
            "_valid_auto_compile_criteria": without_compiling,
            "_optimize_model_for_decode": with_its_experts,
        }
        extra |= {name: made(base) for name, made in own.items() if hasattr(base, name)}
    if runtime.caches is not None:
        extra["generate"] = _generate(base)
        if hasattr(base, "_prepare_cache_for_generation"):
            extra["_prepare_cache_for_generation"] = _prepare_cache(base)
    model.__class__ = types.new_class(base.__name__, (base,), exec_body=lambda space: space.update(extra))
    model.zinfer = runtime  # type: ignore[assignment]
    model.register_forward_pre_hook(runtime.begin_sweep, with_kwargs=True)
    model.register_forward_hook(runtime.end_sweep, with_kwargs=True)
    return model


def _without_autograd(base: type[nn.Module]) -> Callable[..., Any]:
    """A call without autograd. Where memory runs out in it, some is given back, and an OutOfMemoryError is raised."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.no_grad():
                return base.__call__(self, *args, **kwargs)
        except BaseException as error:
            if not ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what the pass had in memory
            raise self.zinfer.ran_out(error) from error  # type: ignore[operator, union-attr]

    return call


def _generate(base: Any) -> Callable[..., Any]:
    """generate(), whose own cache goes to host memory."""

    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache_implementation") == "paged":  # another method generates then
            check_cache_implementation("paged")
        with self.zinfer.caches.generating(kwargs.get(CACHE)):
            return base.generate(self, *args, **kwargs)

    return generate


def _prepare_cache(base: Any) -> Callable[..., Any]:
    """The part of generate() that makes its cache, by settings put together from all places: of a kind for the host."""

    def prepare(self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            check_cache_implementation(generation_config.cache_implementation)
        return base._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)

    return prepare


def _prefill(base: Any) -> Callable[..., Any]:
    """The part of generate() that runs the prompt, which knows its batch, beams and cache: in chunks where need be."""

    def prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        chunk = self.zinfer.prefill_chunk(input_ids, generation_config, model_kwargs)
        if chunk is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = chunk
        return base._prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    return prefill


def _refused(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """The method `name` of `base` where all parameters are in memory, else an explanation."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(parameter, StreamedParameter) for parameter in self.parameters()):
            raise ReadOnlyError(
                f"{name}: this model streams its weights and cannot {_NEEDS_BYTES[name]}; or load it with "
                "zinfer.run(..., offload='none')"
            )
        return getattr(base, name)(self, *args, **kwargs)

    return method


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """What .to() and its like apply to each tensor: nothing to do, or an explanation."""
    for dtype, device in {(tensor.dtype, tensor.device) for tensor in self.parameters()}:
        probe = torch.empty(0, dtype=dtype, device=device)
        try:
            moved = fn(probe)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise OptionError(
                f"this model computes on {device}, where its weights stream to: {error}"
            ) from error
        if moved is not probe:
            raise OptionError(
                f"this model streams its weights, so .to() and its like cannot turn them into {moved.dtype} on "
                f"{moved.device}: pass dtype= (and max_memory=) to zinfer.run instead, or load with offload='none'"
            )
    return self


def _copy(self: nn.Module) -> nn.Module:
    twin = self.__class__.__new__(self.__class__)
    twin.__dict__.update(self.__dict__)
    return twin


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that streams, and keeps resident, the very same weights."""
    self.zinfer.share(memo)  # type: ignore[operator, union-attr]
    return _deepcopy_in_memory(self, memo)


def _deepcopy_in_memory(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    twin = self.__class__.__new__(self.__class__)
    memo[id(self)] = twin
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


def _refuse_to_pickle(self: nn.Module, protocol: Any) -> Any:
    raise ZinferError(
        "a model made by zinfer.run cannot be pickled: its weights are in a checkpoint, and the files, threads and "
        "memory that serve them belong to this process. Pass the checkpoint's path, and call zinfer.run there"
    )
