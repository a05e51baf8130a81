"""`zinfer.run`: from a checkpoint, a hub id or a live module to a model that streams its weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn

from zinfer import store
from zinfer.attach import attach
from zinfer.caches_on_host import CachesOnHost
from zinfer.device.attached import AttachedDevice
from zinfer.device.choose import processor_for
from zinfer.errors import OptionError
from zinfer.experts.forward import streams_experts
from zinfer.kv_offload.refusals import check_kv_offload, check_model
from zinfer.locate import bring_to_drive, local_folder
from zinfer.opening import Target
from zinfer.options import REFUSED, checked_dtype
from zinfer.planner.memory import ceilings
from zinfer.planning import predicted_sweep
from zinfer.runtime import Runtime
from zinfer.store.folder import store_roots
from zinfer.streaming import Streaming, check_offload, stream
from zinfer.timeline.recorder import Recorder
from zinfer.weights.checkpoint import open_checkpoint
from zinfer.weights.layout import VECTOR
from zinfer.weights.loading import (
    check_config,
    load_config,
    model_class,
    parameter_slots,
    symbolic_model,
)
from zinfer.weights.safetensors_header import TensorEntry
from zinfer.weights.symbolic import SymbolicTensor

HUB_KEYWORDS = {"revision", "token", "cache_dir", "local_files_only", "force_download", "trust_remote_code"}
MODEL_KEYWORDS = ("attn_implementation", "experts_implementation", "key_mapping", "use_kernels")


def run(
    model: str | os.PathLike[str] | nn.Module,
    *,
    offload: str = "auto",
    nvme_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    device: Any = None,
    dtype: str | torch.dtype = "auto",
    max_memory: Mapping[Any, int | str] | None = None,
    progress: bool | None = None,
    timeline: bool = False,
    kv_offload: str | None = None,
    **options: Any,
) -> Any:
    """A ready model whose weights stream from where they lie, within a memory budget.

    Args:
        model: a local checkpoint folder, a hub id, a live PreTrainedModel, or any nn.Module (whose
            weights are written once under `nvme_path` and dropped from memory).
        offload: "nvme" streams from the drive and keeps resident what fits; "cpu" keeps all weights in
            memory, on a device's host what does not fit there; "none" gives a plain model in memory; "auto" takes
            memory if all fits, else the drive.
        nvme_path: folder on the drive to stream from. None: in place. A checkpoint on another
            filesystem is copied there once; .bin checkpoints are converted there once. A list of two or more
            folders, one on each drive: the checkpoint is written there once, wherever it lies, striped so that
            each read draws on all of them; the small files are in the first.
        device: where to compute: "cpu", "cuda", "cuda:1" or a torch.device; None: the GPU where there is one. Or
            a zinfer.device.staged.StagedProcessor, a pretend device for tests.
        dtype: "auto" (the checkpoint's), a torch dtype or its name; casts on the fly where it differs.
        max_memory: {"cpu": "8GiB", 0: "20GiB"}: ceilings on host memory and on the device's, sizes in bytes or as
            text: for weights, buffers and, where the model computes, key-value caches. Default: what the machine and
            its cgroup, and the device, have free, less headroom for the libraries.
        progress: show bars for copies and loads; None: when stderr is a terminal.
        timeline: record every read, wait and operator (a few microseconds each, at most about 20 MB), for
            model.zinfer.timeline("out.json").
        kv_offload: "cpu" keeps key-value caches in host memory, page-locked, and brings them to the device one layer
            ahead of its operators: the device holds two layers of a cache, the host, of whose budget a quarter is
            kept for it, the rest. For decoder-only models with full or sliding attention, hybrids included. Caches
            that the caller makes stay on the device.
        options: further from_pretrained keywords (revision, token, trust_remote_code, subfolder,
            variant, attn_implementation ...), and config attributes to override.

    Returns the model: a real PreTrainedModel (or the module itself), in eval mode, with a handle
    `.zinfer` (report(), timeline(), close()) and usable in a `with` statement.

    Raises OptionError, BudgetError, CheckpointError, StoreError, DriveError (see zinfer.errors).
    """
    check_offload(offload)
    for name in options:
        if name in REFUSED:
            raise OptionError(f"{name} has no effect in zinfer.run: {REFUSED[name]}")
        if name.startswith("_"):
            raise OptionError(f"{name} is internal to transformers; leave it out")
    show = sys.stderr.isatty() if progress is None else progress
    path = None if nvme_path is None else _folders(nvme_path)
    if not isinstance(timeline, bool):
        raise OptionError(
            f"timeline={timeline!r}: pass True to record, then call model.zinfer.timeline(path) to write the file"
        )
    recorder = Recorder() if timeline else None
    processor = processor_for(device, timed=timeline)
    number = None if processor is None else processor.number
    check_kv_offload(kv_offload, attached=processor is not None)
    target = Target(processor, *ceilings(max_memory, number), kv_offload is not None)
    with torch.inference_mode(False):  # tensors made in inference mode would be of no use outside it
        if isinstance(model, nn.Module):
            return _run_module(model, offload, path, dtype, target, show, options, recorder)
        return _run_checkpoint(_path("model", model), offload, path, dtype, target, show, options, recorder)


def _run_checkpoint(
    name: str,
    offload: str,
    nvme_path: tuple[str, ...] | None,
    dtype: Any,
    target: Target,
    show: bool,
    options: dict[str, Any],
    recorder: Recorder | None,
) -> Any:
    subfolder, variant = options.pop("subfolder", ""), options.pop("variant", None)
    trust = bool(options.get("trust_remote_code"))
    given_config = options.pop("config", None)
    folder = local_folder(name, options, subfolder, variant)
    model_options = {key: options.pop(key) for key in MODEL_KEYWORDS if key in options}
    as_saved = given_config is None and variant is None and set(options) <= HUB_KEYWORDS
    config, unused = (given_config, options) if given_config is not None else load_config(folder, options)
    check_config(config, folder)
    unused.pop("trust_remote_code", None)
    cls = model_class(config, folder, trust)
    before = _written_bytes()
    where = bring_to_drive(folder, variant, nvme_path, offload, show)
    written = 0 if where == folder else _written_bytes() - before
    checkpoint = open_checkpoint(where, variant)
    experts_asked = model_options.get(
        "experts_implementation", getattr(config, "_experts_implementation", None)
    )
    model = symbolic_model(checkpoint, config, cls, checked_dtype(dtype), {**unused, **model_options})
    if target.kv_offload:
        check_model(model)
    by_expert = streams_experts(experts_asked, offload)
    streaming = stream(
        model, offload=offload, target=target, progress=show, recorder=recorder, by_expert=by_expert
    )
    caches = _caches(model, streaming, target, recorder)
    predict = None
    if as_saved and not target.kv_offload:
        plan_options = {**model_options, **({"trust_remote_code": True} if trust else {})}
        predict = partial(
            predicted_sweep,
            where,
            (streaming.host or streaming.account).ceiling,
            offload,
            checked_dtype(dtype),
            plan_options,
            processor=target.processor,
            on_device=streaming.account.ceiling if streaming.host is not None else 0,
        )
    return attach(
        model,
        Runtime(model, streaming, where, offload, written, recorder=recorder, caches=caches, predict=predict),
    )


def _run_module(
    module: nn.Module,
    offload: str,
    nvme_path: tuple[str, ...] | None,
    dtype: Any,
    target: Target,
    show: bool,
    options: dict[str, Any],
    recorder: Recorder | None,
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
        raise OptionError("this module streams already, or did until close(); load it again")
    if isinstance(module, torch.jit.ScriptModule):
        raise OptionError(
            "a scripted module keeps its weights out of Python's reach; pass the module it came from"
        )
    if target.kv_offload:
        check_model(module)
    before = _written_bytes()
    entry, stored = store.save_module(module, nvme_path, progress=show)
    written = _written_bytes() - before
    checkpoint = open_checkpoint(entry)
    originals: list[tuple[dict[str, Any], str, Any]] = [
        (owner._parameters, attribute, tensor)
        for owner, attribute, _, tensor, is_parameter in parameter_slots(module)
        if is_parameter
    ]
    symbolic: dict[int, Any] = {}
    try:
        for owner, attribute, full_name, tensor, is_parameter in list(parameter_slots(module)):
            if is_parameter:
                if id(tensor) not in symbolic:
                    symbolic[id(tensor)] = _stand_in(tensor, checkpoint.tensors[stored[full_name]])
                owner._parameters[attribute] = symbolic[id(tensor)]
        streaming = stream(
            module, offload=offload, target=target, progress=show, allocated=True, recorder=recorder
        )
        try:
            caches = _caches(module, streaming, target, recorder)
            attach(
                module,
                Runtime(module, streaming, entry, offload, written, recorder=recorder, caches=caches),
            )
        except BaseException:
            streaming.coordinator.close()
            raise
    except BaseException:  # the module works on with its old weights
        for parameters, attribute, tensor in originals:
            parameters[attribute] = tensor
        raise
    return module.eval()


def _caches(
    model: Any, streaming: Streaming, target: Target, recorder: Recorder | None
) -> CachesOnHost | None:
    if not target.kv_offload:
        return None
    device = streaming.coordinator.device
    assert isinstance(device, AttachedDevice) and streaming.host is not None
    return CachesOnHost(model, device, streaming.host, model.dtype.itemsize, recorder)


def _stand_in(tensor: torch.Tensor, entry: TensorEntry) -> SymbolicTensor:
    """The live parameter `tensor`, to be read from `entry`: same strides, same address modulo a vector."""
    stand_in: Any = SymbolicTensor.of(entry, tensor.data_ptr() % VECTOR if tensor.numel() else None)
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim])
        back = sorted(range(tensor.dim()), key=order.__getitem__)
        stand_in = stand_in.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
    return stand_in.requires_grad_(tensor.requires_grad)


def _written_bytes() -> int:
    """Bytes that this process has written to files so far."""
    written: int = psutil.Process().io_counters().write_chars
    return written


def _path(option: str, value: Any) -> str:
    """`value` as text. Raises OptionError for what is no path."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise OptionError(f"{option}={value!r} is not a path (or hub id)")
    return path


def _folders(nvme_path: Any) -> tuple[str, ...]:
    """The folders that `nvme_path`, one path or a sequence of them, names. Raises OptionError and StoreError."""
    several = isinstance(nvme_path, Sequence) and not isinstance(nvme_path, (str, bytes, bytearray))
    folders = tuple(_path("nvme_path", path) for path in (nvme_path if several else (nvme_path,)))
    store_roots(folders)  # now, before anything is downloaded or written
    return folders
