"""What a model would compute, found by running it on tensors without data (torch's meta device).

Operators are noted as they run (see pass_recorder.py) and the cache is what the model returns, so that sliding
windows, latent attention and linear attention count for what they are, whatever the architecture.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from zinfer.experts.forward import NAME
from zinfer.parts import Held
from zinfer.pass_recorder import Recorder, storage_of
from zinfer.planner.cost import Work
from zinfer.weights.loading import REFUSALS, parameter_slots

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
        index_of[storage_of(empty)] = index
    for owner, attribute, _, tensor, is_parameter in list(parameter_slots(model)):
        if not tensor.is_meta:
            table: dict[str, Any] = owner._parameters if is_parameter else owner._buffers
            moved = tensor.detach().to("meta")
            table[attribute] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return index_of


def _fuse_experts(model: Any) -> bool:
    """Make experts run without looking at which are chosen; whether the model reads only those that are."""
    on_demand = getattr(model.config, "_experts_implementation", None) in ("eager", NAME)
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
