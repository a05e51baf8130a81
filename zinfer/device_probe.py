"""Measure a device with memory of its own for the planner: its arithmetic, its memory, copies to it.

Its work is started and waited for as a run does it: copies through the Processor, from the pinned pool, in extents as
large as weights are; operators through torch. A device runs behind the host, so times are of batches of calls, from the
first start to a fence after the last, and long beside both. Every figure is a median.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from zinfer.device.processor import Event, Processor
from zinfer.errors import BudgetError
from zinfer.pass_recorder import Recorder
from zinfer.pinned import Pool
from zinfer.planner.hardware import Curve

METHOD = 1  # raised whenever a figure is measured in another way: older ones do not count
FIGURES = (
    "device_memory",
    "device_bandwidth",
    "host_to_device",
    "matmul",
    "copy_bandwidth",
    "attention_bandwidth",
    "operator_seconds",
)
WIDTH = 8192  # of the square weights, so that a kernel takes longer than the host to start it; less on a small device
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WORKING_SET = 1 << 30  # bytes of the device; a quarter of what is free if that is less
# Sequences, heads, tokens and width of the cache that attention is measured with; fewer tokens on a small device.
ATTENTION = (16, 32, 1024, 128)
RESULT_BYTES = 128 << 20  # of a copy on the device; its two halves are joined
EXTENT_BYTES, EXTENTS = 32 << 20, 8  # of the copies from host memory; those that are started together
SECONDS = 0.1  # of measuring each point
BATCH_SECONDS = 0.01  # of a batch, about
LEAST_BATCHES, MOST_CALLS = 5, 1000
BUSY = 1.6  # a median this many times the fastest quarter: something else was running
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def device_conditions(processor: Processor) -> dict[str, Any]:
    """What figures of the device hold for."""
    return {
        "device method": METHOD,
        "device": processor.name,
        "device memory": processor.memory()[1],
        "driver": _driver(),
        "runtime": torch.version.cuda or torch.version.hip or "",
    }


def measure_device(processor: Processor, when: str) -> tuple[dict[str, Any], dict[str, str], bool]:
    """The FIGURES of a device, where each is from, and whether other programs seemed to use it. Takes a few seconds.

    `when` stands in the sources. Raises BudgetError where the device has no memory left to measure with.
    """
    try:
        with torch.no_grad():
            return _measure(processor, f"measured {when} on {processor.name}, torch {torch.__version__}")
    except torch.OutOfMemoryError as error:
        free, total = processor.memory()
        raise BudgetError(
            f"{processor.name} cannot be measured: {free} of its {total} bytes are free; end what else uses it, or "
            "plan with device='cpu'"
        ) from error
    finally:
        if processor.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def step_without_work(device: torch.device) -> tuple[Callable[[int], object], int]:
    """A decoding step of a transformer with hardly any weights, on `device`, and the operators that are in it."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=8, num_attention_heads=2, vocab_size=32
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).eval()
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad(), Recorder({}, on_demand=False) as recorder:
        model(ids, use_cache=True)
    count = sum(operator.count for operator in recorder.finish().operators)
    model.to(device)
    ids = ids.to(device)
    return lambda _: model(ids, use_cache=True), count


def _measure(processor: Processor, measured: str) -> tuple[dict[str, Any], dict[str, str], bool]:
    curves, busy = {}, False
    for name, dtype in DTYPES.items():
        curves[name], disturbed = _curve(processor, dtype)
        busy = busy or disturbed
    rate, locked = _host_rate(processor)
    step, operators = step_without_work(processor.torch_device)
    figures = {
        "device_memory": processor.memory()[1],
        # One row reads each weight once, for 2 flops an element.
        "device_bandwidth": max(
            curves[name][0][1] * dtype.itemsize / 2 / ROWS[0] for name, dtype in DTYPES.items()
        ),
        "host_to_device": rate,
        "matmul": {name: [list(point) for point in curve] for name, curve in curves.items()},
        "copy_bandwidth": _join_rate(processor),
        "attention_bandwidth": _attention_rate(processor),
        "operator_seconds": statistics.median(_times(processor, step)) / operators,
    }
    sources = {
        "device_memory": "what the device says it has",
        "device_bandwidth": f"{measured}: matrix times vector",
        "host_to_device": f"{measured}: extents of {EXTENT_BYTES >> 20} MiB from {locked} memory",
        "matmul": f"{measured}: products with square weights that no cache holds",
        "copy_bandwidth": f"{measured}: tensors joined, as a cache grows",
        "attention_bandwidth": f"{measured}: one query a head over caches of keys and values",
        "operator_seconds": f"{measured}: a decoding step of a transformer with hardly any weights",
    }
    return figures, sources, busy


def _curve(processor: Processor, dtype: torch.dtype) -> tuple[Curve, bool]:
    """(rows, flop/s) of a linear layer; whether the times varied as they do only when others use the device."""
    memory, width = _working_set(processor), WIDTH
    while width > 256 and 2 * width * width * dtype.itemsize > memory:
        width //= 2
    each = width * width * dtype.itemsize
    device = processor.torch_device
    # Random values: with one value throughout, processors draw less power and compute faster than in a model.
    random = torch.Generator(device=device).manual_seed(0)
    base = torch.randn(width, width, generator=random, device=device).mul_(0.02).to(dtype)
    weights = [base.clone() for _ in range(max(2, memory // each))]
    del base
    points, spreads = [], []
    for rows in ROWS:
        x = torch.randn(rows, 1, width, generator=random, device=device).to(dtype)
        times = _times(processor, partial(_product, x, weights))
        median = statistics.median(times)
        points.append((rows, 2 * rows * width * width / median))
        spreads.append(median / times[len(times) // 4])
    return tuple(points), statistics.median(spreads) > BUSY


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights[turn % len(weights)])


def _host_rate(processor: Processor) -> tuple[float, str]:
    """Bytes a second from the pinned pool to the device, and what kind of memory the pool had."""
    lock: Literal["auto", "off"] = "auto" if processor.page_locks else "off"
    extent = max(1 << 20, min(EXTENT_BYTES, processor.memory()[0] // (4 * EXTENTS)))
    with processor.current():
        pool = Pool(EXTENTS * extent, page_lock=lock)
    started: list[Event] = []
    try:
        block = processor.block(EXTENTS * extent)
        moves = []
        for index in range(EXTENTS):
            source = torch.frombuffer(pool.acquire(extent), dtype=torch.uint8)
            source.fill_(index + 1)  # pages of zeros that nobody wrote are all the same one
            moves.append((processor.over(block, index * extent, extent)[0], source))

        def copy_all() -> float:
            begun = time.perf_counter()
            started[:] = []
            for move in moves:
                started.append(processor.copy([move], (), urgent=False))
            started[-1].wait()  # they run in order
            return time.perf_counter() - begun

        copy_all()
        times: list[float] = []
        deadline = time.perf_counter() + SECONDS
        while time.perf_counter() < deadline or len(times) < LEAST_BATCHES:
            times.append(copy_all())
        locked = "page-locked" if pool.page_locked else "pageable"
    finally:
        for event in started:  # after an interrupt too: nothing may be copied from memory that is gone
            event.wait()
        pool.close()
    return EXTENTS * extent / statistics.median(times), locked


def _join_rate(processor: Processor) -> float:
    """Bytes read and written a second by an operator that allocates its result."""
    nbytes = min(RESULT_BYTES, _working_set(processor) // 4)
    parts = [torch.ones(nbytes // 4, dtype=torch.bfloat16, device=processor.torch_device) for _ in range(4)]
    results: deque[torch.Tensor] = deque(maxlen=2)

    def join(turn: int) -> None:
        first = 2 * (turn % 2)
        results.append(torch.cat(parts[first : first + 2]))

    return 2 * 2 * parts[0].nbytes / statistics.median(_times(processor, join))


def _attention_rate(processor: Processor) -> float:
    """Bytes of keys and values a second that fused attention reads for one query a head."""
    sequences, heads, tokens, width = ATTENTION
    itemsize = torch.bfloat16.itemsize
    while tokens > 16 and 4 * sequences * heads * tokens * width * itemsize > _working_set(processor):
        tokens //= 2
    device = processor.torch_device
    query = torch.full((sequences, heads, 1, width), 0.1, dtype=torch.bfloat16, device=device)
    caches = [
        torch.full((sequences, heads, tokens, width), 0.1, dtype=torch.bfloat16, device=device)
        for _ in range(4)
    ]
    seconds = statistics.median(
        _times(
            processor,
            lambda turn: torch.nn.functional.scaled_dot_product_attention(
                query, caches[2 * turn % 4], caches[(2 * turn + 1) % 4]
            ),
        )
    )
    return 2 * caches[0].nbytes / seconds


def _working_set(processor: Processor) -> int:
    return min(WORKING_SET, processor.memory()[0] // 4)


def _times(processor: Processor, work: Callable[[int], object]) -> list[float]:
    """Seconds of a call of `work`, by batches of calls, in rising order; it is told how many came before."""
    done = 0

    def batch(calls: int) -> float:
        nonlocal done
        started = time.perf_counter()
        for turn in range(done, done + calls):
            work(turn)
        processor.fence(processor.stream()).wait()
        done += calls
        return (time.perf_counter() - started) / calls

    batch(1)  # the first call of a shape sets things up
    calls = max(1, min(MOST_CALLS, round(BATCH_SECONDS / batch(1))))
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or len(times) < LEAST_BATCHES:
        times.append(batch(calls))
    return sorted(times)


def _driver() -> str:
    """What the driver calls itself; nothing where there is none."""
    for path in DRIVERS:
        try:
            return path.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
        except OSError:
            continue
    return ""
