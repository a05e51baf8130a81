"""The cards that benchmarks.gpu runs on: a GPU, and one that the CPU plays, so that the benchmark itself can be tested.

Their rates are those of plain torch, without zinfer: the yardsticks that zinfer is held against.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from benchmarks import BenchmarkError
from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import Processor
from zinfer.device.staged import StagedProcessor
from zinfer.planner.hardware import RANGES

COPIES = 8  # one after the other, in one measurement
SAMPLE_SECONDS = 0.01
SMI_SECONDS = 20
MIB = 1 << 20


class Card(ABC):
    """Where models compute, and what plain torch does there. For one thread, but for used().

    `copy_bytes`: of one copy that is measured, and of a tensor that is read on the card. `most_flops` and
    `most_bytes`: what one measurement of products computes, and reads, at most.
    """

    torch_device: torch.device
    name: str
    total: int  # bytes of memory
    pins: bool
    copy_bytes: int
    most_flops: float
    most_bytes: float

    @abstractmethod
    def processor(self, *, poison: bool = False) -> Processor:
        """A new zinfer device on this card, which tells when copies ran; `poison` what was given back."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all that it was given has run."""

    @abstractmethod
    def used(self) -> int:
        """Bytes in use for this process now, as the driver says."""

    @contextmanager
    def beyond_limit(self) -> Iterator[None]:
        """Room for what is measured beside a model; given back at the end."""
        yield

    def nvml(self) -> Callable[[], int] | None:
        """What tells, as used(), by the driver's own library; None where that cannot be asked."""
        return None

    def facts(self) -> dict[str, str]:
        """What the figures depend on, as text."""
        return {"card": f"{self.name}, {self.total / 2**30:.1f} GiB"}

    def listed_bytes(self) -> int | None:
        """Bytes in use for this process by the driver's own list of processes, where there is one."""
        return None

    def clear(self) -> None:
        """Give back what nobody uses any more."""
        gc.collect()

    def copy_rate(self, seconds: float) -> float:
        """Bytes a second from page-locked memory to the card: large copies, for about `seconds`."""
        with self.beyond_limit():
            return self._copy_rate(seconds)

    def memory_rate(self, seconds: float) -> float:
        """Bytes a second that are read and written on the card."""
        source = torch.empty(self.copy_bytes, dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)

        def work() -> None:
            for _ in range(COPIES):  # so that starting them, and waiting for the last, count for little
                target.copy_(source)

        return self._rate(work, 2 * COPIES * self.copy_bytes, seconds)

    def matmul_rate(self, rows: int, width: int, out: int, seconds: float) -> float:
        """Flop a second of products of a bf16 matrix of `rows` rows with an `out` x `width` weight."""
        given = torch.randn(rows, width, dtype=torch.bfloat16, device=self.torch_device)
        weight = torch.randn(out, width, dtype=torch.bfloat16, device=self.torch_device)
        flops = 2.0 * rows * width * out
        times = max(1, int(min(self.most_flops / flops, self.most_bytes / weight.nbytes)))

        def work() -> None:
            for _ in range(times):
                torch.nn.functional.linear(given, weight)

        return self._rate(work, times * flops, seconds)

    def _copy_rate(self, seconds: float) -> float:
        source = torch.empty(self.copy_bytes, dtype=torch.uint8, pin_memory=self.pins)
        target = torch.empty(self.copy_bytes, dtype=torch.uint8, device=self.torch_device)

        def work() -> None:
            for _ in range(COPIES):
                target.copy_(source, non_blocking=True)

        return self._rate(work, COPIES * self.copy_bytes, seconds)

    def _rate(self, work: Callable[[], object], amount: float, seconds: float) -> float:
        """The median of `amount` a second, over repetitions of `work`."""
        work()
        self.finish()
        rates: list[float] = []
        deadline = time.perf_counter() + seconds
        while not rates or time.perf_counter() < deadline:
            started = time.perf_counter()
            work()
            self.finish()
            rates.append(amount / (time.perf_counter() - started))
        return median(rates)


def refuse_without_gpu() -> None:
    """Raises BenchmarkError where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise BenchmarkError(
            f"no GPU: torch {torch.__version__} finds none here, so nothing was measured. Run this on a machine "
            "with one, or try the benchmark itself with --staged"
        )


class CudaCard(Card):
    """The GPU that torch uses first. Raises BenchmarkError where there is none."""

    pins = True
    copy_bytes = 256 * MIB
    most_flops = 4e12
    most_bytes = 64e9

    def __init__(self) -> None:
        refuse_without_gpu()
        # Before this process takes any of it: what is in use now is others'.
        self._nvml = nvml_counter(visible_device())
        self._others_by_nvml = self._nvml() if self._nvml is not None else 0
        found = _smi("--query-gpu=memory.used,driver_version", "-i", visible_device()).split(",")
        self._others = int(found[0]) * MIB if found[0].strip().isdigit() else self._others_by_nvml
        self._driver = found[1].strip() if len(found) > 1 else "not told"
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.torch_device)
        self.total = torch.cuda.mem_get_info(self.torch_device)[1]

    def processor(self, *, poison: bool = False) -> Processor:
        """See Card."""
        return CudaProcessor(self.torch_device, timed=True, poison=poison)

    def finish(self) -> None:
        """See Card."""
        torch.cuda.synchronize(self.torch_device)

    def used(self) -> int:
        """See Card: all that is in use on the card, but for what others had at the start."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free - self._others

    def nvml(self) -> Callable[[], int] | None:
        """See Card."""
        count, others = self._nvml, self._others_by_nvml
        return None if count is None else lambda: count() - others

    @contextmanager
    def beyond_limit(self) -> Iterator[None]:
        """See Card: of torch's allocator, which zinfer keeps within its budget."""
        if not hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.8 may lack it
            yield  # within the limit: what is measured takes little
            return
        share = torch.cuda.get_per_process_memory_fraction(self.torch_device)
        torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
        try:
            yield
        finally:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(share, self.torch_device)

    def facts(self) -> dict[str, str]:
        """See Card."""
        return {**super().facts(), "driver": f"{self._driver}, CUDA {torch.version.cuda}"}

    def listed_bytes(self) -> int | None:
        """See Card."""
        return listed_bytes(_smi("--query-compute-apps=pid,used_memory", "-i", visible_device()), os.getpid())

    def clear(self) -> None:
        """See Card."""
        super().clear()
        torch.cuda.empty_cache()


class StagedCard(Card):
    """The CPU, playing a card: everything is tried, and no figure means anything."""

    pins = False
    copy_bytes = 4 * MIB
    most_flops = 1e8
    most_bytes = 1e8
    torch_device = torch.device("cpu")
    name = "staged"
    total = 1 << 26  # so small that zinfer measures it with small products

    def __init__(self) -> None:
        self._processor: StagedProcessor | None = None

    def processor(self, *, poison: bool = False) -> Processor:
        """See Card."""
        self._processor = StagedProcessor(self.total, check=poison)
        return self._processor

    def finish(self) -> None:
        """See Card: operators have run when they return."""

    def memory_rate(self, seconds: float) -> float:
        """See Card; no less than the planner takes for a device's."""
        return max(super().memory_rate(seconds), RANGES["device_bandwidth"][0])

    def used(self) -> int:
        """See Card: what the last device allocated."""
        return self.total - self._processor.memory()[0] if self._processor is not None else 0


class Watch:
    """The most bytes that each of `used` told of while it was entered, any number of times: `peaks`. For one thread.

    Leaving it raises what kept one of them from telling.
    """

    def __init__(self, *used: Callable[[], int]) -> None:
        self.peaks = [0] * len(used)
        self._used = used
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def peak(self) -> int:
        """The first one's."""
        return self.peaks[0]

    def __enter__(self) -> Watch:
        self._over.clear()
        self._thread = threading.Thread(target=self._sample, name="gpu-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _sample(self) -> None:
        over = False
        try:
            while not over:
                over = self._over.wait(SAMPLE_SECONDS)  # and once more at the end
                self.peaks = [max(peak, used()) for peak, used in zip(self.peaks, self._used, strict=True)]
        except Exception as error:  # whatever it is, a peak that was not seen is no peak
            self._error = error


def listed_bytes(listing: str, process: int) -> int | None:
    """Bytes that nvidia-smi's list, lines of `process, MiB`, has for `process`; None where it is not in it."""
    for line in listing.splitlines():
        number, _, size = line.partition(",")
        if number.strip() == str(process) and size.strip().isdigit():
            return int(size) * MIB
    return None


def nvml_counter(card: str) -> Callable[[], int] | None:
    """What tells how many bytes of `card`, a number or a UUID, are in use; None without nvidia-ml-py, or its driver.

    Everybody's, and what the driver keeps for itself: to be held against what it tells beforehand.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        find = pynvml.nvmlDeviceGetHandleByIndex if card.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        handle = find(int(card) if card.isdigit() else card)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def visible_device() -> str:
    """What the driver's own tools call the card that torch uses first."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def _smi(*arguments: str) -> str:
    """What nvidia-smi prints, or nothing where it is not there or does not know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, *arguments, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
