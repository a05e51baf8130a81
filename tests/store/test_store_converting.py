"""What convert_bin promises: the same names and bits as the pickles, without running any code in them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from store_helpers import entries, files_of

import zinfer.store.converting
from zinfer.errors import CheckpointError, StoreError
from zinfer.store import convert_bin, verify
from zinfer.weights.checkpoint import open_checkpoint


class Harmful:
    """A class of the test, so nothing weights_only allows."""


def make_bin(folder, *states):
    """A checkpoint of one .bin per state; with an index where there are several."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    if len(states) == 1:
        torch.save(states[0], folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number, state in enumerate(states, 1):
        name = f"pytorch_model-{number:05d}-of-{len(states):05d}.bin"
        torch.save(state, folder / name)
        weight_map.update(dict.fromkeys(state, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def convert(folder, drive):
    return convert_bin(str(folder), str(drive), progress=False)


def test_one_bin_becomes_one_shard_with_the_same_bits(tmp_path):
    state = {
        "bf16": torch.randn(5, 3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "int64": torch.arange(3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    entry = convert(make_bin(tmp_path / "bins", state), tmp_path)
    assert files_of(entry).keys() == {"config.json", "manifest.json", "model.safetensors"}
    loaded = load_file(f"{entry}/model.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    verify(entry)


def test_several_bins_become_several_shards_and_an_index_and_the_old_index_stays_behind(tmp_path):
    folder = make_bin(tmp_path / "bins", {"a": torch.ones(3)}, {"b": torch.zeros(2)})
    entry = convert(folder, tmp_path)
    checkpoint = open_checkpoint(entry)
    assert [shard.rpartition("/")[2] for shard in checkpoint.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert checkpoint.tensors.keys() == {"a", "b"}
    assert "pytorch_model.bin.index.json" not in files_of(entry)
    verify(entry)


def test_tied_tensors_and_views_of_one_storage_keep_every_name(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"embed": base, "head": base, "row": base[1], "column": base[:, 2], "wide": base[0, :1].expand(5)}
    loaded = load_file(convert(make_bin(tmp_path / "bins", state), tmp_path) + "/model.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_parameters_and_the_old_pickle_format_are_read(tmp_path, caplog):
    caplog.set_level("INFO", "zinfer")
    folder = make_bin(tmp_path / "bins", {"w": torch.nn.Parameter(torch.ones(2))})
    torch.save(
        {"w": torch.nn.Parameter(torch.ones(2))},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    loaded = load_file(convert(folder, tmp_path) + "/model.safetensors")
    assert torch.equal(loaded["w"], torch.ones(2))
    assert "format from before torch 1.6" in caplog.text


def test_a_conversion_is_made_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    folder = make_bin(tmp_path / "bins", {"w": torch.ones(2)})
    entry = convert(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(zinfer.store.converting, "_convert", None)
        assert convert(folder, tmp_path) == entry
    assert convert(make_bin(folder, {"w": torch.ones(3)}), tmp_path) != entry


def test_a_folder_with_safetensors_is_used_as_it_is(checkpoint, tmp_path):
    assert convert(checkpoint, tmp_path) == str(checkpoint)


def test_a_variant_is_converted_under_its_name(tmp_path):
    folder = tmp_path / "bins"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.fp16.bin")
    entry = convert_bin(str(folder), str(tmp_path), variant="fp16", progress=False)
    assert open_checkpoint(entry, "fp16").tensors.keys() == {"w"}


def test_what_is_not_a_tensor_is_left_out_and_logged(tmp_path, caplog):
    entry = convert(make_bin(tmp_path / "bins", {"w": torch.ones(2), "step": 7}), tmp_path)
    assert open_checkpoint(entry).tensors.keys() == {"w"}
    assert "'step' is a int, not a tensor; left out" in caplog.text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(2), "x": Harmful()}, r"Unsupported global: GLOBAL \S*Harmful"),
        ({"step": 7}, "no tensors in it"),
        ([torch.ones(2)], "holds a list, not a dict"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is not a dense tensor"),
    ],
)
def test_a_pickle_that_is_no_plain_state_dict_is_refused_by_name(tmp_path, state, message):
    folder = make_bin(tmp_path / "bins", state)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        convert(folder, tmp_path)
    assert files_of(*entries(tmp_path)) == {}


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_bin_is_refused_by_name(tmp_path, keep):
    folder = make_bin(tmp_path / "bins", {"w": torch.ones(100)})
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read as plain tensors \(.+\)"):
        convert(folder, tmp_path)


def test_a_dtype_that_safetensors_cannot_hold_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"'w' has dtype torch\.complex128"):
        convert(make_bin(tmp_path / "bins", {"w": torch.ones(2, dtype=torch.complex128)}), tmp_path)


def test_a_name_that_only_the_index_knows_is_an_error(tmp_path):
    folder = make_bin(tmp_path / "bins", {"a": torch.ones(3)}, {"b": torch.zeros(2)})
    index = folder / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "c": weight_map["b"]}}))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: .* places 'c' in this file"
    ):
        convert(folder, tmp_path)


@pytest.mark.parametrize("outside", ["../other.bin", "/etc/passwd", 7])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, outside):
    folder = make_bin(tmp_path / "bins", {"a": torch.ones(3)})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        convert(folder, tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"neither pytorch_model\.bin nor pytorch_model\.bin\.index\.json"
    ):
        convert(tmp_path, tmp_path)


def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    folder = make_bin(tmp_path / "bins", {"a": torch.ones(3)}, {"b": torch.zeros(2)})

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zinfer.store.converting, "_drop_cache", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path)
    assert files_of(*entries(tmp_path)) == {}
    verify(convert(folder, tmp_path))


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    folder = make_bin(tmp_path / "bins", {"w": torch.ones(2)})
    entry = convert(folder, tmp_path)
    (names,) = [files_of(entry).keys()]
    for name in ("manifest.json", "model.safetensors"):
        (entries(tmp_path)[0] / name).unlink()
    (entries(tmp_path)[0] / "model.safetensors.part").write_bytes(b"x" * 5000)
    assert convert(folder, tmp_path) == entry
    assert files_of(entry).keys() == names
    verify(entry)


def test_a_converted_model_with_tied_weights_loads_in_transformers_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    reloaded = transformers.LlamaForCausalLM.from_pretrained(convert(folder, tmp_path)).eval()
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
