"""Asynchronous file reads and writes, straight to and from memory: `File`, `Engine`, and the `Request` to wait on.

    engine = Engine()                                  # io_uring where it works, else libaio, else threads
    file = File("model.safetensors")                   # O_DIRECT where it works, buffered elsewhere
    request = engine.read([(file, offset, length, address, False)], keepalive=buffer)
    request.wait()                                     # raises zinfer.errors.DriveError on failure

An extent is `(file, offset, length, address, slack)`, all in bytes: read `file[offset : offset + length]` to
memory at `address`. Where `address % file.alignment == offset % file.alignment` the bytes land without a
copy; otherwise they pass through aligned bounce memory. With `slack=True` the caller promises that the bytes
around the destination, out to the aligned superset of the range, are scratch: then nothing at all is copied.

    file = File("new.bin", "w", size=nbytes)           # reserves the room, or says now that there is none
    engine.write([(file, offset, length, address, False)], keepalive=buffer).wait()
    file.close()                                       # cuts it at its true size and makes it durable

Writes are the same the other way round: whole blocks go straight from memory where the addresses are congruent, a
block that is written in part is read, changed and written with no other write in between. Writes that overlap
land in the order in which they were submitted.

Whatever the engine settled for is visible: `Engine.backend` and `Engine.fallbacks`, `File.direct` and
`File.direct_reason`.

`COMPILED` tells whether these are the compiled module's classes. Where it could not be built, or with
ZINFER_PORTABLE=1 in the environment, they are those of `zinfer.aio.portable`: the same interface and the same
promises in Python code, without io_uring; `PORTABLE_REASON` then says why, and is "" otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zinfer.pinned.compiled import portable_wanted, reason_of

PORTABLE_REASON = ""
if TYPE_CHECKING:
    from zinfer.aio._native import Engine, File, Request
elif portable_wanted():
    from zinfer.aio.portable import Engine, File, Request

    PORTABLE_REASON = reason_of(None)
else:
    try:
        from zinfer.aio._native import Engine, File, Request
    except ImportError as error:
        from zinfer.aio.portable import Engine, File, Request

        PORTABLE_REASON = reason_of(error)

COMPILED: bool = not PORTABLE_REASON

__all__ = ["COMPILED", "Engine", "File", "Request"]
