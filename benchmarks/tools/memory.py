"""transformers with all weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("torch", "transformers", "safetensors")


class MemorySession(GreedySession):
    """Weights copied out of the checkpoint's mapping, whose pages the kernel may drop."""

    def __init__(self, model: Any, task: Task) -> None:
        super().__init__(model)
        self._task = task
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    def close(self) -> dict[str, Any] | None:
        """Bytes of weights that a decoding sweep and the first one need."""
        batch = self._task.batch
        return {
            "swept_bytes": swept_bytes(self.model, batch),
            "first_swept_bytes": swept_bytes(self.model, batch * len(self._task.prompt)),
        }


def swept_bytes(model: Any, tokens: int) -> int:
    """Weight bytes that a pass over `tokens` tokens needs: tables of rows count a row a token, all else in full."""
    import torch

    whole: dict[int, int] = {}
    tables: dict[int, int] = {}
    for module in model.modules():
        table = isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False):
            nbytes = parameter.numel() * parameter.element_size()
            if table:
                tables[id(parameter)] = min(nbytes, tokens * parameter.shape[1] * parameter.element_size())
            else:
                whole[id(parameter)] = nbytes
    return sum((tables | whole).values())


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    models = import_transformers(task).AutoModelForCausalLM
    return lambda: MemorySession(models.from_pretrained(task.checkpoint, dtype="auto").eval(), task)
