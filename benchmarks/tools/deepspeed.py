"""DeepSpeed ZeRO-3 with parameters on NVMe, as its own ZeRO-Inference example sets it up, on the CPU.

Loading writes every weight to swap files. The buffers hold whole parameters and are sized in elements.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("deepspeed", "torch", "transformers", "accelerate", "safetensors")
BUFFERS = 6
AIO = {
    "block_size": 1 << 20,
    "queue_depth": 32,
    "intra_op_parallelism": 2,
    "single_submit": False,
    "overlap_events": True,
}


def settings(hidden: int, largest: int, batch: int, scratch: str | None) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of this width whose largest parameter has `largest` elements."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden * hidden,
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 2 * largest,
            "offload_param": {
                "device": "nvme",
                "nvme_path": scratch,
                "pin_memory": True,
                "buffer_count": BUFFERS,
                "buffer_size": largest,
            },
        },
        "aio": AIO,
    }


def largest_parameter(checkpoint: str) -> int:
    """Elements of the largest tensor in the checkpoint, from the headers of its files."""
    most = 0
    for path in Path(checkpoint).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                most = max(most, (last - first) // 2)  # bf16
    return most


def start() -> None:
    """Compile DeepSpeed's operators into the venv, or load them; make this process the only one of its group.

    One process at a time uses the venv, so a lock on the operators is that of one that was killed: it goes.
    """
    operators = Path(sys.prefix, "torch_extensions")
    for lock in operators.rglob("lock"):
        lock.unlink()
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "TORCH_EXTENSIONS_DIR": str(operators)}
    # DeepSpeed asks ninja whether its operators are compiled.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)
    deepspeed.init_distributed("gloo")


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    transformers = import_transformers(task)
    start()
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    torch.set_num_threads(task.threads)  # the import of deepspeed changes it
    hidden = transformers.AutoConfig.from_pretrained(task.checkpoint).hidden_size
    chosen = settings(hidden, largest_parameter(task.checkpoint), task.batch, task.scratch)

    def load() -> Session:
        keep = HfDeepSpeedConfig(chosen)  # from_pretrained looks for it while it lives
        model = transformers.AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.bfloat16)
        engine = deepspeed.initialize(model=model.eval(), config_params=chosen)[0]
        engine.module.eval()
        del keep
        return GreedySession(engine.module)

    return load
