"""Options that zinfer.run and zinfer.plan have in common, and what they refuse in the same words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from zinfer.errors import OptionError
from zinfer.wording import brief

# from_pretrained keywords that decide what zinfer decides, or that it would silently ignore.
REFUSED = {
    "device_map": "zinfer places the weights; use offload= and max_memory=",
    "offload_folder": "zinfer reads the checkpoint in place; use nvme_path=",
    "offload_state_dict": "zinfer never holds a whole state dict",
    "offload_buffers": "buffers stay in memory",
    "low_cpu_mem_usage": "zinfer reads no weight at load",
    "state_dict": "pass the checkpoint's folder, or a live module",
    "quantization_config": "quantised streaming is not supported yet",
    "load_in_8bit": "quantised streaming is not supported yet",
    "load_in_4bit": "quantised streaming is not supported yet",
    "gguf_file": "only safetensors and .bin checkpoints are supported",
    "torch_dtype": "use dtype=",
    "proxies": "set HTTPS_PROXY in the environment",
    "tp_plan": "zinfer runs on one device",
    "distributed_config": "zinfer runs on one device",
    "use_safetensors": "zinfer takes safetensors where there are any",
    "weights_only": ".bin files are always read with weights_only",
    "ignore_mismatched_sizes": "zinfer never invents weights",
    "output_loading_info": "a checkpoint that does not match is an error",
    "adapter_kwargs": "adapters are not loaded; merge them into the checkpoint",
    "adapter_name": "adapters are not loaded; merge them into the checkpoint",
    "tp_size": "zinfer runs on one device",
    "device_mesh": "zinfer runs on one device",
    "tqdm_class": "use progress=",
    "mirror": "transformers ignores it; set HF_ENDPOINT",
    "from_tf": "only safetensors and .bin checkpoints are supported",
    "from_flax": "only safetensors and .bin checkpoints are supported",
}


def check_options(options: Iterable[str], function: str) -> None:
    """Raises OptionError for a from_pretrained keyword that `function` ("zinfer.plan") would silently ignore."""
    for name in options:
        if name in REFUSED:
            raise OptionError(f"{name} has no effect in {function}: {REFUSED[name]}")
        if name.startswith("_"):
            raise OptionError(f"{name} is internal to transformers; leave it out")


def checked_dtype(dtype: Any) -> Any:
    """A torch dtype, or "auto". Raises OptionError for anything but a floating-point one, or its name."""
    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(
            f"dtype={brief(dtype)} is no floating-point dtype of torch; write for example 'bfloat16' or 'auto'"
        )
    return found
