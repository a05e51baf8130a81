"""What a list of paths promises: each shard once, a share of it in every folder, as sound as a plain copy."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load
from store_helpers import SHARDS, entries, files_of, make_checkpoint

import zinfer.store.copying
import zinfer.store.folder
import zinfer.store.striped_file
from zinfer.errors import CheckpointChangedError, OptionError, StoreError
from zinfer.store import convert_bin, copy_checkpoint, save_module, verify
from zinfer.store.striped_file import StripedPartFile
from zinfer.weights.checkpoint import open_checkpoint
from zinfer.weights.packed import PAGE, read_bytes, read_pack

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch):
    """Stripes of a page, so that small shards lie in every folder."""
    monkeypatch.setattr(zinfer.store.striped_file, "STRIPE", PAGE)


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "tiny-llama", elements=10_000)


@pytest.fixture(params=[2, 3])
def folders(request, tmp_path):
    """Two or three folders to stripe over."""
    made = [tmp_path / f"nvme{number}" for number in range(request.param)]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def two(tmp_path):
    made = [tmp_path / "nvme0", tmp_path / "nvme1"]
    for folder in made:
        folder.mkdir()
    return made


def copy(checkpoint, folders):
    return copy_checkpoint(str(checkpoint), list(map(str, folders)), progress=False)


def shard_bytes(path):
    """The bytes of a striped shard."""
    pack = read_pack(str(path))
    return read_bytes(pack, 0, pack.size)


def members(entry, folders, name):
    return [folder / "zinfer-store" / os.path.basename(entry) / name for folder in folders]


def shards_in(folders):
    """Shards, members and parts of them below `folders`."""
    return [path for folder in folders for path in folder.rglob("model-0*")]


def leftovers(folders):
    """What lies in the stores and belongs to no complete entry."""
    return [
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and (path.name.endswith((".part", ".done")))
    ]


# What is written


def test_a_copy_is_striped_and_the_small_files_lie_in_the_first_folder(checkpoint, folders):
    entry = copy(checkpoint, folders)
    assert entry.startswith(str(folders[0] / "zinfer-store" / "tiny-llama-"))
    source, first = files_of(checkpoint), files_of(entry)
    for name, content in source.items():
        assert (shard_bytes(f"{entry}/{name}") if name in SHARDS else first[name]) == content
    assert first.keys() == {*source, "manifest.json"}
    for folder in folders[1:]:
        (other,) = entries(folder)
        assert other.name == os.path.basename(entry)
        assert files_of(other).keys() == set(SHARDS)
    verify(entry)
    assert not leftovers(folders)


def test_every_folder_holds_its_share(checkpoint, folders):
    entry = copy(checkpoint, folders)
    for name in SHARDS:
        sizes = [path.stat().st_size - PAGE for path in members(entry, folders, name)]
        assert sum(sizes) == (checkpoint / name).stat().st_size
        assert max(sizes) - min(sizes) <= PAGE


def test_the_manifest_has_the_shards_own_size_and_hash(checkpoint, two):
    striped = json.loads(files_of(copy(checkpoint, two))["manifest.json"])["files"]
    for name, record in striped.items():
        assert record["size"] == (checkpoint / name).stat().st_size
        assert record.get("members", 1) == (2 if name in SHARDS else 1)


def test_the_striped_checkpoint_opens_with_the_same_tensors(checkpoint, folders):
    plain, striped = open_checkpoint(str(checkpoint)), open_checkpoint(copy(checkpoint, folders))
    assert striped.nbytes == plain.nbytes
    for name, entry in striped.tensors.items():
        other = plain.tensors[name]
        assert (entry.offset, entry.length, entry.dtype, entry.shape) == (
            *(other.offset, other.length),
            *(other.dtype, other.shape),
        )


def test_bin_files_are_converted_into_striped_shards(tmp_path, folders):
    source = tmp_path / "bins"
    source.mkdir()
    (source / "config.json").write_text("{}")
    state = {"a": torch.rand(123, 45), "b": torch.arange(3)}
    torch.save(state, source / "pytorch_model.bin")
    entry = convert_bin(str(source), list(map(str, folders)), progress=False)
    loaded = load(shard_bytes(f"{entry}/model.safetensors"))
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    verify(entry)
    assert convert_bin(str(source), list(map(str, folders)), progress=False) == entry


def test_a_live_module_is_written_into_striped_shards(folders, monkeypatch):
    monkeypatch.setattr(zinfer.store.module, "SHARD_BYTES", 20_000)
    module = torch.nn.Sequential(torch.nn.Linear(60, 70), torch.nn.Linear(70, 80))
    paths = list(map(str, folders))
    entry, stored = save_module(module, paths, progress=False)
    shards = open_checkpoint(entry).shards
    assert len(shards) > 1
    loaded = {name: tensor for shard in shards for name, tensor in load(shard_bytes(shard)).items()}
    for name, parameter in module.named_parameters():
        assert torch.equal(loaded[stored[name]], parameter)
    verify(entry)
    monkeypatch.setattr(zinfer.store.module, "write_shard", None)
    assert save_module(module, paths, progress=False)[0] == entry


def test_a_shard_smaller_than_a_stripe_has_members_that_are_only_headers(tmp_path, folders):
    small = make_checkpoint(tmp_path / "small", elements=10)
    entry = copy(small, folders)
    assert shard_bytes(f"{entry}/{SHARDS[0]}") == (small / SHARDS[0]).read_bytes()
    assert members(entry, folders, SHARDS[0])[-1].stat().st_size == PAGE
    verify(entry)


# Which entry


def test_a_second_call_finds_it_without_reading_the_source(checkpoint, folders, monkeypatch):
    entry = copy(checkpoint, folders)
    monkeypatch.setattr(zinfer.store.copying, "copy_file", None)
    assert copy(checkpoint, folders) == entry


def test_a_list_of_one_is_that_path(checkpoint, tmp_path, drive):
    assert copy(checkpoint, [tmp_path]) == str(checkpoint)
    entry = copy(checkpoint, [drive])
    assert entry == copy_checkpoint(str(checkpoint), str(drive), progress=False)
    assert files_of(entry)[SHARDS[0]] == (checkpoint / SHARDS[0]).read_bytes()


def test_plain_and_striped_copies_and_those_of_other_drives_are_entries_of_their_own(
    checkpoint, two, drive, tmp_path
):
    third = tmp_path / "nvme2"
    third.mkdir()
    lists = [[drive], [drive, two[0]], [two[0], drive], [drive, two[1]], [drive, two[0], third]]
    made = [copy(checkpoint, folders) for folders in lists]
    assert len({os.path.basename(entry) for entry in made}) == len(lists)
    for entry in made:
        verify(entry)


def test_a_link_to_a_folder_is_that_folder(checkpoint, two, tmp_path):
    entry = copy(checkpoint, two)
    (tmp_path / "link").symlink_to(two[0])
    assert copy(checkpoint, [tmp_path / "link", two[1]]) == entry


def test_a_striped_checkpoint_is_not_copied_again(checkpoint, two, drive, tmp_path):
    entry = copy(checkpoint, two)
    assert copy(entry, [tmp_path]) == entry, "on one of its own drives it streams as it is"
    for folders in ([drive], [drive, two[0]]):
        with pytest.raises(OptionError, match=r"striped over drives already.*leave nvme_path out"):
            copy(entry, folders)


# What cannot be


def test_an_empty_list_is_refused(checkpoint):
    with pytest.raises(OptionError, match="empty list"):
        copy(checkpoint, [])


@pytest.mark.parametrize("other", ["nvme0", "nvme1/../nvme0", "link"])
def test_a_folder_that_is_named_twice_is_refused_before_anything_is_written(checkpoint, two, tmp_path, other):
    (tmp_path / "link").symlink_to(two[0])
    with pytest.raises(OptionError, match="twice"):
        copy(checkpoint, [two[0], two[1], tmp_path / other])
    assert not entries(two[0])


@pytest.mark.parametrize("other", ["absent", "file"])
def test_a_path_that_is_no_folder_is_refused_before_anything_is_written(checkpoint, two, tmp_path, other):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"{other}' (does not exist|is not a folder)"):
        copy(checkpoint, [*two, tmp_path / other])
    assert not list(two[0].iterdir())


def test_a_drive_without_room_for_its_share_is_named(checkpoint, two, mounted):
    small = mounted("size=16k")
    with pytest.raises(StoreError, match=rf"{small}/zinfer-store: writing .* needs \d+ bytes"):
        copy(checkpoint, [two[0], small])


def test_folders_of_one_filesystem_share_its_room(checkpoint, mounted):
    total = sum((checkpoint / name).stat().st_size for name in SHARDS)
    drive = mounted(f"size={total * 3 // 4 // PAGE * PAGE}")
    for name in "ab":
        (drive / name).mkdir()
    with pytest.raises(StoreError, match=r"zinfer-store: writing .* needs \d+ bytes"):
        copy(checkpoint, [drive / "a", drive / "b"])


def test_a_drive_that_fills_up_leaves_no_part_on_any(checkpoint, two, mounted, monkeypatch):
    small = mounted("size=40k")
    monkeypatch.setattr(zinfer.store.copying, "require_space", lambda *_: None)
    with pytest.raises(StoreError, match=rf"{small}.*\.part: the drive is full"):
        copy(checkpoint, [two[0], small])
    assert not [path for path in leftovers([two[0], small]) if path.endswith(".part")]


def test_paths_too_long_for_a_header_are_refused_before_anything_is_written(tmp_path, checkpoint):
    folders = [tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200) / str(number) for number in range(8)]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(OptionError, match="too long to be striped over"):
        copy(checkpoint, folders)
    assert not shards_in(folders)


# What goes wrong while it is written


def interrupt_in(monkeypatch, name, error):
    """Raise `error` once some bytes of the shard `name` are written."""
    original = StripedPartFile.write

    def failing(self, data):
        original(self, data)
        if self.path.endswith(name):
            raise error

    monkeypatch.setattr(StripedPartFile, "write", failing)


def test_an_interrupted_copy_keeps_the_shards_that_were_done(checkpoint, folders, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in(patch, SHARDS[1], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            copy(checkpoint, folders)
    (entry,) = entries(folders[0])
    assert "manifest.json" not in files_of(entry)
    assert not [path for path in leftovers(folders) if path.endswith(".part")]
    done = (entry / SHARDS[0]).stat().st_mtime_ns
    assert copy(checkpoint, folders) == str(entry)
    assert (entry / SHARDS[0]).stat().st_mtime_ns == done, "the first shard was done"
    verify(str(entry))
    assert not leftovers(folders)


def test_a_copy_killed_in_the_middle_is_finished_by_the_next_call(tmp_path, two, start_python):
    folder = make_checkpoint(tmp_path / "big", elements=4 * MIB)
    process = start_python(
        f"""
        import time
        from zinfer.store import copy_checkpoint, striped_file
        original = striped_file.StripedPartFile.write
        def slow(self, data):
            original(self, data)
            time.sleep(0.3)
        striped_file.StripedPartFile.write = slow
        copy_checkpoint({str(folder)!r}, {list(map(str, two))!r}, progress=False)
        """
    )
    deadline = time.monotonic() + 60
    while not [p for p in two[1].rglob(f"{SHARDS[0]}.part") if p.stat().st_size > MIB]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert leftovers(two)
    verify(entry := copy(folder, two))
    assert shard_bytes(f"{entry}/{SHARDS[0]}") == (folder / SHARDS[0]).read_bytes()
    assert not leftovers(two)


def test_two_processes_at_once_make_one_copy(tmp_path, two, start_python):
    folder = make_checkpoint(tmp_path / "big", elements=MIB)
    code = f"""
        import logging
        from zinfer.store import copy_checkpoint
        logging.basicConfig(level="INFO")
        print(copy_checkpoint({str(folder)!r}, {list(map(str, two))!r}, progress=False))
        """
    outputs = [process.communicate(timeout=120) for process in (start_python(code), start_python(code))]
    (entry,) = entries(two[0])
    assert [out.strip() for out, _ in outputs] == [str(entry)] * 2
    assert "".join(err for _, err in outputs).count("copying ") == 1
    verify(str(entry))


def test_a_drive_that_fails_to_flush_is_named_and_no_part_is_left(checkpoint, two, monkeypatch):
    original = os.fsync

    def failing(fd):
        if str(two[1]) in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        original(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=rf"{two[1]}.*\.part: cannot be written: .*\(EIO\)"):
        copy(checkpoint, two)
    assert not shards_in(two)


def test_a_source_that_changes_while_it_is_copied_is_refused(checkpoint, folders, monkeypatch):
    original = StripedPartFile.write

    def altering(self, data):
        original(self, data)
        os.utime(checkpoint / SHARDS[0], ns=(0, 7))

    monkeypatch.setattr(StripedPartFile, "write", altering)
    with pytest.raises(CheckpointChangedError, match=f"{SHARDS[0]}: changed while it was copied"):
        copy(checkpoint, folders)
    assert not shards_in(folders)


@pytest.mark.parametrize("at", [100, PAGE + 10])
def test_a_drive_that_gives_back_other_bytes_is_found_out(at, checkpoint, folders, monkeypatch):
    """Be it in a header or in a stripe, and on whichever drive."""
    original = zinfer.store.striped_file.hash_striped

    def spoilt(paths, geometry, pages=()):
        with open(paths[-1], "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        return original(paths, geometry, pages)

    monkeypatch.setattr(zinfer.store.striped_file, "hash_striped", spoilt)
    with pytest.raises(StoreError, match="what the drives give back is not what was written"):
        copy(checkpoint, folders)
    assert not shards_in(folders)


# What is found damaged


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("damage", ["cut", "gone", "header", "foreign"])
def test_a_damaged_shard_is_written_anew_and_no_other(
    number, damage, checkpoint, folders, monkeypatch, caplog
):
    entry = copy(checkpoint, folders)
    member = members(entry, folders, SHARDS[1])[number]
    content = member.read_bytes()
    if damage == "gone":
        member.unlink()
    else:
        other = members(entry, folders, SHARDS[0])[number].read_bytes()
        member.write_bytes(
            {"cut": content[:-1], "header": b"\0" * 50 + content[50:], "foreign": other}[damage]
        )
    targets = []
    original = zinfer.store.copying.copy_file

    def recording(source, target, bar):
        targets.append(source.name)
        return original(source, target, bar)

    monkeypatch.setattr(zinfer.store.copying, "copy_file", recording)
    assert copy(checkpoint, folders) == entry
    assert targets == [SHARDS[1]]
    (told,) = [record.getMessage() for record in caplog.records if "writing it anew" in record.getMessage()]
    assert told.startswith(f"{entry}/{SHARDS[1]}: ") and "None" not in told
    assert ("is missing" in told) == (damage == "gone" and number == 0)
    verify(entry)


@pytest.mark.parametrize("gone", ["entry", "store"])
def test_a_drive_that_is_not_mounted_is_asked_for_and_nothing_is_written_below_its_mount_point(
    gone, checkpoint, folders
):
    entry = copy(checkpoint, folders)
    away = members(entry, folders, "")[-1] if gone == "entry" else folders[-1] / "zinfer-store"
    hidden = away.rename(folders[-1].with_name("unmounted"))
    before = shards_in(folders)
    for _ in range(2):
        with pytest.raises(
            StoreError, match=rf"is the drive mounted at {folders[-1]}\? mount it, or delete {entry} to have"
        ):
            copy(checkpoint, folders)
    assert shards_in(folders) == before and not away.exists()
    times = [path.stat().st_mtime_ns for path in before]
    hidden.rename(away)
    assert copy(checkpoint, folders) == entry
    assert [path.stat().st_mtime_ns for path in before] == times
    verify(entry)


def test_an_interrupted_copy_asks_for_a_drive_that_is_not_mounted(checkpoint, two, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in(patch, SHARDS[1], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            copy(checkpoint, two)
    (two[1] / "zinfer-store").rename(two[1].with_name("unmounted"))
    with pytest.raises(StoreError, match=rf"is the drive mounted at {two[1]}\?"):
        copy(checkpoint, two)
    assert not list(two[1].iterdir())


def test_after_deleting_the_entry_from_the_first_drive_it_is_written_anew(checkpoint, folders):
    entry = copy(checkpoint, folders)
    for folder in members(entry, folders, ""):
        if folder != members(entry, folders, "")[1]:
            shutil.rmtree(folder)
    assert copy(checkpoint, folders) == entry
    verify(entry)


def test_an_emptied_folder_on_one_drive_is_filled_anew(checkpoint, folders):
    entry = copy(checkpoint, folders)
    for child in members(entry, folders, "")[-1].iterdir():
        child.unlink()
    assert copy(checkpoint, folders) == entry
    verify(entry)


def test_verify_names_a_damaged_a_short_and_a_missing_member(checkpoint, two):
    entry = copy(checkpoint, two)
    _, member = members(entry, two, SHARDS[0])
    content = bytearray(member.read_bytes())
    content[-1] ^= 1
    member.write_bytes(content)
    with pytest.raises(StoreError, match=f"{SHARDS[0]}: damaged: .*delete {entry}"):
        verify(entry)
    os.truncate(member, len(content) - 5)
    with pytest.raises(StoreError, match=f"cannot be read: {member}: has"):
        verify(entry)
    member.unlink()
    with pytest.raises(StoreError, match=f"cannot be read: {member}.*mount {member.parent}"):
        verify(entry)
    os.truncate(f"{entry}/{SHARDS[0]}", 0)
    with pytest.raises(StoreError, match="its header is gone"):
        verify(entry)


def test_writing_striped_leaves_no_descriptor_open(checkpoint, two, mounted):
    before = os.listdir("/proc/self/fd")
    copy(checkpoint, two)
    with pytest.raises(StoreError):
        copy(checkpoint, [two[0], mounted("ro,size=1m")])
    assert len(os.listdir("/proc/self/fd")) == len(before)
