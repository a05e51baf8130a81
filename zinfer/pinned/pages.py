"""Pages of an anonymous mapping, made present and given back piece by piece, by madvise."""

from __future__ import annotations

import ctypes
import mmap

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap does not name it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(address: int, nbytes: int) -> bool:
    """Make the pages of this range present without changing a byte of them; whether the kernel did.

    Takes as long as the machine needs to find the memory, without the GIL. A page that is not present works all the
    same: its first use is slower. `address` is a multiple of PAGE_BYTES.
    """
    return _libc.madvise(address, nbytes, MADV_POPULATE_WRITE) == 0


def give_back(address: int, nbytes: int) -> bool:
    """Give the kernel the whole huge pages inside this range back; whether it took them.

    They stay mapped, and read as zeros when used again. Nothing may be page-locked there, and nothing in the range
    may be in use.
    """
    first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (address + nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    return last <= first or _libc.madvise(first, last - first, mmap.MADV_DONTNEED) == 0
