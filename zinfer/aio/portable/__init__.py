"""The I/O engine in Python, for machines where the compiled one could not be built; also a cross-check on it.

The same `File`, `Engine` and `Request`, the same errors, the same policy: libaio through cffi for O_DIRECT files,
threads that call preadv and pwritev for the rest. Slower, for Python code runs between any two operations.

    extent --split--> pieces --Reactor--> transfers --Backend--> kernel

Bytes of one request move between the memory its keepalive holds and the file; `request.py` tells which locks may
be taken where.
"""

from __future__ import annotations

from zinfer.aio.portable.engine import Engine
from zinfer.aio.portable.file import File
from zinfer.aio.portable.request import Request

__all__ = ["Engine", "File", "Request"]
