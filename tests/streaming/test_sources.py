"""Where a checkpoint may come from: the hub's cache, another filesystem, .bin files, subfolders, variants."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import zinfer
from tests import architectures

IDS = torch.tensor([[5, 17, 33, 101]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def logits(folder: str) -> torch.Tensor:
    model = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> Path:
    """An offline hub cache that holds `someone/tiny`, laid out as huggingface_hub does."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in Path(saved("llama")).iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        os.symlink(repo / "blobs" / file.name, repo / "snapshots" / COMMIT / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_streams_from_the_hub_cache(hub, saved, nothing_left):
    with zinfer.run("someone/tiny", cache_dir=str(hub)) as model:
        assert torch.equal(model(IDS).logits, logits(saved("llama")))


def test_a_hub_id_takes_a_revision(hub, nothing_left):
    zinfer.run("someone/tiny", cache_dir=str(hub), revision=COMMIT).zinfer.close()
    with pytest.raises(zinfer.CheckpointError, match="someone/tiny"):
        zinfer.run("someone/tiny", cache_dir=str(hub), revision="no-such-branch")


def test_an_unknown_hub_id_says_what_to_check(hub):
    with pytest.raises(zinfer.CheckpointError, match=r"someone/else.*hub"):
        zinfer.run("someone/else", cache_dir=str(hub))


@pytest.fixture
def other_filesystem(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_checkpoint_on_another_filesystem_is_copied_once_and_reused(saved, other_filesystem, nothing_left):
    folder = saved("llama")
    expected = logits(folder)
    with zinfer.run(folder, offload="nvme", nvme_path=other_filesystem) as model:
        assert torch.equal(model(IDS).logits, expected)
        assert model.zinfer.report().source.startswith(str(other_filesystem))
    stamps = {path: path.stat().st_mtime_ns for path in other_filesystem.rglob("*.safetensors")}
    assert stamps
    with zinfer.run(folder, offload="nvme", nvme_path=other_filesystem) as model:
        assert torch.equal(model(IDS).logits, expected)
    assert stamps == {path: path.stat().st_mtime_ns for path in other_filesystem.rglob("*.safetensors")}


def test_on_the_same_filesystem_nothing_is_copied(saved, tmp_path):
    folder = saved("llama")
    before = set(tmp_path.rglob("*"))
    with zinfer.run(folder, offload="nvme", nvme_path=tmp_path) as model:
        model(IDS)
        assert model.zinfer.report().source == folder
        assert model.zinfer.report().bytes_written == 0
    assert set(tmp_path.rglob("*")) == before


def test_a_bin_checkpoint_is_converted_once(saved, tmp_path, nothing_left):
    folder = Path(saved("llama"))
    expected = logits(str(folder))
    state = architectures.ALL["llama"][0].from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(zinfer.OptionError, match="nvme_path"):
        zinfer.run(str(folder))
    store = tmp_path / "store"
    store.mkdir()
    for _ in range(2):
        with zinfer.run(str(folder), offload="nvme", nvme_path=store) as model:
            assert torch.equal(model(IDS).logits, expected)
    assert len(list(store.rglob("*.safetensors"))) == 1


def test_a_subfolder_and_a_variant_are_found(saved, tmp_path, nothing_left):
    folder = Path(saved("llama"))
    expected = logits(str(folder))
    (folder / "model.safetensors").rename(folder / "model.fp32.safetensors")
    folder.rename(tmp_path / "deep")
    with zinfer.run(tmp_path, subfolder="deep", variant="fp32") as model:
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(zinfer.CheckpointError, match="variant"):
        zinfer.run(tmp_path, subfolder="deep")
