"""What transformers would do to a model before it decodes, and a streaming one goes without: compile, other experts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import DynamicCache

NOT_COMPILED = (
    "generate() does not compile this model, as it would one in memory: its parameters are streamed"
)
COMPILE_CONFIG = "compile_config has no effect, as this model's parameters are streamed; leave it out"
EXPERTS_STAY = (
    "experts are computed by grouped_mm while decoding too: batched_mm, which transformers takes on a GPU, would copy "
    "an expert for each token that chose it"
)


def without_compiling(base: Any) -> Callable[..., bool]:
    """The method of `base` that says whether generate() compiles the model: never."""

    @functools.wraps(base._valid_auto_compile_criteria)
    def criteria(self: Any, model_kwargs: Any, generation_config: Any, *_: Any, **__: Any) -> bool:
        if getattr(generation_config, "disable_compile", False):
            return False
        cache = model_kwargs.get("past_key_values")
        compiles = getattr(cache, "is_compileable", False) and type(cache) is not DynamicCache
        if getattr(generation_config, "compile_config", None) is not None:
            self.zinfer.tell(COMPILE_CONFIG, logging.WARNING)
        elif compiles and self.device.type != "cpu":
            self.zinfer.tell(NOT_COMPILED)
        return False

    return criteria


def with_its_experts(base: Any) -> Callable[..., Any]:
    """The method of `base` that generate() decodes under: nothing changes, where other experts would be taken.

    batched_mm indexes the weights of all experts with each token's choice, which copies rows x top_k of them, in memory
    that no budget knows of; and as they stream whole, nothing is gained.
    """

    @contextmanager
    def decoding(self: Any) -> Iterator[None]:
        if self.device.type != "cpu" and "grouped_mm" in _experts(self):
            self.zinfer.tell(EXPERTS_STAY)
        yield

    return decoding


def _experts(model: Any) -> list[str | None]:
    """How the model, and each part with a config of its own, computes its experts; of a dense one it says nothing."""
    parts = [part for part in model.modules() if hasattr(part, "_can_set_experts_implementation")]
    if not any(part._can_set_experts_implementation() for part in parts):
        return []
    if not hasattr(model, "get_experts_implementation"):
        return [getattr(model.config, "_experts_implementation", None)]
    return list(model.get_experts_implementation().values())
