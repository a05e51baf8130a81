from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from zinfer.aio.block_device import BlockDevice, Mount, block_device_of
from zinfer.aio.profile import Profile, save_profile
from zinfer.doctor import NOTE, OK, PROBLEM, as_text, drive, facts, gather, judge
from zinfer.doctor.drive import Drive
from zinfer.doctor.facts import Backends, Facts, Memory, Pages, Versions
from zinfer.pinned.numa import online_nodes

GIB = 1 << 30


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(drive, "SAMPLE_BYTES", 8 << 20)
    monkeypatch.setattr(drive, "SMALLEST_SAMPLE", 8 << 20)
    monkeypatch.setattr(drive, "SECONDS", 0.05)
    monkeypatch.setattr(facts, "POOL_BYTES", 4 << 20)


HEALTHY = Facts(
    versions=Versions("0.1.0", "3.11.7", "2.13.0+cpu", "5.23.0", "6.18.4"),
    backends=Backends("io_uring", (), 0),
    drive=Drive(
        "/mnt/nvme", "folder", True, Mount("/mnt/nvme", "ext4", "/dev/nvme0n1"),
        BlockDevice("a-drive", "nvme0n1", rotational=False), 900 * GIB,
        "a temporary file of 256 MiB", True, "", 512, 3.3e9,
    ),
    pages=Pages(8 << 20, False, "no CUDA runtime", "madvise", 64 << 20, 64 << 20, ""),
    memory=Memory(64 * GIB, 64 * GIB, 60 * GIB, 59 * GIB),
    open_files=1024,
    cuda_devices=(),
)  # fmt: skip


def unwell(found: Facts) -> list:
    return [finding for finding in judge(found) if finding.level != OK]


def test_a_healthy_machine_has_nothing_to_remedy():
    assert unwell(HEALTHY) == []
    assert all(not finding.remedy for finding in judge(HEALTHY))
    assert as_text(judge(HEALTHY)).endswith("0 problem(s), 0 note(s)\n")


def of(part: str, **changes) -> Facts:
    return replace(HEALTHY, **{part: replace(getattr(HEALTHY, part), **changes)})


def without_io_uring(reason: str, sysctl: int | None = 0, kernel: str = "6.1") -> Facts:
    found = of("backends", used="threads", fallbacks=(("io_uring", reason),), io_uring_disabled=sysctl)
    return replace(found, versions=replace(found.versions, kernel=kernel))


@pytest.mark.parametrize(
    ("found", "topic", "level", "remedy"),
    [
        (without_io_uring("built without liburing: install liburing-dev"), "reads", NOTE, "liburing-dev"),
        (without_io_uring("EPERM", sysctl=2), "reads", NOTE, "sysctl kernel.io_uring_disabled=0"),
        (without_io_uring("EPERM"), "reads", NOTE, "seccomp"),
        (without_io_uring("ENOSYS", None, "4.19"), "reads", NOTE, "5.1"),
        (without_io_uring("ENOMEM: Cannot allocate memory"), "reads", NOTE, "ulimit -l"),
        (of("versions", torch="2.7.1"), "torch", PROBLEM, "pip install 'torch>=2.8'"),
        (of("versions", transformers="4.57"), "transformers", PROBLEM, "transformers>=5.10"),
        (of("drive", writable=False), "path", NOTE, "chown"),
        (of("drive", mount=Mount("/dev/shm", "tmpfs", "tmpfs")), "filesystem", NOTE, "NVMe"),
        (of("drive", mount=Mount("/home", "nfs4", "server:/home")), "filesystem", NOTE, "local"),
        (
            of("drive", device=BlockDevice("vda", "vda", rotational=True), read_rate=2e8),
            "filesystem",
            NOTE,
            "NVMe",
        ),
        (of("drive", read_rate=2e8), "speed", NOTE, "faster"),
        (of("drive", read_rate=None, measured="", failure="no room"), "speed", NOTE, "4 MiB"),
        (of("drive", direct=False, direct_reason="EINVAL"), "O_DIRECT", NOTE, "xfs"),
        (of("pages", transparent_huge_pages="never", huge_bytes=0), "huge pages", NOTE, "echo madvise >"),
        (of("pages", huge_bytes=2 << 20), "huge pages", NOTE, "compact_memory"),
        (of("pages", huge_bytes=None), "huge pages", NOTE, "/proc"),
        (
            of("pages", numa_nodes=(0, 1), numa_node=1, numa_reason="mbind to node 1: EPERM"),
            "NUMA",
            NOTE,
            "SYS_NICE",
        ),
        (of("pages", failure="no memory"), "page locking", PROBLEM, "memory"),
        (of("memory", budget=64 << 20), "memory", PROBLEM, "--memory"),
        (of("memory", budget=512 << 20), "memory", NOTE, "--memory"),
        (replace(HEALTHY, open_files=256), "open files", NOTE, "ulimit -n"),
    ],
)
def test_each_shortfall_has_its_remedy(found, topic, level, remedy):
    first = unwell(found)[0]
    assert (first.topic, first.level) == (topic, level)
    assert remedy in first.remedy
    assert remedy in as_text(judge(found))


def test_portable_code_is_a_note_that_says_why_and_how_to_build():
    missing = of("backends", used="libaio", portable_reason="No module named 'zinfer.aio._native'")
    [finding] = unwell(missing)
    assert (finding.topic, finding.level) == ("engine", NOTE)
    assert "zinfer.aio._native" in finding.text and "install g++" in finding.remedy
    [finding] = unwell(of("backends", used="libaio", portable_reason="ZINFER_PORTABLE=1 is set"))
    assert finding.remedy == "unset ZINFER_PORTABLE"


def test_portable_code_without_libaio_names_the_package():
    reasons = (
        ("io_uring", "it needs zinfer's compiled module"),
        ("libaio", "libaio is not installed (no such file)"),
    )
    found = of("backends", used="threads", fallbacks=reasons, portable_reason="it was not built")
    assert ["libaio1t64" in finding.remedy for finding in unwell(found)] == [False, True]


def test_locked_memory_matters_with_a_gpu_or_on_old_kernels():
    with_gpu = replace(HEALTHY, cuda_devices=("a GPU",))
    assert {"page locking", "memlock limit", "devices"} == {finding.topic for finding in unwell(with_gpu)}
    assert "computes on the CPU" in as_text(judge(with_gpu))
    assert [finding.topic for finding in unwell(of("versions", kernel="5.4.0"))] == ["memlock limit"]


def numa_findings(**changes) -> list[str]:
    return [finding.text for finding in judge(of("pages", **changes)) if finding.topic == "NUMA"]


def test_numa_is_spoken_of_only_where_there_is_more_than_one_node():
    assert numa_findings() == []
    assert numa_findings(numa_nodes=(0, 2)) == [
        "2 nodes (0, 2); the drive is not known to be nearer to one of them"
    ]
    assert "the drive is on node 2" in numa_findings(numa_nodes=(0, 2), numa_node=2)[0]


def test_the_test_pool_is_asked_for_near_the_drive(tmp_path, monkeypatch):
    first = online_nodes()[0]
    monkeypatch.setattr(facts, "online_nodes", lambda: [first, first + 1])
    near = replace(HEALTHY.drive, device=BlockDevice("a-drive", "nvme0n1", numa_node=first))
    monkeypatch.setattr(facts, "look_at", lambda path: near)
    pages = gather(str(tmp_path)).pages
    assert (pages.numa_nodes, pages.numa_node) == ((first, first + 1), first)


def test_the_profile_that_aio_bench_kept_is_shown(tmp_path):
    device = block_device_of(str(tmp_path))
    save_profile(device, Profile("libaio", 256 << 10, 32, 1, 3.21e9, None, "2026-11-20T21:00:00"))
    text = as_text(judge(replace(HEALTHY, drive=drive.look_at(str(tmp_path)))))
    assert f"{device.name}: libaio, blocks of 256 KiB, depth 32, 3.21 GB/s (aio_bench, 2026-11-20" in text


def test_a_virtual_drive_that_calls_itself_rotational_is_believed_by_its_speed():
    assert unwell(of("drive", device=BlockDevice("vda", "vda", rotational=True))) == []


def test_a_writable_folder_is_measured_and_left_empty(tmp_path, nothing_left):
    found = gather(str(tmp_path))
    assert found.drive.kind == "folder" and found.drive.writable
    assert found.drive.measured == "a temporary file of 8 MiB"
    assert found.drive.read_rate > 0
    assert found.drive.alignment >= 1
    assert found.memory.budget <= found.memory.free <= found.memory.limit <= found.memory.machine
    assert not list(tmp_path.iterdir())


def test_a_file_is_only_read(tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(os.urandom(5 << 20))
    before = path.stat()
    assert drive.look_at(str(path)).measured == "the file"
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard.bin"]


def test_a_folder_with_shards_has_those_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(os.urandom(5 << 20))
    assert drive.look_at(str(tmp_path)).measured == "1 shard(s)"


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_too_small_to_measure_is_a_note(size, tmp_path):
    (tmp_path / "small").write_bytes(bytes(size))
    found = drive.look_at(str(tmp_path / "small"))
    assert found.read_rate is None and found.failure
    assert [finding.topic for finding in unwell(replace(HEALTHY, drive=replace(found, device=None)))] == [
        "speed"
    ]


def test_doctor_prints_findings_and_exits_with_their_worst(command, tmp_path):
    status, out, err = command("doctor", str(tmp_path))
    assert err == ""
    assert status == (1 if "\nproblem" in out else 0)
    for topic in ("torch", "reads", "filesystem", "O_DIRECT", "speed", "huge pages", "memory", "open files"):
        assert topic in out


def test_doctor_json_has_findings_and_facts(command, tmp_path):
    status, out, _ = command("doctor", str(tmp_path), "--json")
    document = json.loads(out)
    assert set(document) == {"findings", "facts"}
    assert set(document["facts"]) == {
        "versions", "backends", "drive", "pages", "memory", "open_files", "cuda_devices",
    }  # fmt: skip
    assert all(set(finding) == {"topic", "level", "text", "remedy"} for finding in document["findings"])
    assert status == int(any(finding["level"] == PROBLEM for finding in document["findings"]))


def test_a_missing_path_is_a_problem(command, tmp_path):
    status, out, _ = command("doctor", str(tmp_path / "gone"))
    assert status == 1
    assert "problem  path" in out and "gone" in out


def test_a_folder_that_takes_no_files_is_a_note(command):
    """/proc: even root cannot make a file there."""
    status, out, _ = command("doctor", "/proc")
    assert status == 0
    assert "note     path" in out and "note     speed" in out


def test_a_fifo_is_refused_without_waiting_for_its_writer(command, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    status, out, _ = command("doctor", str(tmp_path / "fifo"))
    assert status == 1
    assert "neither a folder nor a regular file" in out
