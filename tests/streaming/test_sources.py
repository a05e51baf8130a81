"""Where a checkpoint can come from: the hub's cache, another filesystem, .bin files, subfolders, variants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from running import DEADLINE, run_tightly, tokens
from surgery import SHARD

import zinfer
from tests import architectures
from zinfer.errors import CheckpointError, OptionError, StoreError

pytestmark = pytest.mark.usefixtures("nothing_left")
OLD, NEW = "1" * 40, "2" * 40


def lay_out_cache(folder: str, hub: Path, name: str, commits: dict[str, str]) -> None:
    """Lay the checkpoint in `folder` out as huggingface_hub's cache does, under every commit (ref -> hash)."""
    root = hub / f"models--{name.replace('/', '--')}"
    for ref, commit in commits.items():
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                blob = root / "blobs" / f"{commit}{path.name}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(path, blob)
                link = root / "snapshots" / commit / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture
def offline(monkeypatch):
    """The hub's library, kept from the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(saved, tmp_path, offline):
    """A cache in the hub's layout that holds tests/tiny-llama at two revisions, in two precisions."""
    folder = saved("llama")
    lay_out_cache(folder, tmp_path / "hub", "tests/tiny-llama", {"main": NEW})
    architectures.build("llama", seed=1).save_pretrained(folder)
    lay_out_cache(folder, tmp_path / "hub", "tests/tiny-llama", {"v1": OLD})
    return str(tmp_path / "hub")


def test_a_hub_id_streams_from_the_cache(cache):
    with run_tightly("tests/tiny-llama", cache_dir=cache) as model:
        assert tokens(model) == tokens(architectures.build("llama"))
        assert NEW in repr(model.name_or_path)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_of_a_hub_id(cache, revision):
    with run_tightly("tests/tiny-llama", cache_dir=cache, revision=revision) as model:
        assert tokens(model) == tokens(architectures.build("llama", seed=1))


@pytest.mark.parametrize(
    ("name", "options"),
    [("tests/absent", {}), ("tests/tiny-llama", {"revision": "v2"}), ("not//an id", {}), ("a/b/c", {})],
)
def test_a_hub_id_that_is_not_there(name, options, cache):
    with pytest.raises(
        CheckpointError, match=f"{name}: (neither a local folder nor available|no such folder)"
    ):
        zinfer.run(name, cache_dir=cache, **options)


def test_a_hub_snapshot_without_its_blob(cache):
    for blob in Path(cache).rglob(f"blobs/{NEW}{SHARD}"):
        blob.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read this shard.*fetch it again"):
        zinfer.run("tests/tiny-llama", cache_dir=cache)


def test_hf_home_and_hf_hub_offline_are_honoured(saved, tmp_path):
    lay_out_cache(saved("llama"), tmp_path / "hub", "tests/tiny-llama", {"main": NEW})
    code = """
        import torch, zinfer
        with zinfer.run("tests/tiny-llama", offload="nvme", max_memory={"cpu": 200_000}) as model:
            print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())
        try:
            zinfer.run("tests/absent")
        except zinfer.CheckpointError as error:
            print("neither a local folder nor available" in str(error))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            **{"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    ids = torch.tensor([[5, 6]])
    expected = tokens(architectures.build("llama"), ids, count=4)
    assert out.stdout.splitlines() == [str(expected), "True"], out.stderr


# Folders


def test_a_subfolder_and_a_variant(saved, tmp_path):
    folder = saved("llama", torch.bfloat16, variant="bf16")
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "weights")
    assert not (outer / "weights" / SHARD).exists()
    reference = transformers.LlamaForCausalLM.from_pretrained(outer, subfolder="weights", variant="bf16")
    with run_tightly(str(outer), subfolder="weights", variant="bf16") as model:
        assert tokens(model) == tokens(reference)
    with pytest.raises(CheckpointError, match=r"name the variant"):
        zinfer.run(outer / "weights")


def test_config_attributes_can_be_overridden(saved):
    folder = saved("llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=1)
    with run_tightly(folder, num_hidden_layers=1) as model:
        assert model.config.num_hidden_layers == 1
        assert tokens(model) == tokens(reference)


def test_a_generation_config_that_is_given_is_used(saved):
    given = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    with run_tightly(saved("llama"), generation_config=given) as model:
        assert model.generate(torch.tensor([[5]])).shape == (1, 4)


# The store


@pytest.fixture
def drive(tmp_path):
    """A folder on another filesystem than `tmp_path`'s."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def files_below(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_elsewhere_is_copied_once(saved, drive):
    folder = saved("llama", max_shard_size="100KB")
    expected = tokens(architectures.build("llama"))
    with run_tightly(folder, nvme_path=drive) as model:
        assert tokens(model) == expected
        assert model.zinfer.report().source.startswith(str(drive))
    files = files_below(drive)
    assert sum(path.suffix == ".safetensors" for path in files) > 1
    with run_tightly(folder, nvme_path=drive) as model:
        assert tokens(model) == expected
    assert files_below(drive) == files


def test_a_checkpoint_on_the_same_filesystem_is_not_copied(saved, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    with run_tightly(saved("llama"), nvme_path=drive) as model:
        assert tokens(model) == tokens(architectures.build("llama"))
        assert model.zinfer.report().bytes_written == 0
    assert os.listdir(drive) == []


def test_a_hub_id_is_copied_to_the_drive(cache, drive):
    with run_tightly("tests/tiny-llama", cache_dir=cache, nvme_path=drive) as model:
        assert tokens(model) == tokens(architectures.build("llama"))


def to_bin(folder):
    """Turn the safetensors checkpoint in `folder` into a pytorch_model.bin."""
    shard = Path(folder, SHARD)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.save(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        Path(folder, "pytorch_model.bin"),
    )
    shard.unlink()


def test_bin_files_are_converted_once(saved, tmp_path):
    folder, drive = saved("llama"), tmp_path / "drive"
    drive.mkdir()
    to_bin(folder)
    expected = tokens(architectures.build("llama"))
    with run_tightly(folder, nvme_path=drive) as model:
        assert tokens(model) == expected
    files = files_below(drive)
    with run_tightly(folder, nvme_path=drive) as model:
        assert tokens(model) == expected
    assert files_below(drive) == files


def test_bin_files_need_a_place_and_have_to_be_sound(saved, tmp_path):
    folder, drive = saved("llama"), tmp_path / "drive"
    drive.mkdir()
    to_bin(folder)
    with pytest.raises(OptionError, match="pass nvme_path="):
        zinfer.run(folder)
    with pytest.raises(StoreError, match="does not exist"):
        zinfer.run(folder, nvme_path=tmp_path / "absent")
    os.truncate(f"{folder}/pytorch_model.bin", 5000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*fetch it again"):
        zinfer.run(folder, nvme_path=drive)
    assert not [path for path in files_below(drive) if path.suffix != ".lock"]


def test_a_pickle_that_would_run_code_is_refused(saved, tmp_path):
    folder = saved("llama")
    os.unlink(f"{folder}/{SHARD}")
    torch.save({"x": torch.nn.Linear(2, 2)}, f"{folder}/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        zinfer.run(folder, nvme_path=tmp_path)
