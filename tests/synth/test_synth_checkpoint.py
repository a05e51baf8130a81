"""What `synthesise` promises about files: determinism, sharding, refusal, clean failure, constant memory."""

import copy
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from tests import architectures
from zinfer.errors import CheckpointError, OptionError, StoreError
from zinfer.synth import SHAPES, synthesise
from zinfer.synth.inventory import take_inventory
from zinfer.synth.shapes import resolve_config


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def make(out, config="llama-tiny", **options):
    return synthesise(config, str(out), progress=False, **options)


def wide():
    """A config with tensors above the size that is drawn by transformers' own initialisers."""
    return transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=4096,
        dtype="bfloat16",
    )


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (tmp_path / name for name in "abc")
    make(first, wide()), make(again, wide()), make(other, wide(), seed=1)
    assert digests(first) == digests(again)
    assert digests(first)["model.safetensors"] != digests(other)["model.safetensors"]


def test_no_two_tensors_and_no_two_rows_are_equal(tmp_path):
    tensors = load_file(f"{make(tmp_path / 'm', wide())}/model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    starts = {tuple(matrix.flatten()[:64].tolist()) for matrix in matrices.values()}
    assert len(starts) == len(matrices)
    embedding = matrices["model.embed_tokens.weight"]
    assert len(torch.unique(embedding[:, :32], dim=0)) == len(embedding)


def test_shards_hold_what_the_same_checkpoint_holds_in_one_file(tmp_path):
    whole = make(tmp_path / "whole", wide())
    parts = make(tmp_path / "parts", wide(), shard_bytes=10_000_000)
    index = json.loads((Path(parts) / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in Path(parts).glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    merged = {}
    for name in files:
        shard = load_file(f"{parts}/{name}")
        assert sum(tensor.nbytes for tensor in shard.values()) <= 10_000_000
        assert {index["weight_map"][key] for key in shard} == {name}
        merged |= shard
    expected = load_file(f"{whole}/model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    assert not (Path(whole) / "model.safetensors.index.json").exists()
    _, info = transformers.LlamaForCausalLM.from_pretrained(parts, output_loading_info=True)
    assert not any(info.values())


def test_a_header_ends_at_a_multiple_of_eight_and_items_are_aligned(tmp_path):
    config = transformers.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2)
    path = Path(make(tmp_path / "m", config)) / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)
    assert len(raw) == 8 + length + max(entry["data_offsets"][1] for entry in entries)


def test_a_finished_checkpoint_is_kept_and_anything_else_is_refused(tmp_path):
    out = tmp_path / "m"
    make(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert make(out) == str(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(OptionError, match="nothing is overwritten"):
        make(out, seed=1)
    with (out / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(OptionError, match="altered"):
        make(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OptionError, match="mine"):
        make(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mine"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    make(tmp_path / "a" / "b")
    assert (tmp_path / "empty" / "config.json").exists() and (tmp_path / "a" / "b" / "config.json").exists()


def test_a_drive_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"needs \d+ bytes, the drive has 1000 free"):
        make(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    real, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise failure
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    expected = StoreError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        make(tmp_path / "m", wide())
    assert list(tmp_path.iterdir()) == []


def test_short_writes_and_a_drive_without_direct_io_give_the_same_bytes(tmp_path, monkeypatch):
    expected = digests(make(tmp_path / "a", wide()))
    real, refused = os.pwrite, []

    def pwrite(fd, data, offset):
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data[: 1_000_001 if len(data) > 1_000_001 else None], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert digests(make(tmp_path / "b", wide())) == expected
    assert refused


def test_layers_and_dtype_override_the_config(tmp_path):
    out = make(tmp_path / "m", layers=2, dtype="float32")
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, config.dtype) == (2, torch.float32)
    with safe_open(f"{out}/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    gemma = resolve_config(transformers.Gemma3TextConfig(), layers=7)
    assert gemma.num_hidden_layers == len(gemma.layer_types) == 7
    t5 = resolve_config(transformers.T5Config(), layers=3)
    assert (t5.num_layers, t5.num_decoder_layers) == (3, 3)


def test_a_config_comes_from_a_folder_a_file_or_an_object_left_as_it_is(tmp_path):
    config = resolve_config("llama-tiny")
    before = config.to_dict()
    expected = digests(make(tmp_path / "object", config))
    assert config.to_dict() == before
    config.save_pretrained(tmp_path / "saved")
    assert digests(make(tmp_path / "folder", str(tmp_path / "saved"))) == expected
    assert digests(make(tmp_path / "file", str(tmp_path / "saved" / "config.json"))) == expected


def test_senseless_arguments_are_refused(tmp_path):
    out = tmp_path / "m"
    with pytest.raises(OptionError, match="llama-demo"):
        make(out, "no-such-shape")
    with pytest.raises(OptionError, match="layers=0"):
        make(out, layers=0)
    with pytest.raises(OptionError, match="int8"):
        make(out, dtype="int8")
    with pytest.raises(OptionError, match="shard_bytes"):
        make(out, shard_bytes=0)
    with pytest.raises(CheckpointError, match="NoSuchModel"):
        make(out, transformers.LlamaConfig(architectures=["NoSuchModel"]))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError, match="no-such-type"):
        make(out, str(tmp_path))
    assert not out.exists()


PARAMETERS = {
    "llama-demo": 3_297_898_496,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_built_in_shape_has_the_published_number_of_parameters(name):
    inventory = take_inventory(resolve_config(name), torch.bfloat16, 0)
    assert inventory.nbytes == 2 * PARAMETERS[name]


@pytest.mark.parametrize("name", architectures.ALL)
def test_without_values_the_tensors_have_the_same_names_shapes_and_dtypes(name):
    cls, config = architectures.ALL[name]
    config = copy.deepcopy(config)
    config.architectures = [cls.__name__]
    full, bare = (take_inventory(config, torch.bfloat16, seed).tensors for seed in (0, None))
    assert [(t.name, t.shape, t.dtype) for t in bare] == [(t.name, t.shape, t.dtype) for t in full]


def test_every_built_in_shape_names_its_class_and_dtype():
    for fields in SHAPES.values():
        assert hasattr(transformers, fields["architectures"][0])
        assert fields["dtype"] == "bfloat16"


RSS_SCRIPT = """
import resource, sys
from zinfer.synth import synthesise
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
synthesise("llama-tiny", sys.argv[1] + "/tiny", progress=False)  # imports what transformers imports lazily
before = peak()
synthesise("llama-demo", sys.argv[1] + "/big", layers=1, shard_bytes=300_000_000, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert written > 900_000_000
    assert int(done.stdout) < 200_000_000
