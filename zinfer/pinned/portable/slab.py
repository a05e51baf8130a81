"""One private anonymous mapping, on huge pages where the kernel has them, touched, unmapped in one place."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import threading
from pathlib import Path

from zinfer.errors import BudgetError

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


class Slab:
    """`nbytes` of writable memory at `address`, which a forked child does not have.

    Mapped with a page of no use on either side, so that nothing next to it is joined to it. Whoever owns it calls
    `unmap` once, when nothing can see the memory any more. Raises BudgetError where the kernel refuses the memory.
    """

    def __init__(self, nbytes: int, huge: bool) -> None:
        self.nbytes = nbytes
        self._owner = os.getpid()
        alignment = HUGE_PAGE_BYTES if huge and nbytes >= HUGE_PAGE_BYTES else PAGE_BYTES
        # Mapped by libc, for mmap.mmap never unmaps while anything has a view of it, and cannot tell when nothing has.
        self._reserved_bytes = nbytes + alignment + PAGE_BYTES
        self._reserved = 0
        if self._reserved_bytes > 2**63 - 1:
            raise _refused("mmap", nbytes, errno.ENOMEM)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _libc.mmap(None, self._reserved_bytes, 0, private, -1, 0)
        if reserved in (None, _MAP_FAILED):
            raise _refused("mmap", nbytes, ctypes.get_errno())
        self._reserved = reserved
        self.address = (reserved + PAGE_BYTES + alignment - 1) // alignment * alignment
        if _libc.mprotect(self.address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE):
            raise self._unmapped_for("mprotect")
        if _libc.madvise(self.address, nbytes, mmap.MADV_DONTFORK):
            raise self._unmapped_for("madvise(MADV_DONTFORK)")
        # Advice only: a kernel without transparent huge pages refuses it, and huge_bytes() then says 0.
        _libc.madvise(self.address, nbytes, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)

    def touch(self, threads: int) -> None:
        """Make every page present, on `threads` threads; the caller is one of them."""
        if threads == 0:
            return
        # Whole huge pages to each thread: two threads on one would fault it in twice.
        share = max(self.nbytes // threads, 1)
        piece = (share + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        helpers = []
        for at in range(piece, self.nbytes, piece):
            arguments = (self.address + at, 0, min(piece, self.nbytes - at))
            helper = threading.Thread(target=ctypes.memset, args=arguments, name="zinfer-touch")
            try:
                helper.start()
                helpers.append(helper)
            except RuntimeError:  # no thread to be had: slower, and just as touched
                ctypes.memset(*arguments)
        ctypes.memset(self.address, 0, min(piece, self.nbytes))
        for helper in helpers:
            helper.join()

    def huge_bytes(self) -> int:
        """Bytes on huge pages now, counted in /proc/self/smaps."""
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if edges := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
                first = int(edges[1], 16)
                if first >= self.address + self.nbytes:
                    break  # entries come in address order
                inside = first >= self.address
            elif inside and line.startswith("AnonHugePages:"):
                total += int(line.split()[1]) * 1024
        return total

    def unmap(self) -> None:
        """Give the memory back; nothing in a forked child, which does not have it. Idempotent."""
        reserved, self._reserved = self._reserved, 0
        if reserved and os.getpid() == self._owner:
            _libc.munmap(reserved, self._reserved_bytes)

    def _unmapped_for(self, call: str) -> BudgetError:
        code = ctypes.get_errno()
        self.unmap()
        return _refused(call, self.nbytes, code)


def _refused(call: str, nbytes: int, code: int) -> BudgetError:
    return BudgetError(
        f"cannot map {nbytes} bytes for the pinned pool: {call}: {os.strerror(code)} (errno {code}); lower the host "
        'memory budget (max_memory["cpu"]) or free memory'
    )


_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
