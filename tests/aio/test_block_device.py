from __future__ import annotations

import os
from pathlib import Path

import pytest

from zinfer.aio import block_device
from zinfer.aio.block_device import BlockDevice, Mount, block_device_of, mount_of, read_mounts


def test_the_deepest_and_latest_mount_holds_a_path():
    text = (
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "30 27 0:25 / /mnt rw shared:1 - tmpfs tmpfs rw\n"
        "31 27 259:1 / /mnt/my\\040drive rw - xfs /dev/nvme0n1 rw\n"
        "32 27 0:26 / /mnt rw - nfs4 server:/mnt rw\n"
    )
    assert mount_of("/mnt/my drive/models", text) == Mount("/mnt/my drive", "xfs", "/dev/nvme0n1", "259:1")
    assert mount_of("/mnt/other", text) == Mount("/mnt", "nfs4", "server:/mnt", "0:26")
    assert mount_of("/mntother", text) == Mount("/", "ext4", "/dev/vda", "254:0")
    assert mount_of("/x", "") is None


@pytest.mark.parametrize("name", [b"caf\xe9", "café".encode(), b"a\x85b", "x\u2028y".encode(), b"a\x0bb"])
def test_a_mount_point_may_have_any_name(name, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"27 1 0:1 / / rw - ext4 /dev/vda rw\n31 27 0:2 / /mnt/" + name + b" rw - xfs /dev/vdb rw\n"
    )
    monkeypatch.setattr(block_device, "MOUNTS", mounts)
    point = os.fsdecode(b"/mnt/" + name)
    assert mount_of(point + "/models", read_mounts()) == Mount(point, "xfs", "/dev/vdb", "0:2")
    assert mount_of("/mnt", read_mounts()) == Mount("/", "ext4", "/dev/vda", "0:1")


def test_an_escape_in_a_mount_point_is_a_byte_of_its_name():
    text = "31 27 0:2 / /mnt/caf\\303\\251\\040x\\134y\\377 rw - xfs /dev/vdb rw\n"
    point = os.fsdecode("/mnt/café x\\y".encode() + b"\xff")
    assert mount_of(point, text) == Mount(point, "xfs", "/dev/vdb", "0:2")


def test_without_a_list_of_mounts_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(block_device, "MOUNTS", tmp_path / "absent")
    assert read_mounts() == "" and mount_of("/", read_mounts()) is None
    assert block_device_of(str(tmp_path)) is not None


@pytest.fixture
def devices_of(tmp_path, monkeypatch):
    """devices_of("filesystem source", ...) -> the devices of folders on such mounts, none of them on a disk."""

    def look(*kinds: str) -> list[BlockDevice]:
        folders = [tmp_path / str(number) for number in range(len(kinds))]
        lines = []
        for number, (folder, kind) in enumerate(zip(folders, kinds, strict=True)):
            folder.mkdir()
            lines.append(f"{30 + number} 27 0:{40 + number} / {folder} rw - {kind} rw\n")
        (tmp_path / "mountinfo").write_text("".join(lines))
        monkeypatch.setattr(block_device, "MOUNTS", tmp_path / "mountinfo")
        monkeypatch.setattr(block_device, "BLOCK_DEVICES", tmp_path / "none")
        return [block_device_of(str(folder)) for folder in folders]

    return look


def test_two_servers_are_two_devices_with_keys_of_their_own(devices_of):
    one, other = devices_of("nfs4 one:/models", "nfs4 other:/models")
    assert one.key == "nfs4-one_models" and other.key == "nfs4-other_models"
    assert one != other and one.name == other.name == "nfs4"


@pytest.mark.parametrize("kinds", [("tmpfs tmpfs", "tmpfs tmpfs"), ("nfs4 a:/x/y", "nfs4 a:/x_y")])
def test_two_filesystems_that_share_a_key_are_two_devices_all_the_same(kinds, devices_of):
    one, other = devices_of(*kinds)
    assert one.key == other.key
    assert one != other and len({one, other}) == 2


def test_folders_of_one_filesystem_without_a_device_are_on_one(devices_of, tmp_path):
    (device,) = devices_of("tmpfs tmpfs")
    (tmp_path / "0" / "below").mkdir()
    assert block_device_of(str(tmp_path / "0" / "below")) == device


def test_a_path_that_is_not_there_has_no_device(tmp_path):
    with pytest.raises(FileNotFoundError):
        block_device_of(str(tmp_path / "absent"))


def test_a_filesystem_without_a_device_goes_by_its_own_name():
    assert block_device_of("/proc/self").name == "proc"
    assert block_device_of("/proc/self").disks == 1


def disk(sys: Path, name: str, number: str, **facts: str) -> Path:
    """A made-up disk below `sys`, as /sys/block has them."""
    place = sys / "devices" / name
    for fact, text in {"size": "2048", "queue/rotational": "0", **facts}.items():
        (place / fact).parent.mkdir(parents=True, exist_ok=True)
        (place / fact).write_text(text + "\n")
    numbers = sys / "dev" / "block"
    numbers.mkdir(parents=True, exist_ok=True)
    (numbers / number).symlink_to(place)
    return place


@pytest.fixture
def described():
    """What is found of a made-up device when files lie on it."""

    def describe(place: Path) -> BlockDevice:
        return block_device._describe(block_device._whole(place))

    return describe


def test_a_drive_is_known_by_model_and_serial_number(tmp_path, described):
    place = disk(tmp_path, "nvme0n1", "259:0", **{"device/model": "Fast 9000", "device/serial": "S1"})
    assert described(place) == BlockDevice("Fast_9000-S1-1048576", "nvme0n1", 1, False, None)


def test_a_partition_answers_as_its_disk(tmp_path, described):
    place = disk(tmp_path, "nvme0n1", "259:0", serial="S1")
    (place / "nvme0n1p2").mkdir()
    (place / "nvme0n1p2" / "partition").write_text("2\n")
    assert described(place / "nvme0n1p2") == described(place)


def test_a_raid_set_counts_its_drives_and_is_on_their_node(tmp_path, described):
    members = [disk(tmp_path, f"nvme{i}n1", f"259:{i}", **{"device/numa_node": "1"}) for i in range(4)]
    (members[0] / "nvme0n1p1").mkdir()
    (members[0] / "nvme0n1p1" / "partition").write_text("1\n")
    array = disk(tmp_path, "md0", "9:0", **{"md/uuid": "aa:bb"})
    (array / "slaves").mkdir()
    for member in (members[0] / "nvme0n1p1", *members[1:]):
        (array / "slaves" / member.name).symlink_to(member)
    found = described(array)
    assert (found.name, found.disks, found.numa_node) == ("md0", 4, 1)
    assert found.key == "aa_bb-1048576"


def test_drives_on_two_nodes_are_on_none(tmp_path, described):
    array = disk(tmp_path, "md0", "9:0")
    (array / "slaves").mkdir()
    for i in range(2):
        member = disk(tmp_path, f"nvme{i}n1", f"259:{i}", **{"device/numa_node": str(i)})
        (array / "slaves" / member.name).symlink_to(member)
    assert described(array).numa_node is None


@pytest.mark.parametrize("name", ["a b/c", "../../etc", "ünïcode", ""])
def test_a_key_is_always_fit_for_a_file_name(tmp_path, described, name):
    key = described(disk(tmp_path, "sda", "8:0", serial=name)).key
    assert key and "/" not in key and not key.startswith(".")
