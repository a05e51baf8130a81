"""AirLLM: a file for each layer, split from the checkpoint once, one layer in memory and one on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("airllm", "torch", "transformers", "accelerate", "safetensors")


def convert(checkpoint: str, target: str) -> None:
    """Split the checkpoint into layers under the folder `target`, which must be there."""
    from airllm import AutoModel

    AutoModel.from_pretrained(checkpoint, device="cpu", layer_shards_saving_path=target)


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    import_transformers(task)
    from airllm import AutoModel

    return lambda: GreedySession(
        AutoModel.from_pretrained(task.checkpoint, device="cpu", layer_shards_saving_path=task.converted)
    )
