"""transformers with all weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("torch", "transformers", "safetensors")
CACHE_LINE = 64  # bytes


class MemorySession(GreedySession):
    """Weights copied out of the checkpoint's mapping, whose pages the kernel may drop.

    Each keeps its address modulo a cache line: products with weights that straddle lines, as most do in a
    safetensors file, take some 6 % longer, and that is how from_pretrained leaves them.
    """

    def __init__(self, model: Any, task: Task) -> None:
        super().__init__(model)
        self._task = task
        for parameter in model.parameters():
            parameter.data = copied(parameter.data)

    def close(self) -> dict[str, Any] | None:
        """Bytes of weights that a decoding sweep and the first one need."""
        batch = self._task.batch
        return {
            "swept_bytes": swept_bytes(self.model, batch),
            "first_swept_bytes": swept_bytes(self.model, batch * len(self._task.prompt)),
        }


def copied(tensor: Any) -> Any:
    """A copy of a contiguous `tensor` at the same address modulo CACHE_LINE."""
    import torch

    block = torch.empty(tensor.nbytes + CACHE_LINE, dtype=torch.uint8)
    start = (tensor.data_ptr() - block.data_ptr()) % CACHE_LINE
    copy = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


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
