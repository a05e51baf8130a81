"""transformers with all weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("torch", "transformers", "safetensors")


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    models = import_transformers(task).AutoModelForCausalLM
    return lambda: GreedySession(models.from_pretrained(task.checkpoint, dtype="auto").eval())
