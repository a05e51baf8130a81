"""Write a synthetic checkpoint: config, tokenizer and seeded random weights, all or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from zinfer.errors import OptionError, StoreError
from zinfer.synth.inventory import Inventory, model_class, take_inventory
from zinfer.synth.shapes import resolve_config
from zinfer.synth.skew import check_skew, skewed
from zinfer.synth.tokenizer import byte_tokenizer, settle_special_ids
from zinfer.synth.values import Values
from zinfer.synth.writer import Shard, ShardWriter, index_of, plan_shards

logger = logging.getLogger(__name__)

RECORD = "synth.json"
SPARE_BYTES = 64 << 20  # left free on the drive: tokenizer, index, the file system's own needs
_FORMAT = 1  # raise when the same config and seed give other bytes
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def synthesise(
    config: str | PreTrainedConfig,
    out: str,
    *,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    layers: int | None = None,
    router_skew: str = "none",
    progress: bool = True,
) -> str:
    """Write a checkpoint of `config` with random weights into the folder `out`; returns `out`.

    `config` is one of `SHAPES`, a config.json, a folder with one, or a config object (left as it is).
    `dtype` is float32, float16 or bfloat16; default the config's own, else bfloat16. `layers` overrides the
    number of layers. `router_skew`: "none", "mild" or "strong": how much a mixture's routers favour some experts over
    others (see skew.py). Shards hold up to `shard_bytes` bytes (more only for one larger tensor). The same
    arguments give the same bytes; `out` that holds them already is returned at once. Memory use does not
    grow with the model. What is not finished leaves nothing behind.

    Raises OptionError (unknown config or option, `out` holds something else), CheckpointError (the config
    is unreadable or its architecture unknown), StoreError (no room on the drive, or it cannot be written).
    """
    if shard_bytes < 1:
        raise OptionError(f"shard_bytes={shard_bytes}: a shard holds at least one byte")
    if seed < 0:
        raise OptionError(f"seed={seed}: a seed is not negative")
    check_skew(router_skew)
    resolved = resolve_config(config, layers)
    wanted = _dtype(dtype, resolved)
    _prepare(resolved, wanted)
    record = _record(resolved, seed, wanted, shard_bytes, router_skew)
    if _is_finished(out, record):
        logger.info("%s holds this checkpoint already", out)
        return out
    inventory = skewed(take_inventory(resolved, wanted, seed), router_skew, seed)
    shards = plan_shards(inventory.tensors, shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    target = os.path.abspath(out)
    partial = f"{target}.{os.getpid()}.partial"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _refuse_full_drive(os.path.dirname(target), out, total)
        os.mkdir(partial)
    except OSError as error:
        raise _store_error(error, out, total) from error
    try:
        _write_weights(partial, shards, Values(seed), total, progress)
        _write_rest(partial, inventory, shards, record)
        os.rename(partial, target)
    except OSError as error:
        raise _store_error(error, out, total) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig) -> torch.dtype:
    chosen = dtype if dtype is not None else (config.dtype or config.get_text_config().dtype or "bfloat16")
    name = str(chosen).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError(f"dtype={name!r}: weights are written as {', '.join(_DTYPES)}; pass one of them")
    return _DTYPES[name]


def _prepare(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Make the config that of the checkpoint to be: class, dtype, special ids; not quantised."""
    config.architectures = [model_class(config).__name__]
    if getattr(config, "quantization_config", None) is not None:
        logger.warning(
            "the config is of a quantised checkpoint; its weights are written as %s instead", dtype
        )
        del config.quantization_config
    config.dtype = dtype
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            part.dtype = dtype
    settle_special_ids(config)


def _record(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype, shard_bytes: int, router_skew: str
) -> dict[str, Any]:
    fields = copy.deepcopy(config).to_dict()
    for volatile in ("transformers_version", "_name_or_path"):
        fields.pop(volatile, None)
    text = json.dumps(fields, sort_keys=True, default=str)
    return {
        "format": _FORMAT,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_bytes": shard_bytes,
        **({} if router_skew == "none" else {"router_skew": router_skew}),
    }


def _is_finished(out: str, record: dict[str, Any]) -> bool:
    """Whether `out` holds this very checkpoint. Raises OptionError when it holds anything else."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    try:
        with open(os.path.join(out, RECORD), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and {k: v for k, v in found.items() if k != "files"} == record:
        files = found.get("files", {})
        if all(_size(os.path.join(out, name)) == size for name, size in files.items()):
            return True
    raise OptionError(
        f"{out}: not empty and not this synthetic checkpoint (config, seed, dtype or shard size differ, or "
        "files were altered); nothing is overwritten: choose another folder or remove this one"
    )


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1


def _refuse_full_drive(parent: str, out: str, total: int) -> None:
    free = shutil.disk_usage(parent).free
    if total + SPARE_BYTES > free:
        raise StoreError(
            f"{out}: the checkpoint needs {total + SPARE_BYTES} bytes, the drive has {free} free; free some "
            "space, choose another drive, or pass fewer layers"
        )


def _store_error(error: OSError, out: str, total: int) -> StoreError:
    if isinstance(error, StoreError):
        return error
    return StoreError(
        f"{out}: writing the checkpoint of {total} bytes failed: {error}; what was written is removed again"
    )


def _write_weights(folder: str, shards: list[Shard], values: Values, total: int, progress: bool) -> None:
    with tqdm(
        total=total, desc="synth", unit="B", unit_scale=True, delay=2.0, disable=None if progress else True
    ) as bar:
        writer = ShardWriter(bar.update)
        try:
            for shard in shards:
                writer.write(folder, shard, values.chunks)
        finally:
            writer.close()


def _write_rest(folder: str, inventory: Inventory, shards: list[Shard], record: dict[str, Any]) -> None:
    config, model = inventory.model.config, inventory.model
    if len(shards) > 1:
        _write_json(folder, "model.safetensors.index.json", index_of(shards))
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if (tokenizer := byte_tokenizer(config)) is not None:
        tokenizer.save_pretrained(folder)
    files = {shard.filename: shard.nbytes for shard in shards}
    _write_json(folder, RECORD, {**record, "files": files})


def _write_json(folder: str, filename: str, content: dict[str, Any]) -> None:
    with open(os.path.join(folder, filename), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
