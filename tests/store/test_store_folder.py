"""What the store says of an nvme_path that it cannot use, and how it meets a full drive."""

import os
import re
import shutil

import pytest
import torch
from store_helpers import SHARDS, entries, files_of, make_checkpoint

import zinfer.store
import zinfer.store.folder
from zinfer.errors import StoreError
from zinfer.store import convert_bin, copy_checkpoint, save_module, verify


def test_the_public_names_are_four():
    assert zinfer.store.__all__ == ["convert_bin", "copy_checkpoint", "save_module", "verify"]


def copying(checkpoint, nvme_path):
    copy_checkpoint(str(checkpoint), nvme_path, progress=False)


def converting(checkpoint, nvme_path):
    for shard in (*SHARDS, "model.safetensors.index.json"):
        (checkpoint / shard).unlink()
    torch.save({"w": torch.ones(3)}, checkpoint / "pytorch_model.bin")
    convert_bin(str(checkpoint), nvme_path, progress=False)


def saving(checkpoint, nvme_path):
    save_module(torch.nn.Linear(2, 2), nvme_path, progress=False)


@pytest.fixture(params=[copying, converting, saving])
def use(request):
    return request.param


def test_a_missing_nvme_path_is_not_created_but_named_with_the_remedy(checkpoint, tmp_path, use):
    missing = str(tmp_path / "drive" / "models")
    with pytest.raises(StoreError, match=f"{missing}' does not exist; .*mkdir -p {missing}"):
        use(checkpoint, missing)
    assert not os.path.exists(tmp_path / "drive")


def test_an_nvme_path_that_is_a_file_is_refused(checkpoint, tmp_path, use):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file' is not a folder"):
        use(checkpoint, str(tmp_path / "file"))


def test_a_read_only_filesystem_is_refused(checkpoint, mounted, use):
    with pytest.raises(StoreError, match=r"cannot write there: .*\(EROFS\); give an nvme_path"):
        use(checkpoint, str(mounted("ro,size=1m")))


def test_a_store_that_is_a_file_is_refused(checkpoint, drive, use):
    (drive / "zinfer-store").write_text("")
    with pytest.raises(StoreError, match=r"cannot write there: .*\(ENOTDIR\)"):
        use(checkpoint, str(drive))


def test_a_folder_without_write_permission_is_refused(drive):
    drive.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(StoreError, match=r"cannot write there: .*\(EACCES\); .*this user may write to"):
            save_module(torch.nn.Linear(2, 2), str(drive), progress=False)
    finally:
        os.seteuid(user)
        drive.chmod(0o755)


def test_too_little_room_is_told_with_needed_and_free_bytes_before_the_first_byte(tmp_path, mounted):
    folder = make_checkpoint(tmp_path / "big", elements=300_000)
    drive = mounted("size=1m")
    needed = sum(len(content) for content in files_of(folder).values())
    with pytest.raises(StoreError, match=f"needs {needed} bytes .* are free; free .* or give an nvme_path"):
        copy_checkpoint(str(folder), str(drive), progress=False)
    assert files_of(*entries(drive)) == {}


def test_bytes_already_copied_count_as_room(tmp_path, mounted, monkeypatch):
    """2.4 MB onto a drive of 3 MiB fits once; a resumed copy must not ask for all of it again."""
    folder = make_checkpoint(tmp_path / "big", elements=300_000)
    drive = mounted("size=3m")
    entry = copy_checkpoint(str(folder), str(drive), progress=False)
    os.replace(os.path.join(entry, "manifest.json"), os.path.join(entry, "manifest.json.done"))
    shard = os.path.join(entry, SHARDS[1])
    os.replace(shard, shard + ".part")
    os.truncate(shard + ".part", 1_000_000)
    assert copy_checkpoint(str(folder), str(drive), progress=False) == entry
    verify(entry)


def test_a_drive_that_fills_up_in_the_middle_of_a_copy_keeps_the_part_for_the_next_call(
    tmp_path, mounted, monkeypatch
):
    folder = make_checkpoint(tmp_path / "big", elements=300_000)
    drive = mounted("size=3m")
    (drive / "other").write_bytes(bytes(1 << 20))
    with monkeypatch.context() as patch:
        patch.setattr(zinfer.store.copying, "require_space", lambda *_: None)
        with pytest.raises(
            StoreError, match=r"drive is full \(.*\(ENOSPC\)\): \d+ bytes .* to be written, 0 bytes"
        ) as caught:
            copy_checkpoint(str(folder), str(drive), progress=False)
    part = re.search(r"/\S+\.part", str(caught.value)).group()
    assert os.path.getsize(part) > 0
    (drive / "other").unlink()
    verify(copy_checkpoint(str(folder), str(drive), progress=False))


def test_a_drive_that_fills_up_in_the_middle_of_writing_a_module_is_left_as_it_was(mounted, monkeypatch):
    drive = mounted("size=1m")
    monkeypatch.setattr(zinfer.store.module, "require_space", lambda *_: None)
    with pytest.raises(StoreError, match="the drive is full"):
        save_module(torch.nn.Linear(1024, 1024), str(drive), progress=False)
    assert files_of(*entries(drive)) == {}
    assert zinfer.store.folder.free_bytes(str(drive)) > 1_000_000


def test_a_drive_that_fills_up_in_the_middle_of_a_conversion_is_left_as_it_was(
    tmp_path, mounted, monkeypatch
):
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save({"w": torch.ones(1024, 1024)}, folder / "pytorch_model.bin")
    drive = mounted("size=1m")
    with pytest.raises(StoreError, match=r"needs \d+ bytes"):
        convert_bin(str(folder), str(drive), progress=False)
    monkeypatch.setattr(zinfer.store.converting, "require_space", lambda *_: None)
    with pytest.raises(StoreError, match="the drive is full"):
        convert_bin(str(folder), str(drive), progress=False)
    assert files_of(*entries(drive)) == {}


def test_verify_names_an_altered_a_missing_and_a_shortened_file(checkpoint, drive):
    entry = copy_checkpoint(str(checkpoint), str(drive), progress=False)
    verify(entry)
    shard = os.path.join(entry, SHARDS[0])
    content = bytearray(open_read(shard))
    content[-1] ^= 1
    with open(shard, "wb") as file:
        file.write(content)
    with pytest.raises(StoreError, match=f"{SHARDS[0]}: damaged: .*delete {entry}"):
        verify(entry)
    os.truncate(shard, 10)
    with pytest.raises(StoreError, match=f"{SHARDS[0]}: damaged: 10 bytes"):
        verify(entry)
    os.unlink(shard)
    with pytest.raises(StoreError, match=f"{SHARDS[0]}: cannot be read"):
        verify(entry)


def test_verify_refuses_a_folder_that_is_no_complete_entry(tmp_path):
    with pytest.raises(StoreError, match="not a complete entry"):
        verify(str(tmp_path))


def test_a_deleted_entry_is_made_again(checkpoint, drive):
    entry = copy_checkpoint(str(checkpoint), str(drive), progress=False)
    shutil.rmtree(entry)
    assert copy_checkpoint(str(checkpoint), str(drive), progress=False) == entry
    verify(entry)


def open_read(path):
    with open(path, "rb") as file:
        return file.read()
