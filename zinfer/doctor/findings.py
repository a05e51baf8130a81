"""From facts to findings: pure functions, one a topic."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zinfer.doctor.drive import Drive
from zinfer.doctor.facts import Backends, Facts, Memory, Pages, Versions
from zinfer.pinned import compiled

OK, NOTE, PROBLEM = "ok", "note", "problem"

OLDEST = {"python": (3, 10), "torch": (2, 8), "transformers": (5, 10)}  # as pyproject.toml has it
SLOW_RATE = 1.0e9  # bytes a second: below it even a small NVMe drive, or the way to it, falls short
IN_MEMORY = ("tmpfs", "ramfs")
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "fuse", "afs")
LEAST_BUDGET = 128 << 20  # bytes; below it hardly a model's largest operator has room
SMALL_BUDGET = 1 << 30  # bytes; below it only small models' have
FEW_OPEN_FILES = 512  # a checkpoint of 400 shards has each open at once
LOCKED_RINGS = (5, 12)  # older kernels charge io_uring's rings to the limit of locked memory
ENOUGH_LOCKED = 64 << 20
HUGE_SHARE = 0.9  # of the test pool on huge pages, below which reads lose speed


@dataclass(frozen=True)
class Finding:
    """What was found on one topic; `level` is OK, NOTE (works, could be faster) or PROBLEM."""

    topic: str
    level: str
    text: str
    remedy: str = ""


def judge(facts: Facts) -> list[Finding]:
    """All findings, in the order to read them."""
    return [
        *_versions(facts.versions),
        *_backends(facts.backends, facts.versions.kernel),
        *_place(facts.drive),
        *_reads(facts.drive),
        *_profile(facts.drive),
        *_page_locking(facts),
        *_huge_pages(facts.pages),
        *_numa(facts.pages),
        *_memory(facts.memory),
        _open_files(facts.open_files),
        _devices(facts.cuda_devices),
    ]


def as_text(findings: Sequence[Finding]) -> str:
    """A line a finding, its remedy indented below, and a closing count."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.topic:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.level == PROBLEM for finding in findings)
    notes = sum(finding.level == NOTE for finding in findings)
    lines.append(f"{problems} problem(s), {notes} note(s)")
    return "\n".join(lines) + "\n"


def _versions(versions: Versions) -> Iterator[Finding]:
    yield Finding("zinfer", OK, f"{versions.zinfer}, on Linux {versions.kernel}")
    for name, oldest in OLDEST.items():
        version = getattr(versions, name)
        wanted = ".".join(map(str, oldest))
        if _numbers(version) >= oldest:
            yield Finding(name, OK, version)
        elif name == "python":
            yield Finding(name, PROBLEM, f"{version} is older than {wanted}", f"use Python {wanted} or newer")
        else:
            yield Finding(
                name, PROBLEM, f"{version} is older than {wanted}", f"pip install '{name}>={wanted}'"
            )


def _backends(backends: Backends, kernel: str) -> Iterator[Finding]:
    reasons = dict(backends.fallbacks)
    if backends.portable_reason:
        asked_for = compiled.VARIABLE in backends.portable_reason
        remedy = f"unset {compiled.VARIABLE}" if asked_for else compiled.REMEDY
        yield Finding("engine", NOTE, f"portable Python code: {backends.portable_reason}", remedy)
        reasons.pop("io_uring", None)  # for the same reason
    if backends.used == "io_uring":
        yield Finding("reads", OK, "io_uring (built with liburing; a trial read worked)")
        return
    for name, reason in reasons.items():
        yield Finding(
            "reads", NOTE, f"{backends.used}, not {name}: {reason}", _remedy(reason, backends, kernel)
        )
    if not reasons:
        yield Finding("reads", OK, backends.used)


def _remedy(reason: str, backends: Backends, kernel: str) -> str:
    if "built without liburing" in reason:
        return (
            "apt-get install liburing-dev (dnf: liburing-devel), then build zinfer again: "
            "pip install --no-deps --force-reinstall ."
        )
    if "libaio is not installed" in reason:
        return "apt-get install libaio1t64 (libaio1 before Debian 13 and Ubuntu 24.04), or dnf install libaio"
    if "needs cffi" in reason:
        return "pip install cffi"
    if "aio-max-nr" in reason:
        return "as root: sysctl -w fs.aio-max-nr=1048576, or end programs that hold AIO contexts"
    if backends.io_uring_disabled:
        return "as root: sysctl kernel.io_uring_disabled=0"
    if _numbers(kernel) < (5, 1):
        return "boot Linux 5.1 or newer; 5.10 or newer is better"
    if "memory" in reason.lower():
        return "raise the limit of locked memory: ulimit -l unlimited (limits.conf: memlock)"
    return (
        "in a container, allow io_uring's system calls (docker: --security-opt seccomp=unconfined, or a "
        "profile of your own)"
    )


def _place(drive: Drive) -> Iterator[Finding]:
    if drive.kind in ("missing", "other"):
        yield Finding("path", PROBLEM, drive.failure, "give a folder, or a file, on the drive in question")
        return
    what = "a file" if drive.kind == "file" else "a folder"
    if drive.kind == "folder" and not drive.writable:
        yield Finding(
            "path", NOTE, f"{drive.path}, {what} that cannot be written",
            "checkpoints there stream in place; as nvme_path it has to be writable: chown it, or use another",
        )  # fmt: skip
    else:
        yield Finding("path", OK, f"{drive.path}, {what}, {_size(drive.free or 0)} free")
    if drive.mount is None:
        return
    rotational = drive.device.rotational if drive.device else None
    kind, where = drive.mount.filesystem, f"{drive.mount.filesystem} on {drive.mount.device}"
    if kind in IN_MEMORY:
        yield Finding(
            "filesystem", NOTE, f"{where}: files there take memory", "choose a folder on an NVMe drive"
        )
    elif kind.startswith(REMOTE):
        text = f"{where}: reached over a network or through another program"
        yield Finding("filesystem", NOTE, text, "choose a folder on a local NVMe drive")
    elif rotational and (drive.read_rate or 0) < SLOW_RATE:
        yield Finding(
            "filesystem", NOTE, f"{where}, which calls itself rotational", "choose a folder on an NVMe drive"
        )
    elif rotational:
        yield Finding("filesystem", OK, f"{where}, which calls itself rotational but is too fast for that")
    else:
        claim = "" if rotational is None else ", not rotational"
        yield Finding("filesystem", OK, f"{where}{claim}")


def _reads(drive: Drive) -> Iterator[Finding]:
    if drive.kind in ("missing", "other"):
        return
    if drive.direct is not None:
        if drive.direct:
            yield Finding("O_DIRECT", OK, f"works, alignment {drive.alignment} bytes")
        else:
            yield Finding(
                "O_DIRECT", NOTE, f"not used: {drive.direct_reason}; reads go through the page cache",
                "choose a filesystem with direct I/O, such as ext4 or xfs",
            )  # fmt: skip
    if drive.read_rate is None:
        if drive.kind == "folder" and not drive.writable:
            remedy = "name a large file on that drive: zinfer doctor FILE"
            yield Finding("speed", NOTE, f"not measured: {drive.failure or 'nothing there to read'}", remedy)
        else:
            remedy = "name a readable file of 4 MiB or more on that drive, or make room there"
            yield Finding("speed", NOTE, f"not measured: {drive.failure}", remedy)
        return
    way = "direct" if drive.direct else "page-cache"
    text = (
        f"{drive.read_rate / 1e9:.2f} GB/s in plain {way} reads of {drive.measured}: at best "
        f"{10e9 / drive.read_rate:.1f} s a token for each 10 GB that stream"
    )
    slow = drive.read_rate < SLOW_RATE
    yield Finding(
        "speed", NOTE if slow else OK, text, "a faster drive gives tokens in proportion" if slow else ""
    )


def _profile(drive: Drive) -> Iterator[Finding]:
    if drive.device is None or drive.kind in ("missing", "other"):
        return
    profile = drive.profile
    if profile is None:
        yield Finding("profile", OK, f"none of {drive.device.name}; aio_bench would find its best setting")
        return
    rate = f", {profile.read_rate / 1e9:.2f} GB/s" if profile.read_rate else ""
    how = "threads" if profile.backend == "threads" else "depth"
    text = (
        f"{drive.device.name}: {profile.backend}, blocks of {_size(profile.block_bytes)}, {how} {profile.depth}"
        f"{rate} (aio_bench, {profile.measured})"
    )
    yield Finding("profile", OK, text)


def _page_locking(facts: Facts) -> Iterator[Finding]:
    pages, cuda = facts.pages, bool(facts.cuda_devices)
    if pages.failure:
        yield Finding("page locking", PROBLEM, f"no test pool: {pages.failure}", "free some memory")
    elif pages.page_locked:
        yield Finding("page locking", OK, "the pinned pool can be page-locked")
    elif cuda:
        remedy = "install the CUDA runtime that fits the driver"
        yield Finding("page locking", NOTE, f"not possible: {pages.page_lock_reason}", remedy)
    else:
        yield Finding("page locking", OK, f"none ({pages.page_lock_reason}), and none is needed on the CPU")
    limit = "unlimited" if pages.lock_limit is None else _size(pages.lock_limit)
    charged = facts.backends.used != "threads" and _numbers(facts.versions.kernel) < LOCKED_RINGS
    if pages.lock_limit is not None and pages.lock_limit < ENOUGH_LOCKED and (cuda or charged):
        remedy = "ulimit -l unlimited (for good: memlock in limits.conf, or LimitMEMLOCK=infinity)"
        yield Finding("memlock limit", NOTE, limit, remedy)
    else:
        yield Finding(
            "memlock limit", OK, limit if pages.lock_limit is None else f"{limit}; nothing here needs more"
        )


def _huge_pages(pages: Pages) -> Iterator[Finding]:
    if pages.failure:
        return
    if pages.huge_bytes is None:
        yield Finding(
            "huge pages", NOTE, "unknown: /proc/self/smaps, which counts them, cannot be read",
            "in a container, mount /proc; ulimit -n 1024 where file descriptors have run out",
        )  # fmt: skip
        return
    text = (
        f"{pages.transparent_huge_pages or 'setting unknown'}; {_size(pages.huge_bytes)} of a test pool of "
        f"{_size(pages.pool_bytes)} are on them"
    )
    if pages.huge_bytes >= HUGE_SHARE * pages.pool_bytes:
        yield Finding("huge pages", OK, text)
    elif pages.transparent_huge_pages in ("always", "madvise"):
        yield Finding(
            "huge pages", NOTE, text, "memory is fragmented; as root: echo 1 > /proc/sys/vm/compact_memory"
        )
    else:
        yield Finding(
            "huge pages", NOTE, text, "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )


def _numa(pages: Pages) -> Iterator[Finding]:
    if len(pages.numa_nodes) < 2:
        return
    text = f"{len(pages.numa_nodes)} nodes ({', '.join(map(str, pages.numa_nodes))})"
    if pages.numa_node is None:
        yield Finding("NUMA", OK, f"{text}; the drive is not known to be nearer to one of them")
    elif pages.numa_reason:
        yield Finding(
            "NUMA", NOTE, f"{text}; no memory near the drive, on node {pages.numa_node}: {pages.numa_reason}",
            f"in a container: docker run --cap-add SYS_NICE, and {pages.numa_node} in --cpuset-mems if that is given",
        )  # fmt: skip
    else:
        yield Finding("NUMA", OK, f"{text}; the drive is on node {pages.numa_node}, and so was the test pool")


def _memory(memory: Memory) -> Iterator[Finding]:
    remedy = "end other programs, or raise the cgroup's limit (docker: --memory)"
    text = f"{_size(memory.machine)} in the machine"
    if memory.limit < memory.machine:
        text += f", {_size(memory.limit)} for this process's cgroup"
    text += f", {_size(memory.free)} free; default budget {_size(memory.budget)}"
    if memory.budget < LEAST_BUDGET:
        yield Finding("memory", PROBLEM, text, remedy)
    elif memory.budget < SMALL_BUDGET:
        yield Finding("memory", NOTE, text, remedy)
    else:
        yield Finding("memory", OK, text)


def _open_files(limit: int | None) -> Finding:
    if limit is None or limit >= FEW_OPEN_FILES:
        return Finding("open files", OK, f"limit {'unlimited' if limit is None else limit}")
    return Finding(
        "open files", NOTE, f"limit {limit}: a checkpoint of many shards needs one each", "ulimit -n 4096"
    )


def _devices(devices: tuple[str, ...]) -> Finding:
    if not devices:
        return Finding("devices", OK, "CPU; torch sees no CUDA device")
    return Finding(
        "devices", NOTE, f"torch sees {', '.join(devices)}, but this version of zinfer computes on the CPU"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) from "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
