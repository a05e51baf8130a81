"""What benchmarks.gpu makes of what it measured: figures, tables and requirements. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.report import Requirement, Spread, table
from zinfer.timeline.events import COPIES, SWEEPS, Timeline, overlap, rates, union

GB = 1e9
TERA = 1e12
SHARE_BOUND = 0.95  # of a pinned copy's rate, and of the drive's
IDLE_BOUND = 0.03  # of a streaming sweep
PEAK_BOUND = 0.54  # of the card's matmul peak, in prefill; the paper's best on an A6000
PLAN_BOUND = 1.05  # seconds a token over the planner's
LATE = "not done when its time was over"  # how a process of tests ended
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
class Bound:
    """What `zinfer.plan` says a token takes, in seconds, and what limits it: drive, pcie or compute."""

    seconds: float
    bottleneck: str


@dataclass(frozen=True)
class Decode:
    """Rounds of decoding at one batch, at least one of them."""

    batch: int
    rounds: list[Round]

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
    """Bytes of the card: the budget, the most that the driver counted while a model ran, and by its process list.

    `peak` by the CUDA runtime's count of what is free, `nvml` by the driver's own library, `listed` by its list of
    processes; None where those are not there, or do not know.
    """

    budget: int
    peak: int
    nvml: int | None = None
    listed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one process of tests: how many passed, failed, were skipped, and did not run.

    `wrong`: how the process ended where that was not well.
    """

    name: str
    passed: int
    failed: int
    skipped: int
    not_run: int
    wrong: str = ""


@dataclass
class Findings:
    """What was measured; None or empty where that was left out, or failed, as `failed` tells.

    `plans`: the planner's figures for each batch, with its own measurement of this machine and card (zinfer.plan with
    device=); `plain`: with the rates of plain torch, and with the drive's, that the other figures are held against.
    """

    budget: int
    sweeps_wanted: int
    decode_batches: list[int] = field(default_factory=lambda: [1, 64])
    card: str = "no card"
    facts: dict[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    layers: int = 0
    model_bytes: int = 0
    hardware: dict[str, Any] | None = None
    peak_flops: float = 0.0
    plans: dict[int, Bound] = field(default_factory=dict)
    plain: dict[int, Bound] = field(default_factory=dict)
    from_host: list[Decode] = field(default_factory=list)
    from_drive: list[Round] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    memory: Memory | None = None
    stress: Stress | None = None
    tests: list[Outcome] | None = None  # one for each process of them
    sanitizer: str = "it was not run"
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
    """What the issue asks of each part; what was not measured is a requirement missed."""
    model = found.model_bytes / found.budget if found.model_bytes else None
    wanted = [
        Requirement("model's bytes / device budget", model, TIMES_BUDGET, True),
        Requirement("parts that failed or were left out", len(found.failed), 0, False),
    ]
    if found.tests is not None:
        # A process that died is one that failed, even where none of its tests said so.
        wrong = sum(
            each.failed or bool(each.wrong and not each.wrong.startswith(LATE)) for each in found.tests
        )
        left = sum(each.not_run for each in found.tests)
        wanted.append(Requirement("GPU tests that failed", wrong, 0, False))
        wanted.append(Requirement("GPU tests that were not run", left, 0, False))
    alone = [each for part in found.from_host if part.batch == 1 for each in part.rounds]
    wanted += [
        Requirement(
            "host -> GPU: bytes a second / pinned copies",
            _median([each.copy_share for each in alone]),
            SHARE_BOUND,
            True,
        ),
        Requirement(
            "host -> GPU: share of a sweep without a copy",
            _median([each.idle for each in alone]),
            IDLE_BOUND,
            False,
        ),
        Requirement(
            "NVMe -> GPU: bytes a second / the drive",
            _median([each.read_share for each in found.from_drive]),
            SHARE_BOUND,
            True,
        ),
    ]
    for batch in found.decode_batches:
        each = next((part for part in found.from_host if part.batch == batch), None)
        bound = found.plans.get(batch)
        ratio = each.seconds_a_token / bound.seconds if each and bound else None
        wanted.append(Requirement(f"decode, batch {batch}: s a token / planner's", ratio, PLAN_BOUND, False))
    best = found.best
    name = f"prefill, batch {best.batch}" if best else "prefill"
    share = found.share_of_peak(best) if best and found.peak_flops else None
    wanted.append(Requirement(f"{name}: flop a second / matmul peak", share, PEAK_BOUND, True))
    wanted += _memory(found.memory)
    stress = found.stress
    sweeps, different = (stress.sweeps, stress.different) if stress else (None, None)
    return [
        *wanted,
        Requirement("stress: sweeps with recycled memory poisoned", sweeps, found.sweeps_wanted, True),
        Requirement("stress: sweeps with other logits", different, 0, False),
    ]


def _memory(memory: Memory | None) -> list[Requirement]:
    """By the runtime's count in any case, by what else the driver tells where it does."""
    name = "peak device memory by the driver / budget"
    if memory is None:
        return [Requirement(name, None, 1, False)]
    counts = [
        (name, memory.peak),
        ("peak device memory by NVML / budget", memory.nvml),
        ("device memory by the driver's list of processes / budget", memory.listed),
    ]
    return [
        Requirement(name, nbytes / memory.budget, 1, False) for name, nbytes in counts if nbytes is not None
    ]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def decode_table(found: Findings) -> str:
    """Decoding from host memory at each batch, and from the drive."""
    rows = [
        [
            f"host memory, batch {each.batch}",
            *_rates(each.rounds, [one.copied / one.seconds for one in each.rounds]),
            Spread.of([one.idle * 100 for one in each.rounds]).text(),
            *(_planned(bounds.get(each.batch)) for bounds in (found.plans, found.plain)),
        ]
        for each in found.from_host
    ]
    if found.from_drive:
        mine = found.from_drive
        idle = Spread.of([one.idle * 100 for one in mine]).text()
        rows.append(["drive, batch 1", *_rates(mine, [one.read / one.seconds for one in mine]), idle, "", ""])
    header = [
        "from",
        "s a token",
        "GB/s",
        "plain copies, or the drive, GB/s",
        "% without a copy",
        "planner's s",
        "its s with plain rates",
    ]
    return table(header, rows) if rows else ""


def _planned(bound: Bound | None) -> str:
    return f"{bound.seconds:.3f} ({bound.bottleneck})" if bound else ""


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


def table_of_tests(found: Findings) -> str:
    """The tests, process by process, and all together."""
    if not found.tests:
        return ""
    counts = [
        (each.name, each.passed, each.failed, each.skipped, each.not_run)
        for each in [*found.tests, _together(found.tests)]
    ]
    header = ["GPU tests", "passed", "failed", "skipped", "not run"]
    return table(header, [[name, *map(str, numbers)] for name, *numbers in counts])


def _together(tests: Sequence[Outcome]) -> Outcome:
    sums = [sum(getattr(each, name) for each in tests) for name in ("passed", "failed", "skipped", "not_run")]
    return Outcome("all", *sums)


def remarks(found: Findings) -> list[str]:
    """What is not in a table, a line each."""
    lines = [f"Peak of bf16 products: {found.peak_flops / TERA:.4g} TFLOPS."]
    if (best := found.best) is not None:
        lines.append(f"The fastest prefill is that of batch {best.batch}.")
    if (memory := found.memory) is not None:
        nvml = "not asked" if memory.nvml is None else f"{memory.nvml / GB:.3f} GB"
        listed = "it lists none here" if memory.listed is None else f"{memory.listed / GB:.3f} GB"
        lines.append(
            f"Device memory: budget {memory.budget / GB:.3f} GB, peak by the driver {memory.peak / GB:.3f} GB; "
            f"peak by NVML: {nvml}; by the driver's list of processes: {listed}."
        )
    if (stress := found.stress) is not None:
        lines.append(
            f"{stress.sweeps} sweeps with recycled memory poisoned: {stress.different} with other logits than "
            "in memory."
        )
    lines.append(f"Sanitizer: {found.sanitizer}.")
    if found.tests is None:
        lines.append("The GPU tests were left out.")
    lines += [f"Tests failed: {each.name}: {each.wrong}." for each in found.tests or () if each.wrong]
    lines += [f"Failed or left out: {text}." for text in found.failed]
    return lines
