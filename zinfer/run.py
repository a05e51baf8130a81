"""`zinfer.run`: from a checkpoint, a hub id or a live module to a model that streams its weights."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zinfer import store
from zinfer.errors import CheckpointError, OptionError
from zinfer.plan.memory import cpu_ceiling
from zinfer.runtime import Runtime, attach
from zinfer.streaming import check_offload, stream
from zinfer.weights.checkpoint import find_shards, open_checkpoint
from zinfer.weights.loading import HUB_KEYWORDS, load_config, model_class, parameter_slots, symbolic_model
from zinfer.weights.symbolic import SymbolicTensor

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
    "tp_plan": "zinfer runs on one device",
    "distributed_config": "zinfer runs on one device",
    "use_safetensors": "zinfer takes safetensors where there are any",
    "weights_only": ".bin files are always read with weights_only",
    "ignore_mismatched_sizes": "zinfer never invents weights",
    "output_loading_info": "a checkpoint that does not match is an error",
}
MODEL_KEYWORDS = ("attn_implementation", "experts_implementation", "key_mapping", "use_kernels")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken"]


def run(
    model: str | os.PathLike[str] | nn.Module,
    *,
    offload: str = "auto",
    nvme_path: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    max_memory: Mapping[Any, int | str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Any:
    """A ready model whose weights stream from where they lie, within a memory budget.

    Args:
        model: a local checkpoint folder, a hub id, a live PreTrainedModel, or any nn.Module (whose
            weights are written once under `nvme_path` and dropped from memory).
        offload: "nvme" streams from the drive and keeps resident what fits; "cpu" keeps all weights in
            host memory; "none" gives a plain model in memory; "auto" takes memory if all fits, else the
            drive.
        nvme_path: folder on the drive to stream from. None: in place. A checkpoint on another
            filesystem is copied there once; .bin checkpoints are converted there once.
        device: where to compute; this version computes on "cpu" (None means that too).
        dtype: "auto" (the checkpoint's), a torch dtype or its name; casts on the fly where it differs.
        max_memory: {"cpu": "8GiB"}: ceiling on all that zinfer allocates, sizes in bytes or as text.
            Default: what the machine and its cgroup have free, less headroom for activations.
        progress: show bars for copies and loads; None: when stderr is a terminal.
        options: further from_pretrained keywords (revision, token, trust_remote_code, subfolder,
            variant, attn_implementation ...), and config attributes to override.

    Returns the model: a real PreTrainedModel (or the module itself), in eval mode, with a handle
    `.zinfer` (report(), close()) and usable in a `with` statement.

    Raises OptionError, BudgetError, CheckpointError, StoreError, DriveError (see zinfer.errors).
    """
    check_offload(offload)
    _check_device(device)
    ceiling = cpu_ceiling(max_memory)
    for name in options:
        if name in REFUSED:
            raise OptionError(f"{name} has no effect in zinfer.run: {REFUSED[name]}")
    show = sys.stderr.isatty() if progress is None else progress
    path = None if nvme_path is None else os.fspath(nvme_path)
    if isinstance(model, nn.Module):
        return _run_module(model, offload, path, dtype, ceiling, show, options)
    return _run_checkpoint(os.fspath(model), offload, path, dtype, ceiling, show, options)


def _run_checkpoint(
    name: str, offload: str, nvme_path: str | None, dtype: Any, ceiling: int | None, show: bool, options: dict[str, Any]
) -> Any:
    subfolder, variant = options.pop("subfolder", ""), options.pop("variant", None)
    trust = bool(options.get("trust_remote_code"))
    given_config = options.pop("config", None)
    folder = local_folder(name, options, subfolder, variant)
    model_options = {key: options.pop(key) for key in MODEL_KEYWORDS if key in options}
    config, unused = (given_config, options) if given_config is not None else load_config(folder, options)
    unused.pop("trust_remote_code", None)
    cls = model_class(config, folder, trust)
    where = _bring_to_drive(folder, variant, nvme_path, offload, show)
    checkpoint = open_checkpoint(where, variant)
    model = symbolic_model(checkpoint, config, cls, _dtype(dtype), {**unused, **model_options})
    streaming = stream(model, offload=offload, ceiling=ceiling, progress=show)
    return attach(model, Runtime(model, streaming, where, offload, 0))


def _run_module(
    module: nn.Module,
    offload: str,
    nvme_path: str | None,
    dtype: Any,
    ceiling: int | None,
    show: bool,
    options: dict[str, Any],
) -> nn.Module:
    if options or dtype != "auto":
        raise OptionError(
            f"{sorted(options) or 'dtype'} has no effect on a live module; change the module before zinfer.run"
        )
    if offload in ("cpu", "none"):
        raise OptionError(f"offload={offload!r} has no effect on a live module: it is in memory already")
    if nvme_path is None:
        raise OptionError("a live module's weights are written to the drive once: pass nvme_path=")
    if hasattr(module, "zinfer"):
        raise OptionError("this module already streams; close() it, or load it again")
    entry, stored = store.save_module(module, nvme_path, progress=show)
    checkpoint = open_checkpoint(entry)
    originals = [(owner, attr, tensor) for owner, attr, _, tensor, is_param in parameter_slots(module) if is_param]
    symbolic: dict[int, SymbolicTensor] = {}
    try:
        for owner, attribute, full_name, tensor, is_parameter in list(parameter_slots(module)):
            if is_parameter:
                if id(tensor) not in symbolic:
                    stand_in = SymbolicTensor.of(checkpoint.tensors[stored[full_name]])
                    symbolic[id(tensor)] = stand_in.requires_grad_(tensor.requires_grad)
                owner._parameters[attribute] = symbolic[id(tensor)]  # type: ignore[assignment]
        streaming = stream(module, offload=offload, ceiling=ceiling, progress=show, allocated=True)
    except BaseException:
        for owner, attribute, tensor in originals:
            owner._parameters[attribute] = tensor  # type: ignore[assignment]
        raise
    written = sum(entry_.length for entry_ in checkpoint.tensors.values())
    return attach(module.eval(), Runtime(module, streaming, entry, offload, written))


def _check_device(device: str | torch.device | None) -> None:
    try:
        kind = "cpu" if device is None else torch.device(device).type
    except RuntimeError as error:
        raise OptionError(f"device={device!r}: {error}") from error
    if kind != "cpu":
        raise OptionError(f"device={device!r}: this version computes on the CPU; leave device out")


def _dtype(dtype: str | torch.dtype) -> Any:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"dtype={dtype!r} is not a torch dtype; write for example 'bfloat16' or 'auto'")
    return found


def local_folder(name: str, options: dict[str, Any], subfolder: str = "", variant: str | None = None) -> str:
    """The local folder of `name`; downloads it into the hub's cache when it is a hub id.

    Takes the HUB_KEYWORDS out of `options`. Raises CheckpointError, and OptionError for one without effect.
    """
    hub = {key: options.pop(key) for key in HUB_KEYWORDS if key in options}
    if os.path.isdir(name):
        if hub:
            raise OptionError(f"{sorted(hub)} has no effect: {name} is a local folder")
        return os.path.join(name, subfolder) if subfolder else name
    if os.path.exists(name):
        raise CheckpointError(f"{name}: not a folder; give the folder that holds config.json and the shards")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder")
    root = _download(name, hub, [*HUB_FILES, "*.safetensors"])
    folder = os.path.join(root, subfolder) if subfolder else root
    if find_shards(folder, variant) is None:
        _download(name, hub, [*HUB_FILES, "pytorch_model*.bin"])
    return folder


def _download(name: str, hub: dict[str, Any], patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=patterns, **hub)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{name}: neither a local folder nor available from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the name, the token, or download it first"
        ) from error


def _bring_to_drive(folder: str, variant: str | None, nvme_path: str | None, offload: str, show: bool) -> str:
    """The folder to stream from: `folder`, or its copy or conversion under `nvme_path`."""
    if find_shards(folder, variant) is None:
        if not any(name.startswith("pytorch_model") and name.endswith(".bin") for name in os.listdir(folder)):
            raise CheckpointError(f"{folder}: no model.safetensors, no index and no pytorch_model.bin in it")
        if nvme_path is None:
            raise OptionError(f"{folder} holds .bin files, which are converted once: pass nvme_path=")
        return store.convert_bin(folder, nvme_path, variant=variant, progress=show)
    if nvme_path is None:
        return folder
    if offload in ("cpu", "none"):
        raise OptionError(f"nvme_path has no effect with offload={offload!r}; leave it out")
    return store.copy_checkpoint(folder, nvme_path, variant=variant, progress=show)
