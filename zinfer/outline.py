"""A model to plan for: a checkpoint's headers, or, for a config alone, the files that its checkpoint would have.

No weight is read, and none is downloaded: of a hub id only the config is fetched.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from zinfer.errors import CheckpointError, OptionError
from zinfer.synth.inventory import take_inventory
from zinfer.synth.shapes import SHAPES, resolve_config
from zinfer.synth.writer import plan_shards
from zinfer.weights.checkpoint import Checkpoint, find_shards, open_checkpoint
from zinfer.weights.loading import (
    HUB_KEYWORDS,
    REFUSALS,
    check_config,
    load_config,
    model_class,
    symbolic_model,
)
from zinfer.weights.safetensors_header import TensorEntry
from zinfer.wording import brief

SHARD_BYTES = 5_000_000_000  # as `zinfer synth` and the hub's tools split


@dataclass(frozen=True)
class Outline:
    """`model`: a symbolic one, no byte of it read. `folder`: where its checkpoint lies, None for a config alone.

    `experts_asked`: the experts implementation that the user asked for, if any.
    """

    name: str
    model: Any
    folder: str | None
    dtype: str
    experts_asked: str | None = None


def outline_of(model: Any, dtype: Any, options: dict[str, Any]) -> Outline:
    """The outline of `model`: a checkpoint's folder, a folder or file with a config, a built-in shape, a hub id, or a
    config object.

    `dtype` as for zinfer.run; of a config alone it is the dtype of the checkpoint to be. `options`: further
    from_pretrained keywords: a folder of weights takes those that shape its model, anything else takes none. Raises
    CheckpointError and OptionError.
    """
    if isinstance(model, nn.Module):
        raise OptionError(
            "a live module has its weights in memory; plan for its config: zinfer.plan(model.config)"
        )
    if isinstance(model, transformers.PreTrainedConfig):
        _refuse(options, "a config object")
        return _from_config(copy.deepcopy(model), type(model).__name__, dtype)
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name or "\0" in name:
        raise OptionError(f"model={brief(model)} is no path, shape, hub id or config")
    if os.path.isdir(name) and find_shards(name) is not None:
        return _from_checkpoint(name, dtype, options)
    _refuse(options, name)
    if os.path.exists(name):
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise CheckpointError(f"{name}: neither config.json nor model.safetensors in it")
        return _from_config(resolve_config(name), name, dtype)
    if name in SHAPES:
        return _from_config(resolve_config(name), name, dtype)
    return _from_config(_hub_config(name), name, dtype)


def _refuse(options: dict[str, Any], name: str) -> None:
    if options:
        raise OptionError(f"{sorted(options)} has no effect: {name} is planned for from its config alone")


def _from_checkpoint(folder: str, dtype: Any, options: dict[str, Any]) -> Outline:
    without_effect = sorted({*HUB_KEYWORDS, "subfolder", "variant", "config"} & options.keys())
    if without_effect:
        raise OptionError(
            f"{without_effect} has no effect: {folder} is a local folder, planned for as it is; name the folder that "
            "has the config and the weights to plan for"
        )
    config, unused = load_config(folder, dict(options))
    check_config(config, folder)
    unused.pop("trust_remote_code", None)
    cls = model_class(config, folder, bool(options.get("trust_remote_code")))
    asked = options.get("experts_implementation", getattr(config, "_experts_implementation", None))
    model: Any = symbolic_model(open_checkpoint(folder), config, cls, dtype, unused)
    return Outline(os.path.basename(os.path.abspath(folder)), model, folder, _name_of(model.dtype), asked)


def _from_config(config: Any, name: str, dtype: Any) -> Outline:
    check_config(config, name)
    asked = getattr(config, "_experts_implementation", None)
    wanted = dtype if isinstance(dtype, torch.dtype) else _config_dtype(config)
    config.dtype = wanted
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            part.dtype = wanted
    inventory = take_inventory(config, wanted, seed=None)
    cls = type(inventory.model)
    checkpoint = _checkpoint_to_be(inventory.tensors, name)
    del inventory
    return Outline(name, symbolic_model(checkpoint, config, cls, wanted, {}), None, _name_of(wanted), asked)


def _config_dtype(config: Any) -> torch.dtype:
    found = config.dtype or config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _checkpoint_to_be(tensors: Any, name: str) -> Checkpoint:
    """The entries that `zinfer synth` would write for `tensors`, in files that do not exist."""
    folder = os.path.join(os.sep, "nowhere", re.sub(r"[^\w.-]+", "_", name))
    entries: dict[str, TensorEntry] = {}
    shards = plan_shards(tensors, SHARD_BYTES)
    for shard in shards:
        path, offset = os.path.join(folder, shard.filename), len(shard.header)
        for _, spec in shard.tensors:
            entries[spec.name] = TensorEntry(spec.name, path, offset, spec.nbytes, spec.dtype, spec.shape)
            offset += spec.nbytes
    return Checkpoint(folder, tuple(os.path.join(folder, shard.filename) for shard in shards), entries)


def _hub_config(name: str) -> Any:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise OptionError(
            f"{brief(name)} is neither a folder, a config.json, a hub id (OWNER/NAME), nor a built-in shape; the "
            f"built-in shapes are {', '.join(SHAPES)}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except REFUSALS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such folder, and no config of it can be had from the hub ({reason}); check the name and "
            "the token, or give a config.json"
        ) from error


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
