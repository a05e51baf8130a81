"""A GPU, through torch's streams and events; ROCm's too, which torch calls cuda."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from zinfer.device.processor import ALIGNMENT, POISON, Event
from zinfer.errors import OutOfMemoryError
from zinfer.weights.layout import round_up

MOST_OVERHEAD = 1 << 30  # bytes of a context with the kernels it loads
WORKSPACE = 64 << 20  # bytes that cuBLAS allocates for itself, through torch, a stream
_limits: dict[int, dict[int, int]] = {}  # of each device, bytes for each processor that limits it
_limits_lock = threading.Lock()
# torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp): blocks of up to SMALL bytes lie in segments of
# SMALL_SEGMENT bytes, those below LARGE in segments of SEGMENT, and larger ones are rounded up to multiples of STEP.
SMALL, SMALL_SEGMENT, LARGE, SEGMENT, STEP = 1 << 20, 2 << 20, 10 << 20, 20 << 20, 2 << 20
PARTLY_FILLED = (
    SEGMENT + SMALL_SEGMENT + STEP
)  # bytes: the last segment of either kind, and the rounding of the window
URGENT_PRIORITY = -1  # torch's streams: the lower, the sooner


def allocated_by_torch(nbytes: int) -> int:
    """Bytes of the device that a block of `nbytes` takes: its share of a segment, taken to hold others of its size."""
    rounded = round_up(max(nbytes, 1), ALIGNMENT)
    if rounded >= LARGE:
        return round_up(rounded, STEP)
    segment = SMALL_SEGMENT if rounded <= SMALL else SEGMENT
    return -(-segment // (segment // rounded))


class CudaEvent:
    """See Event. `origin`: an event and the moment it was reached, to tell times by; None: no times are kept."""

    def __init__(self, origin: tuple[torch.cuda.Event, float] | None, transferred: int | None = None) -> None:
        self.transferred = transferred
        self._origin = origin
        timed = origin is not None
        self.begun = torch.cuda.Event(enable_timing=True) if timed else None
        self.event = torch.cuda.Event(enable_timing=timed, blocking=True)  # whoever waits sleeps

    @property
    def done(self) -> bool:
        """Whether it has been reached."""
        return self.event.query()

    def wait(self) -> None:
        """Block the calling thread until it has been reached."""
        self.event.synchronize()

    @property
    def started(self) -> float | None:
        """When the copy that ends with it began, where times are kept."""
        return self._moment(self.begun)

    @property
    def finished(self) -> float | None:
        """When it was reached, where times are kept."""
        return self._moment(self.event)

    def _moment(self, event: torch.cuda.Event | None) -> float | None:
        if self._origin is None or event is None or not self.done:
            return None
        origin, at = self._origin
        return at + origin.elapsed_time(event) / 1e3


class CudaProcessor:
    """The GPU `device`. `timed`: events tell when copies ran, which costs microseconds each.

    `poison`, for tests: memory that was given back is overwritten as soon as the operators that it was given to have
    run, so that one which still read it would compute nonsense.
    """

    page_locks = True
    keeps_residue = False

    def __init__(self, device: torch.device, *, timed: bool = False, poison: bool = False) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device(device.type, index)
        self.name = f"{self.torch_device} ({torch.cuda.get_device_name(index)})"
        self.overhead = self._measured_overhead()
        self._streams = {
            True: torch.cuda.Stream(self.torch_device, priority=URGENT_PRIORITY),
            False: torch.cuda.Stream(self.torch_device),
        }
        # Of its own: a copy behind it in line would wait for operators that have nothing to do with it.
        self._poisoning = torch.cuda.Stream(self.torch_device) if poison else None
        self._caches = {back: torch.cuda.Stream(self.torch_device) for back in (False, True)}
        self._origin: tuple[torch.cuda.Event, float] | None = None
        if timed:
            origin = torch.cuda.Event(enable_timing=True)
            origin.record(self._streams[False])
            origin.synchronize()
            self._origin = origin, time.perf_counter()

    def _measured_overhead(self) -> int:
        """What the driver says is used and torch did not allocate, once a kernel of cuBLAS has run."""
        probe = torch.ones(64, 64, device=self.torch_device)
        torch.mm(probe, probe)
        torch.cuda.synchronize(self.torch_device)
        free, total = torch.cuda.mem_get_info(self.torch_device)
        outside = total - free - torch.cuda.memory_reserved(self.torch_device)
        return (
            min(max(outside, 0), MOST_OVERHEAD) + WORKSPACE + PARTLY_FILLED
        )  # others' memory counts in `outside` too

    def memory(self) -> tuple[int, int]:
        """See Processor. What torch's allocator holds without using it counts as free."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        idle = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + idle, total

    def limit(self, nbytes: int | None) -> None:
        """See Processor: of what torch allocates, whoever asks; cuBLAS's workspace and segments not full besides.

        torch knows one limit a device: that is the sum over the models which compute there.
        """
        with _limits_lock:
            limits = _limits.setdefault(self.torch_device.index, {})
            if nbytes is None:
                limits.pop(id(self), None)
            else:
                limits[id(self)] = nbytes
            total = torch.cuda.mem_get_info(self.torch_device)[1]
            share = min(1.0, (sum(limits.values()) + WORKSPACE + PARTLY_FILLED) / total) if limits else 1.0
            torch.cuda.set_per_process_memory_fraction(share, self.torch_device)

    def block(self, nbytes: int) -> torch.Tensor:
        """See Processor."""
        try:
            with torch.inference_mode(False):
                block = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free = self.memory()[0]
            raise OutOfMemoryError(
                f"{self.name} has {free} bytes free; tried to allocate {nbytes} bytes: end what else uses it, or lower "
                f"max_memory[{self.torch_device.index}]"
            ) from error
        # torch's allocator waits for them before it gives the memory away
        for stream in (*self._streams.values(), *self._caches.values(), self._poisoning):
            if stream is not None:
                block.record_stream(stream)
        assert block.data_ptr() % ALIGNMENT == 0
        return block

    def allocated(self, nbytes: int) -> int:
        """See Processor."""
        return allocated_by_torch(nbytes)

    def reclaim(self) -> None:
        """See Processor: blocks in pieces, which torch's allocator keeps, go back to the driver whole."""
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()

    def over(self, block: torch.Tensor, start: int, nbytes: int) -> tuple[torch.Tensor, Any]:
        """See Processor."""
        owner = _Owner(block, start, nbytes)
        with torch.inference_mode(False):
            return torch.as_tensor(owner, device=self.torch_device), owner

    def stream(self) -> torch.cuda.Stream:
        """See Processor."""
        return torch.cuda.current_stream(self.torch_device)

    def copy(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, urgent: bool
    ) -> Event:
        """See Processor."""
        return self._start(moves, after, self._streams[urgent])

    def copy_cache(
        self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, back: bool
    ) -> Event:
        """See Processor."""
        return self._start(moves, after, self._caches[back])

    def _start(
        self,
        moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[Event],
        stream: torch.cuda.Stream,
    ) -> Event:
        end = CudaEvent(self._origin, sum(source.nbytes for _, source in moves))
        with torch.cuda.stream(stream):
            for earlier in after:
                self.follow(earlier)
            if end.begun is not None:
                end.begun.record(stream)
            for target, source in moves:
                target.copy_(source, non_blocking=True)
            end.event.record(stream)
        return end

    def follow(self, event: Event) -> None:
        """See Processor."""
        assert isinstance(event, CudaEvent)
        self.stream().wait_event(event.event)

    def fence(self, stream: Any) -> Event:
        """See Processor."""
        end = CudaEvent(None)
        end.event.record(stream)
        return end

    def retire(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> list[Event]:
        """See Processor."""
        fences = [self.fence(stream) for stream in streams]
        if self._poisoning is None or not fences:
            return fences
        with torch.cuda.stream(self._poisoning):
            for fence in fences:
                self.follow(fence)
            block[start : start + nbytes].fill_(POISON)
        return [self.fence(self._poisoning)]

    def let_go(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> None:
        """See Processor. torch's allocator waits before it gives the memory to somebody else."""
        for stream in streams:
            block.record_stream(stream)

    def close(self) -> None:
        """See Processor: its streams end with it."""
        self.limit(None)


class _Owner:
    """Bytes of a block, as torch takes memory from others: it holds this object as long as it uses them."""

    def __init__(self, block: torch.Tensor, start: int, nbytes: int) -> None:
        self._block = block
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (block.data_ptr() + start, False),
            "strides": None,
            "version": 3,
        }
