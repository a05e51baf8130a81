"""Reserve huge pages for fio, and give them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import BenchmarkError
from zinfer.aio_bench.fio import free_huge_bytes

RESERVED = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def reserved(nbytes: int) -> Iterator[None]:
    """At least `nbytes` of free huge pages meanwhile. Raises BenchmarkError where they cannot be had."""
    before = int(RESERVED.read_text())
    missing = max(0, nbytes - free_huge_bytes())
    try:
        if missing:
            RESERVED.write_text(str(before + -(-missing // (2 << 20))))
        if free_huge_bytes() < nbytes:
            raise BenchmarkError(
                "the kernel has too little unfragmented memory for fio's huge pages: reboot, or compact"
            )
        yield
    except PermissionError as error:
        raise BenchmarkError(
            f"fio's buffers have to be on huge pages: run as root, or have root do "
            f"`sysctl vm.nr_hugepages={before + -(-missing // (2 << 20))}`"
        ) from error
    finally:
        if missing and RESERVED.stat().st_uid == 0:
            _restore(before)


def _restore(pages: int) -> None:
    try:
        RESERVED.write_text(str(pages))
    except PermissionError:
        return  # then nothing was reserved either
