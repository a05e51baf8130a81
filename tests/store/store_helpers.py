"""Small checkpoints, and looks into a store."""

import ctypes
import json
import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_checkpoint(folder, elements=1000):
    """A checkpoint of two shards of `elements` float32 each, with its small files."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(elements)
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file(
            {name: torch.rand(elements, generator=generator)}, folder / shard, metadata={"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": dict(zip("ab", SHARDS, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.model").write_bytes(b"\x00pieces")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return folder


def entries(drive):
    """The entry folders of the store under `drive`."""
    return sorted(path for path in (drive / "zinfer-store").glob("*") if path.is_dir())


def files_of(folder):
    """Relative path -> bytes of every file below `folder`."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def cached_share(path):
    """Which part of the file at `path`, 0 to 1, lies in the page cache (mincore(2))."""
    pages = -(-os.path.getsize(path) // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
        base = ctypes.addressof(ctypes.c_char.from_buffer(view))
        if libc.mincore(ctypes.c_void_p(base), ctypes.c_size_t(len(view)), present):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in present) / pages


def skip_unless_the_cache_can_be_dropped(folder):
    """tmpfs is nothing but page cache."""
    probe = folder / "probe"
    with open(probe, "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = cached_share(probe)
    probe.unlink()
    if share > 0.1:
        pytest.skip("the page cache of this filesystem cannot be dropped")
