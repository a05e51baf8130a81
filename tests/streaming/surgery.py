"""Cut, damage and rewrite checkpoints the way bad downloads, bad disks and bad people do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes, claimed: int | None = None) -> None:
    """Write a safetensors file; `claimed` is the header length it lies about."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data)


def edit_header(folder: str, edit: Callable[[dict[str, Any]], Any]) -> str:
    """Apply `edit` to the header of the folder's only shard; the shard's path."""
    path = Path(folder, SHARD)
    header, data = read_shard(path)
    edited = edit(header)
    write_shard(path, header if edited is None else edited, data)
    return str(path)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `edit` to the JSON object in `path`."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
