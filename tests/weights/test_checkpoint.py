"""A folder's shards and tensors, from its index and headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zinfer.errors import CheckpointError
from zinfer.weights.checkpoint import find_shards, open_checkpoint, read_json

INDEX = "model.safetensors.index.json"


def write_shard(folder: Path, file: str, **tensors: int) -> str:
    """A shard whose tensors have the given numbers of float32 elements."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    save_file({name: torch.zeros(count) for name, count in tensors.items()}, path)
    return str(path)


def write_index(folder: Path, weight_map: object, file: str = INDEX) -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_without_shards_has_none_and_opening_it_says_so(tmp_path):
    assert find_shards(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_a_single_file_is_a_checkpoint(tmp_path):
    path = write_shard(tmp_path, "model.safetensors", a=3, b=5)

    checkpoint = open_checkpoint(str(tmp_path))

    assert checkpoint.shards == (path,) == find_shards(str(tmp_path))
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.nbytes == 4 * (3 + 5)


def test_the_index_wins_over_a_single_file(tmp_path):
    write_shard(tmp_path, "model.safetensors", stale=1)
    first, second = write_shard(tmp_path, "1.safetensors", a=1), write_shard(tmp_path, "2.safetensors", b=1)
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"})

    checkpoint = open_checkpoint(str(tmp_path))

    assert checkpoint.shards == (first, second)
    assert {name: entry.path for name, entry in checkpoint.tensors.items()} == {"a": first, "b": second}


def test_the_index_says_which_shard_holds_a_tensor_that_two_shards_have(tmp_path):
    first = write_shard(tmp_path, "1.safetensors", a=1, both=2)
    write_shard(tmp_path, "2.safetensors", b=1, both=2)
    write_index(tmp_path, {"a": "1.safetensors", "both": "1.safetensors", "b": "2.safetensors"})

    assert open_checkpoint(str(tmp_path)).tensors["both"].path == first


def test_a_variant_has_files_of_its_own(tmp_path):
    write_shard(tmp_path, "model.safetensors", plain=1)
    path = write_shard(tmp_path, "model.fp16.safetensors", half=1)
    assert find_shards(str(tmp_path), "fp16") == (path,)

    indexed = write_shard(tmp_path, "other.safetensors", indexed=1)
    write_index(tmp_path, {"indexed": "other.safetensors"}, "model.safetensors.index.fp16.json")
    assert find_shards(str(tmp_path), "fp16") == (indexed,)
    assert set(open_checkpoint(str(tmp_path), "fp16").tensors) == {"indexed"}


def test_a_shard_may_lie_in_a_folder_below(tmp_path):
    path = write_shard(tmp_path, "deep/1.safetensors", a=1)
    write_index(tmp_path, {"a": "deep/1.safetensors"})
    assert open_checkpoint(str(tmp_path)).shards == (path,)


def test_a_dangling_link_is_found_and_named_when_it_is_opened(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read this shard"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "file",
    ["../1.safetensors", "a/../../1.safetensors", "/1.safetensors"],
)
def test_an_index_that_points_outside_the_folder_is_not_trusted(tmp_path, file):
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="do not trust"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize(
    "file", [7, None, ["1.safetensors"], "", "1\0.safetensors", "\ud800.safetensors"], ids=repr
)
def test_an_index_that_points_to_no_file_name_is_refused(tmp_path, file):
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="'a' points to"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("weight_map", [None, {}, [], "1.safetensors"], ids=repr)
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path):
    path = write_shard(tmp_path, "1.safetensors", a=1)
    write_index(tmp_path, {"a": "1.safetensors", "lost": "1.safetensors"})
    with pytest.raises(CheckpointError, match="'lost'") as info:
        open_checkpoint(str(tmp_path))
    assert path in str(info.value)


def test_a_shard_that_the_index_names_has_to_exist(tmp_path):
    write_index(tmp_path, {"a": "absent.safetensors"})
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (None, "cannot be read"),
    ],
    ids=["unfinished", "not text", "nested without end", "not an object", "absent"],
)
def test_broken_json_names_its_file(tmp_path, content, says):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as info:
        read_json(str(path))
    assert str(path) in str(info.value)
