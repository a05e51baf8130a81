"""What benchmarks.gpu makes of what it measured: figures, tables and requirements. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from benchmarks import BenchmarkError
from benchmarks.report import Requirement, Spread, table
from zinfer.timeline.events import COPIES, SWEEPS, Timeline, overlap, rates, union

GB = 1e9
TERA = 1e12
SHARE_BOUND = 0.95  # of a pinned copy's rate, and of the drive's
IDLE_BOUND = 0.03  # of a streaming sweep
PEAK_BOUND = 0.54  # of the card's matmul peak, in prefill; the paper's best on an A6000
PLAN_BOUND = 1.05  # seconds a token over the planner's
TIMES_BUDGET = 3  # the model's bytes over the device's budget


@dataclass(frozen=True)
class Copying:
    """Copies to the card during some time: their bytes, and for how long at least one ran. Times in seconds."""

    seconds: float
    nbytes: float
    busy: float


def copying(timeline: Timeline, sweeps: int) -> Copying:
    """The copies during the last `sweeps` sweeps but the very last, each taken to last until the next begins.

    Where a device computes, a sweep's end on the host is no end. Raises BenchmarkError where there were fewer.
    """
    begun = [span.start for span in timeline.row(SWEEPS)]
    if len(begun) <= sweeps:
        raise BenchmarkError(
            f"the timeline has {len(begun)} sweeps, too few to tell of {sweeps} and one more"
        )
    start, end = begun[-1 - sweeps], begun[-1]
    copies = timeline.row(COPIES)
    busy = overlap([(start, end)], union((span.start, span.end) for span in copies))
    return Copying(end - start, rates(copies, start, end, 1)[0] * (end - start), busy)


@dataclass(frozen=True)
class Round:
    """`tokens` decoded one after the other: `seconds`, bytes copied and read meanwhile, seconds in which copies ran.

    `yardstick`: the rate, before and after, of what they should be as fast as.
    """

    tokens: int
    seconds: float
    copied: float
    busy: float
    read: int
    yardstick: tuple[float, float]

    @property
    def seconds_a_token(self) -> float:
        """Of every sequence of the batch."""
        return self.seconds / self.tokens

    @property
    def copy_share(self) -> float:
        """Bytes a second to the card over the yardstick's."""
        return self.copied / self.seconds / fmean(self.yardstick)

    @property
    def read_share(self) -> float:
        """Bytes a second from the drive over the yardstick's."""
        return self.read / self.seconds / fmean(self.yardstick)

    @property
    def idle(self) -> float:
        """Share of the time in which no copy ran."""
        return 1 - self.busy / self.seconds


@dataclass(frozen=True)
class Decode:
    """Rounds of decoding at one batch. `bound`: seconds a token by the planner, if it knew, limited by `bottleneck`."""

    batch: int
    rounds: list[Round]
    bound: float | None
    bottleneck: str

    @property
    def seconds_a_token(self) -> float:
        """The median round's."""
        return median(each.seconds_a_token for each in self.rounds)


@dataclass(frozen=True)
class Prefill:
    """Passes over `batch` prompts at once, of `flops` each: seconds of each pass, or why there was none."""

    batch: int
    prompt: int
    flops: float
    seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def rate(self) -> float:
        """Flop a second of the median pass; 0 where there was none."""
        return self.flops / median(self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class Stress:
    """`sweeps` of a small model whose recycled memory is poisoned; `different` of them gave other logits."""

    sweeps: int
    different: int


@dataclass(frozen=True)
class Memory:
    """Bytes of the card: the budget, the most that the driver counted while a model ran, and by its process list."""

    budget: int
    peak: int
    listed: int | None


@dataclass
class Findings:
    """What was measured; None or empty where that was left out, or failed, as `failed` tells."""

    budget: int
    sweeps_wanted: int
    model_bytes: int = 0
    peak_flops: float = 0.0
    from_host: list[Decode] = field(default_factory=list)
    from_drive: list[Round] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    memory: Memory | None = None
    stress: Stress | None = None
    tests: list[str] | None = None  # a line for each process of tests that failed
    sanitizer: str = "compute-sanitizer is not there"
    failed: list[str] = field(default_factory=list)

    @property
    def best(self) -> Prefill | None:
        """The fastest prefill."""
        done = [each for each in self.prefills if each.seconds]
        return max(done, key=lambda each: each.rate, default=None)

    def share_of_peak(self, prefill: Prefill) -> float:
        """Flop a second over the card's peak; 0 where that was not measured."""
        return prefill.rate / self.peak_flops if self.peak_flops else 0.0


def requirements(found: Findings) -> list[Requirement]:
    """What the issue asks of each part that was measured; a part that was not is a requirement missed."""
    wanted = [
        Requirement("model's bytes / device budget", found.model_bytes / found.budget, TIMES_BUDGET, True),
        Requirement("parts that failed or were left out", len(found.failed), 0, False),
    ]
    if found.tests is not None:
        wanted.append(Requirement("GPU tests: processes that failed", len(found.tests), 0, False))
    streaming = next((each for each in found.from_host if each.batch == 1), None)
    if streaming is not None:
        share = median(each.copy_share for each in streaming.rounds)
        idle = median(each.idle for each in streaming.rounds)
        wanted += [
            Requirement("host -> GPU: bytes a second / pinned copies", share, SHARE_BOUND, True),
            Requirement("host -> GPU: share of a sweep without a copy", idle, IDLE_BOUND, False),
        ]
    if found.from_drive:
        share = median(each.read_share for each in found.from_drive)
        wanted.append(Requirement("NVMe -> GPU: bytes a second / the drive", share, SHARE_BOUND, True))
    for each in found.from_host:
        if each.bound:
            name, ratio = (
                f"decode, batch {each.batch}: s a token / planner's",
                each.seconds_a_token / each.bound,
            )
            wanted.append(Requirement(name, ratio, PLAN_BOUND, False))
    if found.prefills:
        best = found.best or found.prefills[0]
        name = f"prefill, batch {best.batch}: flop a second / matmul peak"
        wanted.append(Requirement(name, found.share_of_peak(best), PEAK_BOUND, True))
    if (memory := found.memory) is not None:
        name = "peak device memory by the driver / budget"
        wanted.append(Requirement(name, memory.peak / memory.budget, 1, False))
        if memory.listed is not None:
            name = "device memory by the driver's list of processes / budget"
            wanted.append(Requirement(name, memory.listed / memory.budget, 1, False))
    if (stress := found.stress) is not None:
        wanted += [
            Requirement(
                "stress: sweeps with recycled memory poisoned", stress.sweeps, found.sweeps_wanted, True
            ),
            Requirement("stress: sweeps with other logits", stress.different, 0, False),
        ]
    return wanted


def decode_table(found: Findings) -> str:
    """Decoding from host memory at each batch, and from the drive."""
    rows = [
        [
            f"host memory, batch {each.batch}",
            *_rates(each.rounds, [one.copied / one.seconds for one in each.rounds]),
            Spread.of([one.idle * 100 for one in each.rounds]).text(),
            f"{each.bound:.3f} ({each.bottleneck})" if each.bound else "",
        ]
        for each in found.from_host
    ]
    if found.from_drive:
        mine = found.from_drive
        idle = Spread.of([one.idle * 100 for one in mine]).text()
        rows.append(["drive, batch 1", *_rates(mine, [one.read / one.seconds for one in mine]), idle, ""])
    header = [
        "from",
        "s a token",
        "GB/s",
        "plain copies, or the drive, GB/s",
        "% without a copy",
        "planner's s",
    ]
    return table(header, rows) if rows else ""


def _rates(rounds: Sequence[Round], moved: Sequence[float]) -> list[str]:
    return [
        Spread.of([each.seconds_a_token for each in rounds]).text(digits=3),
        Spread.of(moved).text(GB),
        Spread.of([rate for each in rounds for rate in each.yardstick]).text(GB),
    ]


def prefill_table(found: Findings) -> str:
    """Prefill at each batch."""
    rows = [
        [
            f"{each.batch} x {each.prompt}",
            Spread.of(each.seconds).text(digits=3) if each.seconds else each.failed,
            f"{each.rate / TERA:.4g}",
            f"{found.share_of_peak(each):.2f}",
            f"{each.batch * each.prompt / median(each.seconds):.0f}" if each.seconds else "",
        ]
        for each in found.prefills
    ]
    return table(["prefill", "s", "TFLOPS", "of the peak", "tokens/s"], rows) if rows else ""


def remarks(found: Findings) -> list[str]:
    """What is not in a table, a line each."""
    lines = [f"Peak of bf16 products: {found.peak_flops / TERA:.4g} TFLOPS."]
    if (best := found.best) is not None:
        lines.append(f"The fastest prefill is that of batch {best.batch}.")
    if (memory := found.memory) is not None:
        listed = (
            "it lists no processes here" if memory.listed is None else f"{memory.listed / GB:.3f} GB listed"
        )
        lines.append(
            f"Device memory: budget {memory.budget / GB:.3f} GB, peak by the driver {memory.peak / GB:.3f} GB, "
            f"{listed}."
        )
    if (stress := found.stress) is not None:
        lines.append(
            f"{stress.sweeps} sweeps with recycled memory poisoned: {stress.different} with other logits than "
            "in memory."
        )
    lines.append(f"Sanitizer: {found.sanitizer}.")
    if found.tests is None:
        lines.append("The GPU tests were left out.")
    lines += [f"Tests failed: {text}." for text in found.tests or ()]
    lines += [f"Failed or left out: {text}." for text in found.failed]
    return lines
