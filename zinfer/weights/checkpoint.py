"""Find a checkpoint's shards and tensors in a folder, from its index and headers alone."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zinfer.errors import CheckpointError
from zinfer.weights.safetensors_header import TensorEntry, quote, read_header

PATH_MAX = 4096  # bytes, of Linux


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face layout and the tensors its safetensors shards hold."""

    folder: str
    shards: tuple[str, ...]
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.length for entry in self.tensors.values())


def find_shards(folder: str, variant: str | None = None) -> tuple[str, ...] | None:
    """Paths of the safetensors shards in `folder`, or None where there are none.

    An index wins over a single file, as in transformers. Raises CheckpointError for a broken index.
    """
    shards = expected_shards(folder, variant)
    found = os.path.lexists(_index_path(folder, variant)) or os.path.lexists(shards[0])
    return shards if found else None


def expected_shards(folder: str, variant: str | None = None) -> tuple[str, ...]:
    """Paths of the shards that the index in `folder` names, or of the single file where there is no index."""
    index = _index_path(folder, variant)
    if os.path.lexists(index):
        return tuple(sorted(set(read_index(index).values())))
    return (os.path.join(folder, f"model.{variant}.safetensors" if variant else "model.safetensors"),)


def open_checkpoint(folder: str, variant: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`; reads headers only.

    Raises CheckpointError when the folder, a shard, or a tensor the index names is absent or malformed.
    """
    shards = find_shards(folder, variant)
    if shards is None:
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")
    headers = {shard: read_header(shard) for shard in shards}
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    index = _index_path(folder, variant)
    for name, shard in read_index(index).items() if os.path.lexists(index) else ():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{shard}: the index places tensor {quote(name)} in this shard, which lacks it; "
                "fetch the checkpoint again"
            )
        tensors[name] = headers[shard][name]
    return Checkpoint(folder, shards, tensors)


def _index_path(folder: str, variant: str | None) -> str:
    return os.path.join(folder, f"model.safetensors.index{f'.{variant}' if variant else ''}.json")


def read_index(index: str) -> dict[str, str]:
    """Tensor name -> shard path, every path checked to stay inside the index's folder. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; fetch the file again")
    paths = {}
    for name, file in weight_map.items():
        if not is_inside(file):
            raise CheckpointError(
                f"{index}: tensor {quote(name)} points to {quote(file)}, which leaves the checkpoint's folder "
                "or is no file name; do not trust this checkpoint"
            )
        paths[name] = str(Path(index).parent / file)
    return paths


def is_inside(file: Any) -> bool:
    """Whether `file`, read from a file in some folder, is the name of a file in or below that folder."""
    if not isinstance(file, str) or not file or "\0" in file:
        return False
    try:
        if len(os.fsencode(file)) >= PATH_MAX:
            return False
    except UnicodeEncodeError:  # half a surrogate pair: JSON can spell it, no file system can
        return False
    return not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError when it is absent, unreadable or not an object."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
            raise CheckpointError(f"{path}: not a regular file; fetch it again")
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return value
