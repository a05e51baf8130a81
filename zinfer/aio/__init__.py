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
"""

from __future__ import annotations

from zinfer.aio._native import Engine, File, Request

__all__ = ["Engine", "File", "Request"]
