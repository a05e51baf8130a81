"""Build a transformers model whose parameters are symbolic, through transformers' own loader."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from zinfer.errors import CheckpointError, OptionError
from zinfer.weights.checkpoint import Checkpoint
from zinfer.weights.symbolic import SymbolicTensor

# from_pretrained keywords that say where files come from; they reach the config and the tokenizer, not the model.
HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def load_config(folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config in `folder` with `options` applied, and the options it did not use."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(f"{folder}: no config.json in it; a checkpoint folder has one beside its shards")
    try:
        config, unused = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder}/config.json: the checkpoint is pre-quantised, which zinfer does not stream yet; "
            "use the unquantised checkpoint"
        )
    return config, unused


def model_class(config: Any, folder: str, trust_remote_code: bool) -> type[nn.Module]:
    """The class that `config.architectures` names: transformers' own, or the checkpoint's with trust."""
    names = getattr(config, "architectures", None) or []
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        reference = next(
            (ref for auto, ref in auto_map.items() if auto.startswith("AutoModel") and ref.split(".")[-1] in names),
            None,
        )
        if reference:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(reference, folder)
    for name in names:
        if found := getattr(transformers, name, None):
            return found
    if not names:
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            if type(config) in auto._model_mapping:
                return auto._model_mapping[type(config)]
    raise CheckpointError(
        f"{folder}/config.json: architectures {names} are unknown to transformers {transformers.__version__}; "
        "upgrade transformers, or pass trust_remote_code=True if the checkpoint brings its own code"
    )


def symbolic_model(
    checkpoint: Checkpoint, config: Any, cls: type[nn.Module], dtype: Any, options: dict[str, Any]
) -> nn.Module:
    """A `cls` whose loaded parameters and buffers are SymbolicTensors. Reads no weight byte.

    Raises CheckpointError for tensors that the checkpoint lacks or that have another shape, and
    OptionError for an option nobody takes.
    """
    state = {name: SymbolicTensor.of(entry) for name, entry in checkpoint.tensors.items()}
    with _quiet_progress():
        try:
            model, info = cls.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise OptionError(f"{error}; zinfer passes options it does not know to from_pretrained") from error
            raise
    _refuse_mismatches(checkpoint, info)
    _refuse_missing(checkpoint, model, info)
    model.config.name_or_path = model.name_or_path = checkpoint.folder
    if model.can_generate():
        with contextlib.suppress(OSError):  # most checkpoints have no generation_config.json
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def _refuse_mismatches(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    for name, found, wanted in info["mismatched_keys"]:
        raise CheckpointError(
            f"{_file_of(checkpoint, name)}: tensor {name!r} has shape {list(found)}, the config asks for "
            f"{list(wanted)}; config.json and the weights do not belong together"
        )


def _refuse_missing(checkpoint: Checkpoint, model: nn.Module, info: dict[str, Any]) -> None:
    unread = {name for name, param in model.named_parameters() if not isinstance(param, SymbolicTensor)}
    missing = sorted(unread | set(info["missing_keys"]))
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{checkpoint.folder}: the checkpoint lacks {len(missing)} tensor(s) of {type(model).__name__}: "
            f"{shown}; zinfer never invents weights, use a checkpoint saved from this architecture"
        )


def _file_of(checkpoint: Checkpoint, name: str) -> str:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        tail = ".".join(name.split(".")[-3:])
        entry = next((e for e in checkpoint.tensors.values() if e.name.endswith(tail)), None)
    return entry.path if entry else checkpoint.folder


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """transformers' bar counts tensors it does not read; it would only mislead."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def parameter_slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor, bool]]:
    """(module, attribute, full name, tensor, is_parameter) of every parameter and buffer, ties repeated."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield module, name, dot + name, param, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, dot + name, buffer, False
