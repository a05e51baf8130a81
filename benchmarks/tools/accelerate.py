"""transformers with accelerate's disk offload: every layer on "disk", all else on "cpu"."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks import BenchmarkError
from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("accelerate", "torch", "transformers", "safetensors")


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    models = import_transformers(task).AutoModelForCausalLM
    import accelerate  # noqa: F401  # so that its import is not counted as loading

    return lambda: GreedySession(
        models.from_pretrained(
            task.checkpoint, dtype="auto", device_map=disk_map(task.checkpoint), offload_folder=task.scratch
        ).eval()
    )


def disk_map(checkpoint: str) -> dict[str, str]:
    """A device_map with every layer on "disk" and all else (embeddings, norm, head) on "cpu"."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    places: dict[str, str] = {}
    for name, child in model.named_children():
        parts = list(child.named_children()) if name == model.base_model_prefix else []
        for inner, part in parts:
            if isinstance(part, torch.nn.ModuleList):
                places |= {f"{name}.{inner}.{index}": "disk" for index in range(len(part))}
            else:
                places[f"{name}.{inner}"] = "cpu"
        if not parts:
            places[name] = "cpu"
    if "disk" not in places.values():
        raise BenchmarkError(f"{type(model).__name__}: no list of layers found to put on the disk")
    return places
