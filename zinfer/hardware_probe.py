"""Measure the machine at hand for the planner, in a few seconds, and keep the figures.

Every figure is a median. Arithmetic is measured as models run it: torch's own linear operator, with the thread count
of this process, over weights that follow one another like layers, so that no cache holds them from one use to the next.

The figures lie in `$XDG_CACHE_HOME/zinfer/hardware.json` (by default `~/.cache/zinfer`), one record a drive; a record
counts while torch, its thread count, the memory and the drive are the same. The file may be deleted at any time.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from zinfer.aio.block_device import BlockDevice, block_device_of
from zinfer.aio.probe import BLOCK_BYTES, measure_read_rate
from zinfer.aio.profile import load_profile
from zinfer.aio_bench.target import made_targets
from zinfer.dry_run import Recorder
from zinfer.errors import DriveError, OptionError, StoreError
from zinfer.planner.hardware import Curve, Hardware, hardware_from
from zinfer.planner.memory import free_memory, total_memory

logger = logging.getLogger("zinfer")

SCHEMA = 1
WIDTH = 4096  # of the square weights that are multiplied with
WORKING_SET = (
    512 << 20
)  # bytes of weights in turn, far beyond any cache; a quarter of what is free if that is less
LEAST_SET = 64 << 20
ROWS = (1, 8, 16, 32, 64, 128, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SECONDS = 0.2  # of measuring each point
DRIVE_SECONDS, DRIVE_TIMES = 1.5, 5
WINDOW_BYTES = 256 << 20
SAMPLE_BYTES = 256 << 20  # of the temporary file that is read where there is no checkpoint and no profile
COPY_BYTES = 16 << 20
ATTENTION = (
    16,
    32,
    128,
    128,
)  # sequences, heads, tokens and width of the cache that attention is measured with
BUSY_PERCENT, BUSY_SECONDS = 25, 0.2  # of all cores, used by others before anything is measured
BUSY = 1.6  # a median this many times the fastest quarter: something else was running


def this_machine(paths: Sequence[str], *, refresh: bool = False) -> Hardware:
    """The machine at hand, with the drive that `paths` lie on: shards, or else a folder.

    From the cache, unless `refresh` or something has changed since. Raises OptionError where a path is gone, and
    DriveError or StoreError where the drive cannot be read, or takes no file to read.
    """
    try:
        device = block_device_of(paths[0])
    except OSError as error:
        raise OptionError(
            f"{paths[0]}: {error.strerror}: the drive to plan for is gone; mount it, or name a hardware profile"
        ) from error
    conditions = _conditions()
    records = {} if refresh else _load()
    record = records.get(device.key)
    found = _usable(record, conditions)
    if found is None:
        found = _measure(paths, device)
        _save(device.key, {"conditions": conditions, "measured": _now(), "hardware": found.as_dict()})
    return _with_profile(found, device)


def measured_machine(path: str) -> Hardware | None:
    """What this_machine() measured earlier, for the drive that `path` lies on; None where it has not, or not so."""
    try:
        device = block_device_of(path)
    except OSError:
        return None
    found = _usable(_load().get(device.key), _conditions())
    return None if found is None else _with_profile(found, device)


def cache_path() -> Path:
    """Where the figures are, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "zinfer", "hardware.json")


def _conditions() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory": total_memory(),
    }


def _usable(record: Any, conditions: dict[str, Any]) -> Hardware | None:
    if not isinstance(record, dict) or record.get("conditions") != conditions:
        return None
    try:
        return hardware_from(record.get("hardware"), str(cache_path()))
    except OptionError as error:
        logger.warning("%s; measuring again", error)
        return None


def _measure(paths: Sequence[str], device: BlockDevice) -> Hardware:
    curves, busy = {}, psutil.cpu_percent(BUSY_SECONDS) > BUSY_PERCENT
    for name, dtype in DTYPES.items():
        curves[name], disturbed = _curve(dtype)
        busy = busy or disturbed
    if busy:
        logger.warning(
            "other programs were computing while this machine was measured, so predictions may be too slow: measure "
            "again when it is quiet, with remeasure=True (`zinfer plan --remeasure`)"
        )
    # One row reads each weight once, for 2 flops an element.
    matvec = max(curves[name][0][1] * dtype.itemsize / 2 for name, dtype in DTYPES.items())
    rate, how = _drive_rate(paths, device)
    measured = f"measured {_now()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return Hardware(
        name="this machine",
        drive_read=rate,
        host_memory=total_memory(),
        host_bandwidth=matvec,
        device_memory=0,
        device_bandwidth=0,
        host_to_device=0,
        matmul=curves,
        copy_bandwidth=_copy_rate(),
        attention_bandwidth=_attention_rate(),
        operator_seconds=_operator_seconds(),
        sources={
            "drive_read": how,
            "host_memory": "the machine's, or its memory cgroup's limit",
            "host_bandwidth": f"{measured}: matrix times vector, working set beyond the caches",
            "copy_bandwidth": f"{measured}: tensors of {COPY_BYTES >> 20} MiB joined, as a cache grows",
            "attention_bandwidth": f"{measured}: one query a head over a cache",
            "operator_seconds": f"{measured}: a decoding step of a transformer with hardly any weights",
            "matmul": f"{measured}: products with {WIDTH} x {WIDTH} weights, working set beyond the caches",
        },
    )


def _drive_rate(paths: Sequence[str], device: BlockDevice) -> tuple[float, str]:
    profile = load_profile(device)
    if profile is not None and profile.read_rate is not None:
        return profile.read_rate, f"{device.name}: aio_bench's profile of {profile.measured}"
    files = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) >= BLOCK_BYTES]
    if files:
        return _read_rate(files), f"{device.name}: direct reads of the checkpoint, {_now()}"
    folder = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(os.path.abspath(paths[0]))
    try:
        with made_targets([folder], SAMPLE_BYTES) as (target,):
            rate = _read_rate([target.path])
    except StoreError as error:
        raise StoreError(
            f"{error}; run `aio_bench` on the drive to plan for, which keeps a profile"
        ) from error
    except DriveError as error:
        raise OptionError(f"{error}; name a hardware profile instead of 'this'") from error
    return rate, f"{device.name}: direct reads of a temporary file, {_now()}"


def _read_rate(files: Sequence[str]) -> float:
    """Bytes a second into as much memory as a window is: what stays in a processor's cache can come faster."""
    memory = min(WINDOW_BYTES, free_memory() // 8)
    rates = [
        measure_read_rate(files, DRIVE_SECONDS / DRIVE_TIMES, memory).bytes_per_second
        for _ in range(DRIVE_TIMES)
    ]
    return statistics.median(rates)


def _with_profile(found: Hardware, device: BlockDevice) -> Hardware:
    """`found` with the read rate that aio_bench has kept meanwhile: it is measured with more care."""
    profile = load_profile(device)
    if profile is None or profile.read_rate is None:
        return found
    fields = found.as_dict()
    fields["drive_read"] = profile.read_rate
    fields["sources"]["drive_read"] = f"{device.name}: aio_bench's profile of {profile.measured}"
    return hardware_from(fields, "aio_bench's profile")


def _curve(dtype: torch.dtype) -> tuple[Curve, bool]:
    """(rows, flop/s) of a linear layer, from one row, where memory limits, to many, where arithmetic does.

    Also whether the times varied as they do only when other programs compute at the same time.
    """
    each = WIDTH * WIDTH * dtype.itemsize
    count = max(2, min(WORKING_SET, max(free_memory() // 4, LEAST_SET)) // each)
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


def _copy_rate() -> float:
    """Bytes read and written a second by an operator that allocates its result."""
    # Ones: pages of zeros that nobody wrote are all the same one.
    parts = [torch.ones(COPY_BYTES // 4, dtype=torch.bfloat16) for _ in range(2)]
    return 2 * COPY_BYTES / statistics.median(_times(lambda _: torch.cat(parts)))


def _attention_rate() -> float:
    """Bytes of keys and values a second that fused attention reads for one query a head."""
    sequences, heads, tokens, width = ATTENTION
    query = torch.full((sequences, heads, 1, width), 0.1, dtype=torch.bfloat16)
    # Several, so that the cache of one layer is not in the processor's when its turn comes again.
    caches = [torch.full((sequences, heads, tokens, width), 0.1, dtype=torch.bfloat16) for _ in range(8)]
    seconds = statistics.median(
        _times(
            lambda turn: torch.nn.functional.scaled_dot_product_attention(
                query, caches[2 * turn % 8], caches[(2 * turn + 1) % 8]
            )
        )
    )
    return 2 * caches[0].nbytes / seconds


def _operator_seconds() -> float:
    """Seconds an operator takes besides its work: a step of a model without work, over its operators."""
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
    return statistics.median(_times(lambda _: model(ids, use_cache=True))) / count


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


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def _load() -> dict[str, Any]:
    path = cache_path()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or not isinstance(document["drives"], dict):
            raise ValueError(f"schema {document['schema']!r}")
        drives: dict[str, Any] = document["drives"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("%s: not used (%s: %s); measuring again", path, type(error).__name__, error)
        return {}
    return drives


def _save(key: str, record: dict[str, Any]) -> None:
    """Keep `record`; a cache that cannot be written costs the next plan a few seconds, no more."""
    path = cache_path()
    document = {"schema": SCHEMA, "drives": {**_load(), key: record}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            try:
                file.write(json.dumps(document, indent=2) + "\n")
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("%s: not kept: %s", path, error.strerror)
