"""Measure the processor at hand and its memory for the planner.

Every figure is a median. Arithmetic is measured as models run it: torch's own linear operator, with the thread count
of this process, over weights that follow one another like layers, so that no cache holds them from one use to the next.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from zinfer.device_probe import step_without_work
from zinfer.planner.hardware import Curve
from zinfer.planner.memory import free_memory, parse_size

WIDTH = 4096  # of the square weights that are multiplied with
WORKING_SET = 512 << 20  # bytes gone through in turn; a quarter of what is free if that is less
BEYOND = 4  # ... and this many times what all caches hold, where they are larger
LEAST_SET = 64 << 20
ROWS = (1, 8, 16, 32, 64, 128, 512)
SECONDS = 0.2  # of measuring each point
COPY_BYTES = 16 << 20  # of a result; its two halves are joined
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Sequences, heads, tokens and width of the cache that attention is measured with.
ATTENTION = (16, 32, 128, 128)
BUSY = 1.6  # a median this many times the fastest quarter: something else was running


def linear_curve(dtype: torch.dtype) -> tuple[Curve, bool]:
    """(rows, flop/s) of a linear layer, from one row, where memory limits, to many, where arithmetic does.

    Also whether the times varied as they do only when other programs compute at the same time.
    """
    each = WIDTH * WIDTH * dtype.itemsize
    count = max(2, _working_set() // each)
    # Like streamed parameters, these require grad: torch takes another path for those that do not.
    # Random values: with one value throughout, processors draw less power and compute faster than in a model.
    random = torch.Generator().manual_seed(0)
    base = torch.randn(WIDTH, WIDTH, generator=random).mul_(0.02).to(dtype)
    weights = [base.clone().requires_grad_(True) for _ in range(count)]
    points, spreads = [], []
    for rows in ROWS:
        x = torch.randn(rows, 1, WIDTH, generator=random).to(dtype)
        times = _times(partial(_product, x, weights))
        median = statistics.median(times)
        points.append((rows, 2 * rows * WIDTH * WIDTH / median))
        spreads.append(median / times[len(times) // 4])
    return tuple(points), statistics.median(spreads) > BUSY


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights[turn % len(weights)])


def _working_set() -> int:
    """Bytes to go through in turn, so that each has left the processor's caches when its turn comes again."""
    return min(max(WORKING_SET, BEYOND * _cache_bytes()), max(free_memory() // 4, LEAST_SET))


def _cache_bytes() -> int:
    """What the processors' largest caches hold together; 0 where the kernel does not tell."""
    most = 0
    for folder in CACHES.glob("index*"):
        try:
            size = parse_size((folder / "size").read_text().strip())
            shared = sum(
                int(last or first) - int(first) + 1
                for first, _, last in (
                    part.partition("-")
                    for part in (folder / "shared_cpu_list").read_text().strip().split(",")
                )
            )
        except (OSError, ValueError):
            continue
        most = max(most, size * -(-(os.cpu_count() or 1) // max(shared, 1)))
    return most


def copy_rate() -> float:
    """Bytes read and written a second by an operator that allocates its result.

    Parts and results each fill half a working set: what is read comes from memory, and what is written ends there.
    """
    count = max(2, _working_set() // (2 * COPY_BYTES))
    # Ones: pages of zeros that nobody wrote are all the same one.
    parts = [torch.ones(COPY_BYTES // 4, dtype=torch.bfloat16) for _ in range(2 * count)]
    results: deque[torch.Tensor] = deque(maxlen=count)

    def join(turn: int) -> None:
        first = 2 * (turn % count)
        results.append(torch.cat(parts[first : first + 2]))

    for turn in range(count):  # pages that are new to the process would cost their first touch
        join(turn)
    return 2 * COPY_BYTES / statistics.median(_times(join))


def attention_rate() -> float:
    """Bytes of keys and values a second that fused attention reads for one query a head."""
    sequences, heads, tokens, width = ATTENTION
    query = torch.full((sequences, heads, 1, width), 0.1, dtype=torch.bfloat16)
    # As many, of keys and of values, as one layer's would follow another's in a large model.
    each = sequences * heads * tokens * width * torch.bfloat16.itemsize
    count = max(4, _working_set() // each) // 2 * 2
    caches = [torch.full((sequences, heads, tokens, width), 0.1, dtype=torch.bfloat16) for _ in range(count)]
    seconds = statistics.median(
        _times(
            lambda turn: torch.nn.functional.scaled_dot_product_attention(
                query, caches[2 * turn % count], caches[(2 * turn + 1) % count]
            )
        )
    )
    return 2 * each / seconds


def operator_seconds() -> float:
    """Seconds an operator takes besides its work: a step of a model without work, over its operators."""
    step, count = step_without_work(torch.device("cpu"))
    return statistics.median(_times(step)) / count


def _times(work: Callable[[int], object]) -> list[float]:
    """Seconds of single calls of `work`, in rising order, for about SECONDS; it is told how many came before."""
    times: list[float] = []
    with torch.no_grad():
        work(0)  # the first call of a shape sets things up
        deadline = time.perf_counter() + SECONDS
        while time.perf_counter() < deadline or len(times) < 5:
            started = time.perf_counter()
            work(len(times))
            times.append(time.perf_counter() - started)
    return sorted(times)
