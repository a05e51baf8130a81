"""Memory that runs out in an operator: how torch says so, and what zinfer raises where nothing helps."""

from __future__ import annotations

import re

import torch

from zinfer.errors import OutOfMemoryError, ZinferError

_ON_THE_HOST = "DefaultCPUAllocator: "  # "... can't allocate memory: you tried to allocate 1000 bytes."
_ASKED = re.compile(r"tried to allocate ([\d.]+) *(bytes|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class ShortageError(OutOfMemoryError, torch.OutOfMemoryError):
    """What is raised: zinfer's error, which code that catches torch's takes for one of those as well."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that there was no memory, and nobody has given any back for it yet.

    torch says it of a tensor, OutOfMemoryError of what a device was asked for. After a ShortageError all is done.
    """
    if isinstance(error, OutOfMemoryError):
        return not isinstance(error, ShortageError)
    if isinstance(error, ZinferError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _ON_THE_HOST in str(error)


def asked_bytes(words: str) -> int | None:
    """How many bytes could not be had, from torch's message; None where it does not say."""
    found = _ASKED.search(words)
    return int(float(found[1]) * _UNITS[(found[2] or "bytes").lower()]) if found else None


def in_short(words: str) -> str:
    """The first sentence or two of torch's message, which goes on about its allocator."""
    return words.strip().split("\n")[0][:200].rstrip(". ")
