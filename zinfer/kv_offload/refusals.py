"""Which models can have their key-value caches in host memory, and what the others are told."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from zinfer.errors import OptionError
from zinfer.kv_offload.layers import MOVED, STAYING
from zinfer.wording import brief


def check_kv_offload(kv_offload: Any, *, attached: bool) -> None:
    """Raises OptionError for anything but None and "cpu", and for that where there is no memory but the host's."""
    if kv_offload is None:
        return
    if kv_offload != "cpu":
        raise OptionError(
            f"kv_offload={brief(kv_offload)}: give 'cpu' for caches in host memory, or leave it out"
        )
    if not attached:
        raise OptionError(
            "kv_offload='cpu' has no effect where the CPU computes: key-value caches are in its memory already"
        )


def check_cache_implementation(implementation: Any) -> None:
    """Raises OptionError where generate() would make a cache of a kind that stays on the device."""
    if implementation in (None, "dynamic", "dynamic_full"):
        return
    raise OptionError(
        f"cache_implementation={brief(implementation)}: kv_offload='cpu' has no effect on such a cache, which would be "
        "on the device; leave cache_implementation out (or give 'dynamic', where the model's generation_config names "
        "it), or load the model without kv_offload"
    )


def check_model(model: nn.Module) -> None:
    """Raises OptionError where the caches of `model` cannot be in host memory, with the reason."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(model, "can_generate") and model.can_generate()):  # type: ignore[operator]
        _refuse(model, "it generates no text, and so makes no key-value cache")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(
            model,
            "cross-attention takes an encoder's keys and values out of the cache without asking it to bring them",
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        _refuse(
            model,
            "it takes no past_key_values: its cache is a recurrent state, which does not grow, or its own",
        )
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    strange = sorted(kind.__name__ for kind in kinds if kind not in MOVED and kind not in STAYING)
    if strange:
        _refuse(model, f"layers of its cache, {', '.join(strange)}, hold more than keys and values")
    if not kinds & set(MOVED):
        _refuse(model, "no layer of it has keys and values that grow")


def _refuse(model: nn.Module, reason: str) -> None:
    raise OptionError(f"kv_offload='cpu' cannot be had with {type(model).__name__}: {reason}; leave it out")
