"""Greedy decoding with a transformers model, whoever placed its weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks import BenchmarkError
from benchmarks.tools import Session

if TYPE_CHECKING:
    from benchmarks.worker import Task


class GreedySession(Session):
    """`model` is called as `generate` calls it; the cache is its own."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model: Any = model
        self._cache: Any = None

    def step(self, rows: list[list[int]]) -> list[int]:
        """See Session."""
        import torch

        with torch.no_grad():
            result = self.model(
                input_ids=torch.tensor(rows), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = result.past_key_values
        found: list[int] = result.logits[:, -1].argmax(-1).tolist()
        return found

    def restart(self) -> None:
        """See Session."""
        self._cache = None

    @property
    def cache_bytes(self) -> int:
        """Of the key-value cache now."""
        layers = getattr(self._cache, "layers", ())
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def import_transformers(task: Task) -> Any:
    """transformers, quiet, on the task's threads, with the module of the checkpoint's model class imported."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    config = transformers.AutoConfig.from_pretrained(task.checkpoint)
    module = importlib.import_module(
        transformers.AutoModelForCausalLM._model_mapping[type(config)].__module__
    )
    if task.uniform_routing:
        draw_experts(module)
    return transformers


def draw_experts(module: Any) -> None:
    """Have the routers of a model's module pick experts by chance, each alike, in an order that is always the same.

    They are the classes called ...TopKRouter, which return logits, shares and the experts' numbers.
    """
    import torch

    routers = [value for name, value in vars(module).items() if name.endswith("TopKRouter")]
    if not routers:
        raise BenchmarkError(f"{module.__name__}: no router found whose experts could be drawn")
    dice = torch.Generator().manual_seed(0)
    for router in routers:
        plain = router.forward

        def drawn(self: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            logits, shares, picked = plain(self, *args, **kwargs)
            alike = torch.rand(len(picked), logits.shape[-1], generator=dice)
            return logits, shares, alike.topk(picked.shape[-1]).indices.to(picked)

        router.forward = drawn
