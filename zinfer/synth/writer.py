"""Safetensors shards written in one pass, past the page cache, in constant memory.

Layout of a file: 8 bytes little-endian header length N, N bytes of JSON padded with spaces to a multiple
of 8, then the tensors' bytes, largest item size first so that each tensor is aligned to its items.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zinfer.synth.inventory import TensorSpec
from zinfer.weights.safetensors_header import DTYPES

try:
    import fcntl
except ImportError:  # pragma: no cover (not on Windows)
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # of O_DIRECT's addresses, offsets and lengths
STAGE_BYTES = 8 << 20
STAGES = 3  # two on their way to the drive, one being filled
BUFFERED_DIRTY_BYTES = 64 << 20  # without O_DIRECT: written back and dropped from the page cache this often

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file to write; `tensors` holds (position in the inventory, tensor)."""

    filename: str
    tensors: list[tuple[int, TensorSpec]]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(tensor.nbytes for _, tensor in self.tensors)


def plan_shards(tensors: list[TensorSpec], shard_bytes: int) -> list[Shard]:
    """Split `tensors` in order, as the hub's tools do; one tensor above `shard_bytes` gets its own shard."""
    groups: list[list[tuple[int, TensorSpec]]] = [[]]
    size = 0
    for item in enumerate(tensors):
        if groups[-1] and size + item[1].nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item[1].nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        group.sort(key=lambda item: -item[1].dtype.itemsize)
        shards.append(Shard(f"model{suffix}.safetensors", group, _header([spec for _, spec in group])))
    return shards


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    specs = [(shard.filename, spec) for shard in shards for _, spec in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(spec.nbytes // spec.dtype.itemsize for _, spec in specs),
            "total_size": sum(spec.nbytes for _, spec in specs),
        },
        "weight_map": {spec.name: filename for filename, spec in specs},
    }


def _header(specs: list[TensorSpec]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        fields[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes shards one after the other through a few staging buffers. For one thread.

    A stage is filled by the caller, then written by a worker while the caller fills the next:

        free -> filling -> (worker) writing -> free

    close() waits for every write under way; it never raises what a write raised.
    """

    def __init__(self, on_progress: Callable[[int], object]) -> None:
        self._on_progress = on_progress  # called by the thread that calls write(), with bytes handed over
        self._stages = [_stage() for _ in range(STAGES)]
        self._writes: list[Future[None] | None] = [None] * STAGES
        self._pool = ThreadPoolExecutor(STAGES - 1, thread_name_prefix="zinfer-synth")

    def close(self) -> None:
        """Wait for the writes under way and give the buffers back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stages.clear()

    def write(
        self, folder: str, shard: Shard, chunks: Callable[[TensorSpec, int], Iterator[memoryview]]
    ) -> None:
        """Write `shard` into `folder` and make it durable. Raises OSError as the drive reports it."""
        with _open_direct(os.path.join(folder, shard.filename)) as file:
            try:
                end = self._stream(file, _pieces(shard, chunks))
            finally:
                self._drain()
            for write in self._writes:
                if write is not None:
                    write.result()
            os.ftruncate(file.fd, end)
            os.fsync(file.fd)

    def _stream(self, file: _File, pieces: Iterator[memoryview]) -> int:
        self._writes = [None] * STAGES
        number, filled, offset = 0, 0, 0
        stage = memoryview(self._stages[0])
        for piece in pieces:
            taken = 0
            while taken < len(piece):
                count = min(len(piece) - taken, STAGE_BYTES - filled)
                stage[filled : filled + count] = piece[taken : taken + count]
                taken += count
                filled += count
                if filled == STAGE_BYTES:
                    self._writes[number] = self._pool.submit(file.write, stage, offset)
                    self._on_progress(STAGE_BYTES)
                    offset += STAGE_BYTES
                    number, filled = (number + 1) % STAGES, 0
                    if (write := self._writes[number]) is not None:
                        write.result()
                    stage = memoryview(self._stages[number])
        if filled:
            padded = filled + -filled % ALIGNMENT
            stage[filled:padded] = bytes(padded - filled)
            self._writes[number] = self._pool.submit(file.write, stage[:padded], offset)
            self._on_progress(filled)
        return offset + filled

    def _drain(self) -> None:
        for write in self._writes:
            if write is not None:
                write.exception()


def _stage() -> mmap.mmap:
    stage = mmap.mmap(-1, STAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            stage.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            logger.debug("staging buffers in ordinary pages: %s", error.strerror)
    return stage


def _pieces(shard: Shard, chunks: Callable[[TensorSpec, int], Iterator[memoryview]]) -> Iterator[memoryview]:
    yield memoryview(shard.header)
    for index, spec in shard.tensors:
        yield from chunks(spec, index)


class _File:
    """A descriptor with or without O_DIRECT. write() may be called by several threads."""

    def __init__(self, path: str, fd: int, direct: bool) -> None:
        self.path, self.fd, self.direct = path, fd, direct
        self._dirty = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`, however many calls it takes."""
        while data:
            try:
                count = os.pwrite(self.fd, data, offset)
            except OSError as error:
                if not (self.direct and error.errno == errno.EINVAL):
                    raise
                self._leave_direct(error)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the drive took no byte", self.path)
            data, offset = data[count:], offset + count
            if self.direct and len(data) and count % ALIGNMENT:
                self._leave_direct(OSError(errno.EINVAL, f"short write of {count} bytes"))
            if not self.direct:
                self._drop_behind(count)

    def _leave_direct(self, reason: OSError) -> None:
        logger.info("%s: O_DIRECT refused (%s), writing through the page cache", self.path, reason)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False

    def _drop_behind(self, count: int) -> None:
        self._dirty += count
        if self._dirty >= BUFFERED_DIRTY_BYTES:
            self._dirty = 0
            os.fdatasync(self.fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _open_direct(path: str) -> Iterator[_File]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    direct = getattr(os, "O_DIRECT", 0) if fcntl is not None else 0
    try:
        fd = os.open(path, flags | direct, 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        logger.info("%s: O_DIRECT refused (%s), writing through the page cache", path, error.strerror)
        if os.path.exists(path):  # Linux makes the file before it refuses the flag
            os.unlink(path)
        fd, direct = os.open(path, flags, 0o666), 0
    try:
        yield _File(path, fd, bool(direct))
    finally:
        os.close(fd)
