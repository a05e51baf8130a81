"""Memory by its address: views for system calls, copies, and the bounce slots for what cannot land in place."""

from __future__ import annotations

import ctypes
import mmap

_libc = ctypes.CDLL(None)
_WRITABLE = 0x200  # PyBUF_WRITE
_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_from_memory.restype = ctypes.py_object


def view_at(address: int, length: int) -> memoryview:
    """`length` writable bytes at `address`, which somebody else keeps alive."""
    view: memoryview = _from_memory(address, length, _WRITABLE)
    return view


def copy(to: int, source: int, length: int) -> None:
    """Copy `length` bytes between addresses."""
    ctypes.memmove(to, source, length)


def clear(address: int, length: int) -> None:
    """Zero `length` bytes."""
    ctypes.memset(address, 0, length)


def is_mapped(address: int) -> bool:
    """Whether there is memory at `address`."""
    resident = ctypes.c_ubyte()
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    return not _libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(resident))


class AlignedBlock:
    """`length` bytes of private anonymous memory at a multiple of `length`, a power of two; unmapped with this object.

    Aligned to its own size, it suits every file's alignment. Raises OSError where there is no memory.
    """

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, 2 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._first = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(self._first)
        self.address = (start + length - 1) // length * length


class BouncePool:
    """At most `capacity` slots of `slot_bytes`, mapped when first needed. The reactor's alone."""

    def __init__(self, capacity: int, slot_bytes: int) -> None:
        self._capacity = capacity
        self._slot_bytes = slot_bytes
        self._mapped: list[AlignedBlock] = []
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Slots that have been taken and not given back."""
        return len(self._mapped) - len(self._free)

    def take(self) -> int:
        """The address of a slot, or 0 when there is no memory for one."""
        if self._free:
            return self._free.pop()
        if len(self._mapped) == self._capacity:
            return 0
        try:
            block = AlignedBlock(self._slot_bytes)
        except (OSError, MemoryError):
            return 0
        self._mapped.append(block)
        return block.address

    def give(self, address: int) -> None:
        """Take a slot back."""
        self._free.append(address)

    def release(self) -> None:
        """Unmap all slots; none is in use."""
        self._mapped.clear()
        self._free.clear()
