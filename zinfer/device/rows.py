"""Rows of tables on their way from host memory to a device, through page-locked memory: nobody waits for the copies."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch

from zinfer.device.processor import ALIGNMENT, Event, Processor
from zinfer.pinned import Pool
from zinfer.weights.lowering import Placed

STAGE_BYTES = 8 << 20  # of the host, out of the headroom for libraries: what rows are gathered in
PIECE_BYTES = 2 << 20  # gathered and copied at once, while those before it are on their way
Fill = Callable[[torch.Tensor, int, int], object]  # put bytes [a, b) of what is to be copied there


class Rows:
    """Copies rows to `processor`, a piece at a time. `page_lock` as for Pool. Any thread may call any method.

        row by row --gathered--> piece of the stage, page-locked --event--> tensor of torch's on the device
                                         ^                          |
                                         +--------------------------+  when another piece needs the room

    The stage is made at the first use. A thread waits for the device only when all of the stage is on its way.
    """

    def __init__(self, processor: Processor, page_lock: Literal["auto", "off"]) -> None:
        self._processor = processor
        self._page_lock: Literal["auto", "off"] = page_lock
        self._pool: Pool | None = None
        self._flying: deque[tuple[Event, list[Any]]] = deque()
        self._lock = threading.RLock()  # a finalizer may run inside a method here
        # Nobody may be given memory that a copy still reads, also where the model is dropped without close().
        weakref.finalize(self, _drain, self._flying).atexit = False

    def gathered(self, memory: Any, at: int, like: Placed, rows: list[int], residue: int) -> torch.Tensor:
        """Rows of the table `like`, which lies `at` bytes into `memory`, a buffer, as a tensor on the device.

        That begins `residue` bytes after a multiple of ALIGNMENT.
        """
        table = torch.frombuffer(memory, dtype=torch.uint8, count=like.nbytes, offset=at)
        table = table.view(like.shape[0], -1)
        index, width = torch.tensor(rows), table.shape[1]
        if width > PIECE_BYTES:

            def fill(piece: torch.Tensor, a: int, b: int) -> None:
                for row in range(a // width, -(-b // width)):
                    start, end = max(a, row * width), min(b, (row + 1) * width)
                    piece[start - a : end - a].copy_(
                        table[rows[row], start - row * width : end - row * width]
                    )

            step = PIECE_BYTES
        else:

            def fill(piece: torch.Tensor, a: int, b: int) -> None:
                torch.index_select(table, 0, index[a // width : b // width], out=piece.view(-1, width))

            step = PIECE_BYTES // width * width
        return self._bring(fill, step, (len(rows), *like.shape[1:]), like.dtype, residue)

    def copied(self, found: torch.Tensor, residue: int) -> torch.Tensor:
        """`found`, contiguous and in ordinary host memory, on the device; `residue` as for gathered()."""
        with torch.no_grad():
            source = found.detach().reshape(-1).view(torch.uint8)

        def fill(piece: torch.Tensor, a: int, b: int) -> None:
            piece.copy_(source[a:b])

        return self._bring(fill, PIECE_BYTES, tuple(found.shape), found.dtype, residue)

    def _bring(
        self, fill: Fill, step: int, shape: tuple[int, ...], dtype: torch.dtype, residue: int
    ) -> torch.Tensor:
        """A tensor on the device which what the calling thread's stream is given from now on can read."""
        processor, nbytes = self._processor, prod(shape) * dtype.itemsize
        with self._lock, torch.inference_mode(False), torch.no_grad():
            block = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=processor.torch_device)
            start = (residue - block.data_ptr()) % ALIGNMENT
            target = block[start : start + nbytes]
            # What had the memory before may still be in use on this thread's stream.
            after: list[Event] = [processor.fence(processor.stream())]
            event = None
            for a in range(0, nbytes, step):
                b = min(a + step, nbytes)
                piece, region = self._piece(b - a)
                fill(piece, a, b)
                event = processor.copy([(target[a:b], piece)], after, urgent=True)
                self._flying.append((event, [piece, region]))
            if event is not None:
                processor.follow(event)  # the last: those before it are on the same stream
            return target.view(dtype).view(shape)

    def _piece(self, nbytes: int) -> tuple[torch.Tensor, Any]:
        """Memory of the stage, and what holds it."""
        if self._pool is None:
            with self._processor.current():
                self._pool = Pool(STAGE_BYTES, page_lock=self._page_lock)
        while True:
            while self._flying and self._flying[0][0].done:
                self._flying.popleft()
            region = self._pool.acquire(nbytes)
            if region is not None:
                return torch.frombuffer(region, dtype=torch.uint8, count=nbytes), region
            if not self._flying:  # somebody keeps what was copied: an error's traceback, perhaps
                return torch.empty(nbytes, dtype=torch.uint8), None
            self._flying[0][0].wait()

    def close(self) -> None:
        """Wait for all copies, then give the stage back. Idempotent."""
        with self._lock:
            _drain(self._flying)
            if self._pool is not None:
                self._pool.close()


def _drain(flying: deque[tuple[Event, list[Any]]]) -> None:
    while flying:
        flying[0][0].wait()
        flying.popleft()
