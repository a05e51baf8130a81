"""A GPU, through torch's streams and events; ROCm's too, which torch calls cuda."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from zinfer.device.processor import ALIGNMENT, POISON, Event
from zinfer.errors import OutOfMemoryError
from zinfer.weights.layout import round_up

MOST_OVERHEAD = 1 << 30  # bytes of a context with the kernels it loads
BFLOAT16_CAPABILITY = 8  # of NVIDIA's, which compute with bfloat16 from there on; AMD's begin above
WORKSPACE = 64 << 20  # bytes that cuBLAS allocates for itself, through torch, a stream
# torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp): blocks of up to SMALL bytes lie in segments of
# SMALL_SEGMENT bytes, those below LARGE in segments of SEGMENT, and larger ones are rounded up to multiples of STEP.
SMALL, SMALL_SEGMENT, LARGE, SEGMENT, STEP = 1 << 20, 2 << 20, 10 << 20, 20 << 20, 2 << 20
PARTLY_FILLED = (
    SEGMENT + SMALL_SEGMENT + STEP
)  # bytes: the last segment of either kind, and the rounding of the window
URGENT_PRIORITY = -1  # torch's streams: the lower, the sooner


@dataclass
class _Limits:
    """Of one device, for which torch knows one limit: a share of it, and whatever torch has reserved there counts."""

    each: dict[int, int] = field(default_factory=dict)  # bytes for each processor that limits it
    # bytes that torch had reserved when the first of them came, cuBLAS's workspace perhaps among them
    others: int = 0
    before: float = 1.0  # the share that held then, and holds again after the last
    share: float = 1.0  # the share that holds
    in_force: bool = False


_limits: dict[int, _Limits] = {}  # by device
_limits_lock = threading.RLock()  # a finalizer may lift a limit inside a function here


def allocated_by_torch(nbytes: int) -> int:
    """Bytes of the device that a block of `nbytes` takes: its share of a segment, taken to hold others of its size."""
    rounded = round_up(max(nbytes, 1), ALIGNMENT)
    if rounded >= LARGE:
        return round_up(rounded, STEP)
    segment = SMALL_SEGMENT if rounded <= SMALL else SEGMENT
    return -(-segment // (segment // rounded))


def load_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Run what any model runs on `device`: a driver loads kernels at their first use, into memory nobody allocated."""
    with torch.no_grad():
        square = torch.ones(64, 64, device=device)
        torch.mm(square, square)
        square = square.to(dtype)
        ids = torch.zeros(1, 64, dtype=torch.long, device=device)
        states = torch.nn.functional.linear(torch.nn.functional.embedding(ids, square), square)
        heads = states.view(1, 1, 64, 64)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        torch.softmax(states.float(), -1)


class CudaEvent:
    """See Event. `origin`: an event and the moment it was reached, to tell times by; None: no times are kept."""

    def __init__(self, origin: tuple[torch.cuda.Event, float] | None, transferred: int | None = None) -> None:
        self.transferred = transferred
        self._origin = origin
        timed = origin is not None
        self.begun = torch.cuda.Event(enable_timing=True) if timed else None
        self.event = torch.cuda.Event(enable_timing=timed, blocking=True)  # whoever waits sleeps

    @property
    def timed(self) -> bool:
        """Whether times are kept."""
        return self._origin is not None

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
        """What the driver says is used and torch did not allocate, once what any model runs has run."""
        modern = torch.cuda.get_device_capability(self.torch_device)[0] >= BFLOAT16_CAPABILITY
        load_kernels(self.torch_device, torch.bfloat16 if modern else torch.float16)
        torch.cuda.synchronize(self.torch_device)
        free, total = torch.cuda.mem_get_info(self.torch_device)
        outside = total - free - torch.cuda.memory_reserved(self.torch_device)
        return (
            min(max(outside, 0), MOST_OVERHEAD) + WORKSPACE + PARTLY_FILLED
        )  # others' memory counts in `outside` too

    def current(self) -> AbstractContextManager[Any]:
        """See Processor."""
        return torch.cuda.device(self.torch_device)

    def memory(self) -> tuple[int, int]:
        """See Processor. What torch's allocator holds without using it counts as free."""
        with _limits_lock:
            return self._left(self._share()), torch.cuda.mem_get_info(self.torch_device)[1]

    def free(self) -> int:
        """See Processor. A share that somebody else has set for this process holds here too."""
        with _limits_lock:
            limits = _limits.get(self.torch_device.index)
            return self._left(limits.before if limits is not None and limits.in_force else self._share())

    def _left(self, share: float) -> int:
        """Bytes that torch can allocate where it may have `share` of the device."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allocated = torch.cuda.memory_allocated(self.torch_device)
        idle = torch.cuda.memory_reserved(self.torch_device) - allocated
        return max(0, min(free + idle, int(share * total) - allocated))

    def _share(self) -> float:
        """The share of the device that torch may have now."""
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.8 may lack it
            return torch.cuda.get_per_process_memory_fraction(self.torch_device)
        limits = _limits.get(self.torch_device.index)
        return limits.share if limits is not None and limits.in_force else 1.0

    def limit(self, nbytes: int | None) -> None:
        """See Processor: of what torch allocates, whoever asks; cuBLAS's workspace and segments not full besides.

        torch knows one limit a device: that is the sum over the models which compute there, and what the process had
        there before the first of them. What it takes besides later counts against them.
        """
        with _limits_lock:
            limits = _limits.setdefault(self.torch_device.index, _Limits())
            if nbytes is None:
                if limits.each.pop(id(self), None) is None:
                    return
            else:
                limits.each[id(self)] = nbytes  # first: now no finalizer can find that nobody has a limit
                if not limits.in_force:
                    torch.cuda.empty_cache()  # what is idle can be had anew: it is nobody's
                    limits.before = self._share()
                    limits.others = torch.cuda.memory_reserved(self.torch_device)
            self._enforce(limits)

    def _enforce(self, limits: _Limits) -> None:
        """Tell torch; once more where a finalizer that ran meanwhile on this thread has lifted a limit."""
        total = torch.cuda.mem_get_info(self.torch_device)[1]
        while True:
            each = dict(limits.each)
            most = limits.others + sum(each.values()) + WORKSPACE + PARTLY_FILLED
            limits.share = min(limits.before, most / total) if each else limits.before
            torch.cuda.set_per_process_memory_fraction(limits.share, self.torch_device)
            limits.in_force = bool(each)
            if limits.each == each:
                return

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

    def used(self, tensor: torch.Tensor, stream: Any) -> None:
        """See Processor. torch does nothing where the memory is not its own."""
        with torch.no_grad():
            tensor.record_stream(stream)

    def retire(self, block: Any, start: int, nbytes: int, streams: Sequence[Any]) -> list[Event]:
        """See Processor."""
        fences = [self.fence(stream) for stream in streams]
        if self._poisoning is None or not fences:
            return fences
        # A cache's layer may still go back to the host from there, of which the next holder is told apart from fences.
        leaving = self.fence(self._caches[True])
        with torch.cuda.stream(self._poisoning):
            for fence in (*fences, leaving):
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
