"""Bad input gets a typed error that names the file, the tensor and the remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from running import IDS, run_tightly, smallest
from safetensors.torch import load_file, save_file
from surgery import INDEX, SHARD, edit_header, edit_json, read_shard, write_shard

import zinfer
from tests import architectures
from zinfer.errors import BudgetError, CheckpointError, OptionError, StoreError

pytestmark = pytest.mark.usefixtures("nothing_left")
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def refused(source, *parts, error=CheckpointError, **options):
    """zinfer.run(source) raises `error` with every one of `parts` in its message; the error."""
    with pytest.raises(error) as caught:
        zinfer.run(source, **options)
    for part in parts:
        assert str(part) in str(caught.value)
    return caught.value


# The checkpoint's folder


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "absent", tmp_path / "absent", "no such folder")


def test_a_file_in_place_of_a_folder(saved):
    refused(Path(saved("llama"), SHARD), SHARD, "not a folder")


@pytest.mark.parametrize("source", [5, None, b"bytes", "", "nul\0byte"], ids=repr)
def test_what_is_no_path(source):
    refused(source, "model=", error=OptionError)


def test_a_folder_without_a_config(saved):
    folder = saved("llama")
    os.unlink(f"{folder}/config.json")
    refused(folder, folder, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"'])
def test_a_config_that_is_not_a_json_object(saved, text):
    folder = saved("llama")
    Path(folder, "config.json").write_text(text)
    refused(folder, f"{folder}/config.json")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("hidden_size", "many", "hidden_size"),
        ("hidden_size", -4, "negative dimension"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
        ("hidden_act", "bogus", "bogus"),
        ("dtype", "bogus", "bogus"),
        ("pad_token_id", 99999, "Padding_idx"),
        ("model_type", "hal9000", "hal9000"),
        ("architectures", ["Hal9000ForCausalLM"], "upgrade transformers"),
        ("architectures", ["LlamaConfig"], "upgrade transformers"),
        ("architectures", [1], "upgrade transformers"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "pre-quantised"),
        ("num_hidden_layers", 3, "lacks 9 tensor(s)"),
        ("intermediate_size", 96, "config.json and the weights do not belong together"),
    ],
)
def test_a_config_with_impossible_values(saved, key, value, part):
    folder = saved("llama")
    edit_json(Path(folder, "config.json"), lambda config: config.update({key: value}))
    refused(folder, folder, part)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_generation_config(saved, text):
    path = Path(saved("llama"), "generation_config.json")
    path.write_text(text)
    refused(path.parent, path)


def test_a_quantised_checkpoint_is_refused_with_a_config_object_too(saved):
    config = transformers.LlamaConfig(quantization_config={"quant_method": "gptq"})
    refused(saved("llama"), "pre-quantised", config=config)


# The index


@pytest.mark.parametrize("file", ["../x.safetensors", "a/../../x", "/etc/passwd", "", "nul\0", 5])
def test_an_index_path_that_leaves_the_folder(saved, file):
    index = Path(saved("llama"), INDEX)
    index.write_text(json.dumps({"weight_map": {UP: file}}))
    refused(index.parent, index, UP, "leaves the checkpoint's folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index(saved, text):
    index = Path(saved("llama"), INDEX)
    index.write_text(text)
    refused(index.parent, index, "fetch")


def test_a_shard_that_the_index_names_but_is_absent(saved):
    folder = Path(saved("llama", max_shard_size="100KB"))
    shard = max(folder.glob("*.safetensors"))
    shard.unlink()
    refused(folder, shard, "fetch it again")


def test_an_index_that_names_a_tensor_the_shard_lacks(saved):
    folder = Path(saved("llama", max_shard_size="100KB"))
    shard = min(folder.glob("*.safetensors"))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.absent": shard.name}))
    refused(folder, shard, "'model.absent'", "fetch")


# The shards


@pytest.mark.parametrize("length", [0, 4, 7, 8, 9, 100, 2000, 200_000, -1])
def test_a_truncated_shard(saved, length):
    shard = Path(saved("llama"), SHARD)
    os.truncate(shard, length % shard.stat().st_size if length < 0 else length)
    refused(shard.parent, shard, "truncated", "fetch it again")


@pytest.mark.parametrize("claimed", [1 << 63, (1 << 64) - 1, 10**9, 0, 1, 429_408])
def test_a_header_of_another_length_than_it_claims(saved, claimed):
    shard = Path(saved("llama"), SHARD)
    write_shard(shard, *read_shard(shard), claimed=claimed)
    refused(shard.parent, shard, "fetch it again")


@pytest.mark.parametrize(
    "header",
    [b"not json", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":1,"a":2}'],
    ids=["text", "binary", "list", "deep", "huge number", "twice"],
)
def test_a_header_that_is_no_json_object(saved, header):
    shard = Path(saved("llama"), SHARD)
    write_shard(shard, header, read_shard(shard)[1])
    refused(shard.parent, shard, "fetch")


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F4"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"shape": "ab"},
        {"shape": [-128, -64]},
        {"shape": [128.0, 64]},
        {"shape": [True, 8192]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [0, 1 << 70], "data_offsets": [0, 0]},
        {"shape": [10**4000, 10**4000]},
        {"data_offsets": [-5, 10]},
        {"data_offsets": [0.0, 10.0]},
        {"data_offsets": ["0", "10"]},
        {"data_offsets": [10, 0]},
        {"data_offsets": [0, 1, 2]},
        {"data_offsets": None},
        {"data_offsets": [1 << 40, (1 << 40) + 32768]},
        {"data_offsets": [1 << 80, (1 << 80) + 32768]},
        {"data_offsets": [196_860, 229_628]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_header_entry_that_cannot_be(saved, fields):
    folder = saved("llama")
    shard = edit_header(folder, lambda header: header[UP].update(fields))
    refused(folder, shard, repr(UP))


@pytest.mark.parametrize("value", [None, [1, 2], {}, "text"])
def test_a_header_entry_that_is_no_entry(saved, value):
    folder = saved("llama")
    shard = edit_header(folder, lambda header: header.update({UP: value}))
    refused(folder, shard, repr(UP), "fetch the file again")


def test_overlapping_tensors(saved):
    folder = saved("llama")

    def overlap(header):
        begin, end = header[DOWN]["data_offsets"]
        header[UP]["data_offsets"] = [begin + 4, end + 4]

    shard = edit_header(folder, overlap)
    refused(folder, shard, "overlap", "fetch it again")


def test_a_tensor_of_the_wrong_shape(saved):
    folder = saved("llama")
    shard = edit_header(folder, lambda header: header[UP]["shape"].reverse())
    refused(folder, shard, repr(UP), "[64, 128]", "[128, 64]", "do not belong together")


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tensor_the_checkpoint_lacks_is_never_invented(saved, name):
    folder = saved("llama")
    edit_header(folder, lambda header: {key: value for key, value in header.items() if key != name})
    refused(folder, folder, repr(name), "never invents weights")


def test_a_missing_tensor_costs_no_memory(saved, monkeypatch):
    """transformers initialises, in memory, what a checkpoint lacks: a wrong config must not fill it."""
    folder = saved("llama")
    edit_header(folder, lambda header: {"__metadata__": {}})
    monkeypatch.setattr(
        transformers.LlamaPreTrainedModel, "_init_weights", lambda *_: pytest.fail("initialised")
    )
    refused(folder, folder, "lacks 21 tensor(s)")
    folder = saved("qwen2")
    monkeypatch.setattr(
        transformers.Qwen2PreTrainedModel, "_init_weights", lambda *_: pytest.fail("initialised")
    )
    edit_json(Path(folder, "config.json"), lambda config: config.update(vocab_size=10**6))
    refused(folder, folder, "[1000000, 64]")


def test_a_missing_buffer(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / SHARD)
    name = next(key for key in state if key.endswith("running_mean"))
    state.pop(name)
    save_file(state, tmp_path / SHARD, metadata={"format": "pt"})
    refused(str(tmp_path), tmp_path, repr(name), "never invents weights")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_an_expert_that_is_missing_or_misshapen(saved, change):
    folder = saved("qwen3_moe")
    expert = "model.layers.0.mlp.experts.3.up_proj.weight"

    def edit(header):
        if change == "shape":
            header[expert]["shape"].reverse()
        else:
            del header[expert]

    shard = edit_header(folder, edit)
    refused(folder, shard, "model.layers.0.mlp.experts.gate_up_proj", "fetch the checkpoint again")


def test_a_shard_that_is_a_folder_a_fifo_or_dangles(saved):
    shard = Path(saved("llama"), SHARD)
    shard.unlink()
    for make in (shard.mkdir, lambda: os.mkfifo(shard), lambda: shard.symlink_to("/dev/zero")):
        make()
        refused(shard.parent, shard, "not a regular file")
        shard.rmdir() if shard.is_dir() else shard.unlink()
    for target in ("nowhere", SHARD):
        shard.symlink_to(target)
        refused(shard.parent, shard, "fetch it again")
        shard.unlink()


@pytest.mark.parametrize("name", [INDEX, "config.json", "generation_config.json"])
def test_a_json_file_that_is_a_fifo_does_not_hang(saved, name):
    path = Path(saved("llama"), name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused(path.parent, name)


def test_no_weights_at_all_or_none_of_the_variant(saved):
    folder = saved("llama")
    refused(folder, folder, "no model.fp16.safetensors", variant="fp16")
    refused(folder, "no config.json", subfolder="absent")
    os.unlink(f"{folder}/{SHARD}")
    refused(folder, folder, "no model.safetensors", "fetch the weights")


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda"},
        {"device": "cuda:0"},
        {"device": "bogus"},
        {"device": object()},
        {"device": 0},
        {"dtype": "bogus"},
        {"dtype": "int8"},
        {"dtype": None},
        {"dtype": 5},
        {"offload": "bogus"},
        {"offload": None},
        {"unknown_option": 1},
        {"revision": "main"},
        {"local_files_only": True},
        {"nvme_path": "/", "offload": "none"},
        {"nvme_path": "/", "offload": "cpu"},
        {"nvme_path": ""},
        {"nvme_path": 5},
        {"device_map": "auto"},
        {"state_dict": {}},
        {"load_in_8bit": True},
        {"torch_dtype": "auto"},
        {"mirror": "x"},
        {"_from_auto": True},
        {"config": {}},
        {"key_mapping": 5},
        {"attn_implementation": "bogus"},
        {"max_memory": {"cpu": 0}},
        {"max_memory": {"cpu": -1}},
        {"max_memory": {"cpu": "lots"}},
        {"max_memory": {"cpu": "-3GiB"}},
        {"max_memory": {"cpu": "3 parsecs"}},
        {"max_memory": {"cpu": "9" * 400}},
        {"max_memory": {"cpu": None}},
        {"max_memory": {"cpu": 1.5}},
        {"max_memory": {"cpu": True}},
        {"max_memory": {0: "1GiB"}},
        {"max_memory": {"cuda": "1GiB"}},
        {"max_memory": {"cpu": "1GiB", "disk": "1GiB"}},
        {"max_memory": "3GiB"},
    ],
    ids=lambda options: str(options).split(" at 0x")[0][:50],  # the same in every process
)
def test_a_bad_option_is_named(saved, options):
    refused(
        saved("llama"), min(options), error=OptionError, **options
    ) if "max_memory" not in options else refused(saved("llama"), error=OptionError, **options)


def test_more_memory_than_the_machine_has(saved):
    refused(saved("llama"), "max_memory['cpu']", "at most", error=BudgetError, max_memory={"cpu": "999TiB"})


# nvme_path


def other_filesystem():
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev:
        pytest.skip("no second filesystem here")
    return "/dev/shm"


def test_an_nvme_path_that_is_a_file_or_missing(saved, tmp_path):
    folder = saved("llama")
    refused(folder, tmp_path / "absent", "mkdir -p", error=StoreError, nvme_path=tmp_path / "absent")
    refused(folder, SHARD, "not a folder", error=StoreError, nvme_path=f"{folder}/{SHARD}")


def test_a_store_that_cannot_be_made(saved):
    drive = tempfile.mkdtemp(dir=other_filesystem())
    try:
        Path(drive, "zinfer-store").write_text("in the way")
        refused(saved("llama"), f"{drive}/zinfer-store", error=StoreError, nvme_path=drive)
        assert os.listdir(drive) == ["zinfer-store"]
    finally:
        shutil.rmtree(drive)


@pytest.mark.parametrize(("options", "part"), [("size=64k", "64"), ("size=8m,ro", "EROFS")])
def test_an_nvme_path_that_is_too_small_or_read_only(saved, tmp_path, options, part):
    point = tmp_path / "drive"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        refused(saved("llama"), point, part, error=StoreError, nvme_path=point)
        assert not [path for path in point.rglob("*") if path.is_file() and path.stat().st_size]
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=30)


# Budgets


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "gpt2", "qwen3_moe", "gpt_oss", "mamba", "bert", "t5"]
)
def test_the_smallest_budget_in_the_message_works(name, saved):
    folder = saved(name)
    budget = smallest(folder)
    error = refused(folder, budget, error=BudgetError, offload="nvme", max_memory={"cpu": budget - 1})
    assert error.smallest == budget, "one byte less names the same number"
    reference = architectures.reference(name, folder)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "t5" else {})
    with run_tightly(folder) as model, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


def test_the_smallest_budget_works_where_a_larger_budget_keeps_more(tmp_path):
    """What counts as small, and the bounce slots, grow with the budget: 8 MiB are needed, of 1 asked for."""
    config = transformers.LlamaConfig(**(architectures._DENSE | {"vocab_size": 32768}))
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    budget = smallest(str(tmp_path))
    assert budget > 8 << 20
    with run_tightly(str(tmp_path)) as model, torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        report = model.zinfer.report()
        parts = report.planned_resident_bytes + report.window_bytes + report.small_bytes + report.bounce_bytes
        assert parts + report.conversion_bytes <= report.budget


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_a_budget_too_small_to_keep_everything_names_what_it_takes(offload, saved):
    folder = saved("llama")
    budget = {"cpu": 150_000}
    error = refused(folder, "offload='nvme'", error=BudgetError, offload=offload, max_memory=budget)
    with zinfer.run(folder, offload=offload, max_memory={"cpu": error.smallest}) as model:
        assert model(IDS).logits.shape == (1, 7, 256)
