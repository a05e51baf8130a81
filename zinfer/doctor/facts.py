"""Facts about the machine, as plain data. Gathering them is all that has effects here.

Sizes in bytes, rates in bytes a second; None where the machine does not tell.
"""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from zinfer._version import __version__
from zinfer.aio import PORTABLE_REASON, Engine
from zinfer.budgets import default_budget
from zinfer.doctor.drive import Drive, look_at
from zinfer.errors import BudgetError, OptionError
from zinfer.pinned import COMPILED, Pool
from zinfer.pinned.numa import node_for, online_nodes
from zinfer.planner.memory import free_memory, total_memory

POOL_BYTES = 64 << 20  # of the test pool: 32 huge pages
TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


@dataclass(frozen=True)
class Versions:
    """Of the software that matters; `kernel` is the running one's release."""

    zinfer: str
    python: str
    torch: str
    transformers: str
    kernel: str


@dataclass(frozen=True)
class Backends:
    """`used` reads files; `fallbacks` are the better ones, each with the reason it is not used.

    `io_uring_disabled` is the sysctl: 0 open to all, 1 to a group, 2 to nobody; None in kernels without it.
    `portable_reason` tells why Python code stands in for the compiled modules; "" where it does not.
    """

    used: str
    fallbacks: tuple[tuple[str, str], ...]
    io_uring_disabled: int | None
    portable_reason: str = ""


@dataclass(frozen=True)
class Pages:
    """Limits in bytes, None for unlimited. `huge_bytes` of `pool_bytes` of a test pool were on huge pages.

    `transparent_huge_pages` is the kernel's setting: "always", "madvise" or "never"; "" where unknown.
    `huge_bytes` is None where the kernel does not count them. `failure` tells why there was no test pool.
    `numa_nodes` are online; the test pool was to lie on `numa_node`, the drive's, None for no preference, and
    `numa_reason` tells why it does not.
    """

    lock_limit: int | None
    page_locked: bool
    page_lock_reason: str
    transparent_huge_pages: str
    pool_bytes: int
    huge_bytes: int | None
    failure: str
    numa_nodes: tuple[int, ...] = (0,)
    numa_node: int | None = None
    numa_reason: str = ""


@dataclass(frozen=True)
class Memory:
    """`machine` is the RAM, `limit` the lower of that and the cgroup's limit; `budget` zinfer's default."""

    machine: int
    limit: int
    free: int
    budget: int


@dataclass(frozen=True)
class Facts:
    """Everything `gather` found. `open_files` is the soft limit, None for unlimited."""

    versions: Versions
    backends: Backends
    drive: Drive
    pages: Pages
    memory: Memory
    open_files: int | None
    cuda_devices: tuple[str, ...]


def gather(path: str) -> Facts:
    """Look at the machine, and at the drive behind `path`; takes about two seconds, leaves nothing behind."""
    memory = _memory()  # before the test pool
    drive = look_at(path)
    return Facts(
        versions=Versions(
            __version__,
            platform.python_version(),
            torch.__version__,
            transformers.__version__,
            platform.release(),
        ),
        backends=_backends(),
        drive=drive,
        pages=_pages(drive),
        memory=memory,
        open_files=_limit(resource.RLIMIT_NOFILE),
        cuda_devices=_cuda_devices(),
    )


def _backends() -> Backends:
    engine = Engine()
    try:
        used, fallbacks = engine.backend, tuple(engine.fallbacks)
    finally:
        engine.close()
    setting = _text(IO_URING_DISABLED)
    portable = PORTABLE_REASON or ("" if COMPILED else "zinfer.pinned._native was not built")
    return Backends(used, fallbacks, int(setting) if setting.isdecimal() else None, portable)


def _pages(drive: Drive) -> Pages:
    setting = _text(TRANSPARENT_HUGE_PAGES)
    chosen = setting.partition("[")[2].partition("]")[0]
    lock_limit = _limit(resource.RLIMIT_MEMLOCK)
    nodes = tuple(online_nodes())
    node = node_for([drive.device.numa_node if drive.device else None], nodes)
    try:
        pool = Pool(POOL_BYTES, page_lock="auto", numa_node=node)
    except (BudgetError, OptionError) as error:
        return Pages(lock_limit, False, "", chosen, 0, 0, str(error), nodes, node)
    try:
        return Pages(
            lock_limit,
            pool.page_locked,
            pool.page_lock_reason,
            chosen,
            pool.capacity,
            pool.huge_bytes,
            "",
            nodes,
            node,
            pool.numa_reason,
        )
    finally:
        pool.close()


def _memory() -> Memory:
    return Memory(psutil.virtual_memory().total, total_memory(), free_memory(), default_budget())


def _cuda_devices() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _text(path: Path) -> str:
    return path.read_text().strip() if os.access(path, os.R_OK) else ""
