"""Where a checkpoint is: a local folder, the hub's cache, or what the store holds of it on the drive."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from zinfer import store
from zinfer.errors import CheckpointError, OptionError
from zinfer.weights.checkpoint import expected_shards, find_shards
from zinfer.weights.loading import HUB_KEYWORDS
from zinfer.weights.packed import read_pack

HUB_FILES = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken"]


def local_folder(name: str, options: dict[str, Any], subfolder: str = "", variant: str | None = None) -> str:
    """The local folder of `name`; downloads it into the hub's cache when it is a hub id.

    Takes the HUB_KEYWORDS out of `options`. Raises CheckpointError, and OptionError for one without effect.
    """
    hub = {key: options.pop(key) for key in HUB_KEYWORDS if key in options}
    if os.path.isdir(name):
        if hub:
            raise OptionError(f"{sorted(hub)} has no effect: {name} is a local folder")
        folder = os.path.join(name, subfolder) if subfolder else name
        _refuse_members(folder)
        return folder
    if os.path.exists(name):
        raise CheckpointError(f"{name}: not a folder; give the folder that holds config.json and the shards")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder")
    root = _download(name, hub, HUB_FILES)
    folder = os.path.join(root, subfolder) if subfolder else root
    # Only the files that will be read: repositories often hold the weights in several formats.
    _download(name, hub, [os.path.relpath(path, root) for path in expected_shards(folder, variant)])
    if find_shards(folder, variant) is None:
        _download(name, hub, [f"{subfolder}/pytorch_model*" if subfolder else "pytorch_model*"])
    return folder


def _refuse_members(folder: str) -> None:
    """Raise CheckpointError naming the folder to use, where `folder` has another drive's share of the shards.

    It has no config.json, and to say that would help nobody.
    """
    if os.path.isdir(folder) and not os.path.lexists(os.path.join(folder, "config.json")):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.endswith(".safetensors") and os.path.isfile(path):
                read_pack(path)
                return  # one tells


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


def bring_to_drive(
    folder: str, variant: str | None, nvme_path: Sequence[str] | None, offload: str, show: bool
) -> str:
    """The folder to stream from: `folder`, or its copy or conversion under `nvme_path`."""
    if find_shards(folder, variant) is None:
        if not any(name.startswith("pytorch_model") and name.endswith(".bin") for name in os.listdir(folder)):
            dot = f".{variant}" if variant else ""
            raise CheckpointError(
                f"{folder}: no model{dot}.safetensors, no model.safetensors.index{dot}.json and no "
                f"pytorch_model{dot}.bin in it; fetch the weights, or name the variant or subfolder that has them"
            )
        if nvme_path is None:
            raise OptionError(f"{folder} holds .bin files, which are converted once: pass nvme_path=")
        return store.convert_bin(folder, nvme_path, variant=variant, progress=show)
    if nvme_path is None:
        return folder
    if offload in ("cpu", "none"):
        raise OptionError(f"nvme_path has no effect with offload={offload!r}; leave it out")
    return store.copy_checkpoint(folder, nvme_path, variant=variant, progress=show)
