"""What copy_checkpoint promises: one faithful copy, resumed, reused, made anew when the source changes."""

import hashlib
import json
import os
import signal
import time

import pytest
from store_helpers import (
    SHARDS,
    cached_share,
    entries,
    files_of,
    make_checkpoint,
    skip_unless_the_cache_can_be_dropped,
)

import zinfer.store.copying
import zinfer.store.part_file
from zinfer.errors import CheckpointChangedError, CheckpointError, DriveError, StoreError
from zinfer.store import copy_checkpoint, verify

MIB = 1 << 20


def copy(folder, drive):
    return copy_checkpoint(str(folder), str(drive), progress=False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1000 bytes, so that small files take several."""
    monkeypatch.setattr(zinfer.store.copying, "BLOCK", 1000)
    monkeypatch.setattr(zinfer.store.part_file, "BLOCK", 1000)
    monkeypatch.setattr(zinfer.store.part_file, "DROP_EVERY", 3000)


@pytest.fixture
def opened_parts(monkeypatch):
    """The targets copy_file was asked for, in order."""
    targets = []
    original = zinfer.store.copying.copy_file

    def recording(source, target, bar):
        targets.append(source.name)
        return original(source, target, bar)

    monkeypatch.setattr(zinfer.store.copying, "copy_file", recording)
    return targets


def interrupt_after(monkeypatch, nbytes, error):
    """Let the write that passes `nbytes` bytes of one part raise `error`."""
    original = zinfer.store.part_file.PartFile.write

    def failing(self, data):
        original(self, data)
        if self.offset > nbytes:
            raise error

    monkeypatch.setattr(zinfer.store.part_file.PartFile, "write", failing)


def test_a_checkpoint_on_the_same_filesystem_is_used_where_it_is(checkpoint, tmp_path):
    assert copy(checkpoint, tmp_path) == str(checkpoint)
    assert not (tmp_path / "zinfer-store").exists()


def test_a_copy_holds_every_shard_and_every_small_file_byte_for_byte(checkpoint, drive, small_blocks):
    entry = copy(checkpoint, drive)
    assert entry.startswith(str(drive / "zinfer-store" / "tiny-llama-"))
    copied = files_of(entry)
    manifest = json.loads(copied.pop("manifest.json"))
    assert copied == files_of(checkpoint)
    assert manifest["files"].keys() == copied.keys()
    for name, record in manifest["files"].items():
        status = os.stat(checkpoint / name)
        assert record == {
            "size": len(copied[name]),
            "sha256": hashlib.sha256(copied[name]).hexdigest(),
            "source_size": status.st_size,
            "source_mtime_ns": status.st_mtime_ns,
        }
    verify(entry)


def test_weights_of_other_formats_hidden_files_and_the_stores_own_names_are_left_behind(checkpoint, drive):
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        ".gitattributes",
        "manifest.json",
        "x.part",
    ):
        (checkpoint / name).write_text("{}")
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "config").write_text("hidden")
    (checkpoint / "dangling.json").symlink_to("nowhere")
    expected = {
        *SHARDS,
        "config.json",
        "tokenizer.model",
        "additional_chat_templates/tool.jinja",
        "manifest.json",
    }
    assert files_of(copy(checkpoint, drive)).keys() == expected | {"model.safetensors.index.json"}


def test_symlinks_of_a_hub_cache_are_copied_as_files_under_the_models_name(checkpoint, drive, tmp_path):
    snapshot = tmp_path / "hub" / "models--meta--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in (*SHARDS, "model.safetensors.index.json", "config.json"):
        (snapshot / name).symlink_to(checkpoint / name)
    entry = copy(snapshot, drive)
    assert "/meta--tiny-" in entry
    assert not any(os.path.islink(os.path.join(entry, name)) for name in os.listdir(entry))
    verify(entry)


def test_a_variants_shards_are_copied(checkpoint, drive):
    (checkpoint / "model.fp16.safetensors").write_bytes((checkpoint / SHARDS[0]).read_bytes())
    entry = copy_checkpoint(str(checkpoint), str(drive), variant="fp16", progress=False)
    assert "model.fp16.safetensors" in files_of(entry) and SHARDS[0] not in files_of(entry)


def test_a_second_call_reuses_the_copy_without_reading_it(checkpoint, drive, monkeypatch):
    first = copy(checkpoint, drive)
    monkeypatch.setattr(zinfer.store.copying, "copy_file", None)
    monkeypatch.setattr(zinfer.store.part_file, "read_at", None)
    assert copy(checkpoint, drive) == first


def test_a_complete_copy_is_reused_from_a_drive_that_cannot_be_written(checkpoint, drive, monkeypatch):
    first = copy(checkpoint, drive)
    monkeypatch.setattr(zinfer.store.entry, "prepare_root", None)
    assert copy(checkpoint, drive) == first


def test_a_changed_source_gets_a_new_entry_and_the_old_one_stays(checkpoint, drive):
    first = copy(checkpoint, drive)
    make_checkpoint(checkpoint, elements=1001)
    second = copy(checkpoint, drive)
    assert first != second and len(entries(drive)) == 2
    verify(first)
    assert files_of(second)[SHARDS[0]] == (checkpoint / SHARDS[0]).read_bytes()


def test_a_touched_source_gets_a_new_entry(checkpoint, drive):
    first = copy(checkpoint, drive)
    os.utime(checkpoint / SHARDS[0], ns=(0, 1))
    assert copy(checkpoint, drive) != first


def test_a_copy_with_a_truncated_file_is_repaired_and_only_that_file_written(
    checkpoint, drive, opened_parts, caplog
):
    entry = copy(checkpoint, drive)
    os.truncate(os.path.join(entry, SHARDS[1]), 100)
    opened_parts.clear()
    assert copy(checkpoint, drive) == entry
    assert opened_parts == [SHARDS[1]]
    assert "has 100 bytes" in caplog.text
    verify(entry)


def test_a_damaged_manifest_is_not_believed(checkpoint, drive, caplog):
    entry = copy(checkpoint, drive)
    with open(os.path.join(entry, "manifest.json"), "w") as file:
        file.write('{"schema": 1, "files"')
    assert copy(checkpoint, drive) == entry
    assert "not valid JSON" in caplog.text
    verify(entry)


def test_an_interrupted_copy_leaves_a_part_and_no_manifest_and_goes_on_from_it(
    checkpoint, drive, small_blocks, opened_parts, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2500, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            copy(checkpoint, drive)
    (entry,) = entries(drive)
    left = files_of(entry)
    assert "manifest.json" not in left
    assert left[f"{SHARDS[0]}.part"] == (checkpoint / SHARDS[0]).read_bytes()[:3000]
    opened_parts.clear()
    caplog.set_level("INFO", "zinfer")
    assert copy(checkpoint, drive) == str(entry)
    assert opened_parts == list(SHARDS), "the small files were done and should not be copied again"
    assert "going on after 3000 bytes" in caplog.text
    verify(str(entry))
    assert not [name for name in files_of(entry) if ".part" in name or ".done" in name]


@pytest.mark.parametrize("damage", ["altered", "longer", "empty"])
def test_a_part_that_is_not_the_sources_beginning_is_thrown_away(
    checkpoint, drive, small_blocks, monkeypatch, damage
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2500, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            copy(checkpoint, drive)
    (entry,) = entries(drive)
    part = entry / f"{SHARDS[0]}.part"
    content = bytearray(part.read_bytes())
    content[2700] ^= 1
    source = (checkpoint / SHARDS[0]).read_bytes()
    part.write_bytes({"altered": bytes(content), "longer": source + b"more", "empty": b""}[damage])
    verify(copy(checkpoint, drive))
    assert files_of(entry)[SHARDS[0]] == source


def test_a_source_that_changes_while_it_is_copied_is_refused_and_its_part_removed(
    checkpoint, drive, small_blocks, monkeypatch
):
    original = zinfer.store.part_file.PartFile.write

    def altering(self, data):
        original(self, data)
        if self.path.endswith(SHARDS[0]):
            os.utime(checkpoint / SHARDS[0], ns=(0, 7))

    monkeypatch.setattr(zinfer.store.part_file.PartFile, "write", altering)
    with pytest.raises(CheckpointChangedError, match=f"{SHARDS[0]}: changed while it was copied.*try again"):
        copy(checkpoint, drive)
    (entry,) = entries(drive)
    assert not [name for name in files_of(entry) if name.startswith(SHARDS[0]) or name == "manifest.json"]


def test_a_source_that_is_replaced_while_it_is_copied_is_refused(
    checkpoint, drive, small_blocks, monkeypatch
):
    original = zinfer.store.part_file.PartFile.write

    def replacing(self, data):
        original(self, data)
        if self.path.endswith(SHARDS[0]):
            (checkpoint / "new").write_bytes(b"another file")
            os.replace(checkpoint / "new", checkpoint / SHARDS[0])

    monkeypatch.setattr(zinfer.store.part_file.PartFile, "write", replacing)
    with pytest.raises(CheckpointChangedError, match=SHARDS[0]):
        copy(checkpoint, drive)


def test_a_drive_that_gives_back_other_bytes_is_found_out(checkpoint, drive, monkeypatch):
    original = zinfer.store.part_file.hash_file

    def wrong(path):
        size, digest = original(path)
        return (size, "0" * 64) if SHARDS[1] in path else (size, digest)

    monkeypatch.setattr(zinfer.store.part_file, "hash_file", wrong)
    with pytest.raises(
        StoreError, match=rf"{SHARDS[1]}\.part: what the drive gives back is not what was written"
    ):
        copy(checkpoint, drive)
    (entry,) = entries(drive)
    assert not {"manifest.json", SHARDS[1], f"{SHARDS[1]}.part"} & files_of(entry).keys()


def test_a_read_error_of_the_source_names_file_and_offset(checkpoint, drive, small_blocks, monkeypatch):
    original = os.preadv
    shard = os.stat(checkpoint / SHARDS[0]).st_ino

    def failing(fd, buffers, offset):
        if os.fstat(fd).st_ino == shard and offset >= 2000:
            raise OSError(5, "Input/output error")
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(DriveError, match=rf"{SHARDS[0]}: cannot read .* at offset 2000: .*EIO") as caught:
        copy(checkpoint, drive)
    assert (caught.value.offset, caught.value.errno) == (2000, 5)


def test_a_source_that_ends_early_without_having_changed_is_an_error(
    checkpoint, drive, small_blocks, monkeypatch
):
    original = os.preadv
    shard = os.stat(checkpoint / SHARDS[0]).st_ino

    def ending(fd, buffers, offset):
        return 0 if os.fstat(fd).st_ino == shard and offset >= 2000 else original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", ending)
    with pytest.raises(DriveError, match=f"{SHARDS[0]}: the file ended at byte 2000 of"):
        copy(checkpoint, drive)


def test_a_missing_shard_is_named(checkpoint, drive):
    (checkpoint / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: .*ENOENT"):
        copy(checkpoint, drive)


def test_a_folder_without_shards_is_refused(tmp_path, drive):
    with pytest.raises(CheckpointError, match="no safetensors shards"):
        copy(tmp_path, drive)


def test_progress_is_a_bar_in_bytes_on_stderr_and_silent_when_not_wanted(checkpoint, drive, capfd):
    copy_checkpoint(str(checkpoint), str(drive), progress=True)
    assert "copying: 100%" in capfd.readouterr().err
    os.utime(checkpoint / SHARDS[0], ns=(0, 1))
    copy(checkpoint, drive)
    assert capfd.readouterr() == ("", "")


def test_a_copy_killed_in_the_middle_is_finished_by_the_next_call(tmp_path, drive, start_python, caplog):
    folder = make_checkpoint(tmp_path / "big", elements=16 * MIB)
    process = start_python(
        f"""
        import time
        from zinfer.store import copy_checkpoint, part_file
        original = part_file.PartFile.write
        def slow(self, data):
            original(self, data)
            time.sleep(0.2)
        part_file.PartFile.write = slow
        copy_checkpoint({str(folder)!r}, {str(drive)!r}, progress=False)
        """
    )
    deadline = time.monotonic() + 60
    part = f"*/{SHARDS[0]}.part"
    while not [p for p in (drive / "zinfer-store").glob(part) if p.stat().st_size >= 16 * MIB]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    (entry,) = entries(drive)
    assert "manifest.json" not in os.listdir(entry)
    caplog.set_level("INFO", "zinfer")
    assert copy(folder, drive) == str(entry)
    assert "going on after" in caplog.text
    verify(str(entry))
    assert files_of(entry)[SHARDS[0]] == (folder / SHARDS[0]).read_bytes()


def test_a_copied_source_does_not_stay_in_the_page_cache(tmp_path, drive):
    skip_unless_the_cache_can_be_dropped(tmp_path)
    folder = make_checkpoint(tmp_path / "big", elements=8 * MIB)
    os.sync()
    assert cached_share(folder / SHARDS[0]) > 0.5
    copy(folder, drive)
    assert cached_share(folder / SHARDS[0]) < 0.1


def test_two_processes_at_once_make_one_copy_and_both_get_it(tmp_path, drive, start_python):
    folder = make_checkpoint(tmp_path / "big", elements=4 * MIB)
    code = f"""
        import logging, time
        from zinfer.store import copying, part_file
        logging.basicConfig(level="INFO")
        original = part_file.PartFile.write
        def slow(self, data):
            original(self, data)
            time.sleep(0.3)
        part_file.PartFile.write = slow
        print(copying.copy_checkpoint({str(folder)!r}, {str(drive)!r}, progress=False))
        """
    outputs = [process.communicate(timeout=120) for process in (start_python(code), start_python(code))]
    (entry,) = entries(drive)
    assert [out.strip() for out, _ in outputs] == [str(entry)] * 2
    logged = "".join(err for _, err in outputs)
    assert logged.count("copying ") == 1
    assert logged.count("waiting for another process") <= 1
    verify(str(entry))


def test_waiting_for_another_writer_is_logged(checkpoint, drive, start_python, caplog, monkeypatch):
    monkeypatch.setattr(zinfer.store.entry, "WAIT_BEFORE_LOG", 0.1)
    entry = copy(checkpoint, drive)
    os.unlink(os.path.join(entry, "manifest.json"))
    process = start_python(
        f"""
        import fcntl, time
        with open({entry + ".lock"!r}) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            print("held", flush=True)
            time.sleep(1.5)
        """
    )
    assert process.stdout.readline() == "held\n"
    assert copy(checkpoint, drive) == entry
    assert "waiting for another process" in caplog.text
