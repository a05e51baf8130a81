"""The files of a checkpoint as a source: which of them matter, and what tells one state from another."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from zinfer.errors import CheckpointChangedError, CheckpointError
from zinfer.store.folder import STORE_NAME, describe
from zinfer.store.part_file import PART

logger = logging.getLogger("zinfer")

SMALL_FILE_BYTES = 256 << 20  # a file that is no weight file yet larger than this is left behind
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".ot", ".tflite", ".nemo", ".mlmodel"),
)
OWN_NAMES = ("manifest.json", "manifest.json.done")  # names the store needs for itself in an entry


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint folder as it was when first looked at; symlinks are followed."""

    name: str  # relative to the folder, with "/"
    path: str
    size: int  # bytes
    mtime_ns: int

    def check(self, status: os.stat_result) -> None:
        """Raise CheckpointChangedError unless `status` still shows the file as it was."""
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointChangedError(
                f"{self.path}: changed while it was copied (size {self.size} -> {status.st_size} bytes, "
                f"mtime {self.mtime_ns} -> {status.st_mtime_ns} ns); wait until nothing writes to the "
                "checkpoint and try again"
            )

    def check_now(self) -> None:
        """Look at the path again; CheckpointChangedError unless it is as it was."""
        self.check(_stat(self.path))


def source_file(folder: str, path: str) -> SourceFile:
    """The file at `path` in `folder`. Raises CheckpointError where it is missing."""
    status = _stat(path)
    name = Path(os.path.relpath(path, folder)).as_posix()
    return SourceFile(name, path, status.st_size, status.st_mtime_ns)


def small_files(folder: str, leave: tuple[str, ...] = ()) -> list[SourceFile]:
    """The files beside the weights: configuration, tokenizer, templates, code; also those in subfolders.

    Weight formats, hidden names, names in `leave` and files over SMALL_FILE_BYTES are left out.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in (STORE_NAME, "__pycache__") and name[0] != "."
        )
        for name in sorted(names):
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, folder)
            if name[0] == "." or name.endswith((*WEIGHT_SUFFIXES, PART)) or relative in leave:
                continue
            if relative in OWN_NAMES or not os.path.isfile(path) or os.path.getsize(path) > SMALL_FILE_BYTES:
                logger.warning(
                    "%s: not taken along: the store needs its name, it dangles, or is too large", path
                )
                continue
            found.append(source_file(folder, path))
    return found


def identity_of(kind: str, folder: str, files: list[SourceFile]) -> str:
    """sha256 (hex) over where the source lies and each file's name, size and modification time."""
    facts = [kind, os.path.realpath(folder), sorted((file.name, file.size, file.mtime_ns) for file in files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def readable_name(folder: str) -> str:
    """A short name for `folder`, fit for a file name; for a folder of the hub's cache, the model's."""
    parts = Path(os.path.realpath(folder)).parts
    hub = [part.removeprefix("models--") for part in parts if part.startswith("models--")]
    return safe_name(hub[-1] if hub and "snapshots" in parts else parts[-1])


def safe_name(name: str) -> str:
    """`name` with everything but letters, digits, `.`, `_` and `-` replaced, at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "checkpoint"


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be looked at: {describe(error)}; the checkpoint is incomplete, fetch it again"
        ) from error
