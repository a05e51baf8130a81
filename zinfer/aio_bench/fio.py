"""fio beside us: the same file, block size, depth and engine, in turns, as a ratio."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinfer.aio_bench.measurement import Trial
from zinfer.aio_bench.memory import pool_of
from zinfer.aio_bench.settings import READ, Setting
from zinfer.aio_bench.target import Target
from zinfer.aio_bench.trial import run_trial
from zinfer.errors import OptionError, ZinferError

ENGINES = {"io_uring": "io_uring", "libaio": "libaio", "threads": "psync"}  # ours -> fio's
ROUNDS = 7
SECONDS = 2.0  # of one run; fio counts whole seconds
PATIENCE = 60.0  # seconds beyond which fio hangs
HUGE_PAGES = "mmaphuge"  # fio's name for buffers on huge pages, as ours are
PLAIN_PAGES = "mmap"


@dataclass(frozen=True)
class Comparison:
    """Ours over fio's, round by round; `ours` and `fio` are medians in bytes a second."""

    direction: str
    setting: Setting
    ours: float
    fio: float
    ratios: tuple[float, ...]  # of the rates
    our_cpu: float  # CPU seconds for 10^9 bytes, median
    fio_cpu: float
    huge_pages: bool  # whether fio's buffers were on huge pages too; only then is it a fair comparison

    @property
    def ratio(self) -> float:
        """The median of the rates' ratios."""
        return statistics.median(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        """Ratio of the median CPU seconds."""
        return self.our_cpu / self.fio_cpu if self.fio_cpu else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "direction": self.direction,
            "backend": self.setting.backend,
            "block_bytes": self.setting.block_bytes,
            "depth": self.setting.depth,
            "bytes_per_second": self.ours,
            "fio_bytes_per_second": self.fio,
            "ratio": self.ratio,
            "ratios": list(self.ratios),
            "cpu_seconds_per_gb": self.our_cpu,
            "fio_cpu_seconds_per_gb": self.fio_cpu,
            "fio_huge_pages": self.huge_pages,
        }


def require_fio() -> str:
    """fio's path. Raises OptionError where it is not installed."""
    path = shutil.which("fio")
    if path is None:
        raise OptionError("fio is not installed: apt-get install fio (dnf: fio), or leave out --fio")
    return path


def compare(
    target: Target,
    direction: str,
    settings: Sequence[Setting],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Each of `settings` against fio on `target`, in turns; who goes first changes from round to round.

    Raises OptionError without fio, ZinferError where fio fails, DriveError where a transfer of ours does.
    """
    fio = require_fio()
    comparisons = []
    for setting in settings:
        huge = free_huge_bytes() >= _fio_memory(setting)
        ours: list[Trial] = []
        theirs: list[Trial] = []
        with pool_of(setting.in_flight) as pool:
            for number in range(rounds):
                progress(f"{direction} through {setting.backend} and fio, round {number + 1}")
                rate = ours[-1].rate if ours else 1e9
                for mine in (True, False) if number % 2 == 0 else (False, True):
                    if mine:
                        ours.append(
                            run_trial(
                                [target], setting, direction, pool=pool, seconds=seconds, expected_rate=rate
                            )
                        )
                    else:
                        theirs.append(run_fio(fio, target, direction, setting, seconds, huge))
        comparisons.append(
            Comparison(
                direction,
                setting,
                statistics.median(trial.rate for trial in ours),
                statistics.median(trial.rate for trial in theirs),
                tuple(mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True)),
                statistics.median(trial.cpu_seconds / trial.nbytes * 1e9 for trial in ours),
                statistics.median(trial.cpu_seconds / trial.nbytes * 1e9 for trial in theirs),
                huge,
            )
        )
    return comparisons


def run_fio(fio: str, target: Target, direction: str, setting: Setting, seconds: float, huge: bool) -> Trial:
    """One run of fio. Raises ZinferError with what it said when it fails."""
    command = fio_command(fio, target, direction, setting, seconds, huge)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ZinferError(f"fio hangs: {' '.join(command)}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise ZinferError(f"fio failed ({done.returncode}): {said[-1]}; the command was: {' '.join(command)}")
    return parse_fio(done.stdout, direction)


def fio_command(
    fio: str, target: Target, direction: str, setting: Setting, seconds: float, huge: bool
) -> list[str]:
    """The command that does what run_trial does: sequential, O_DIRECT, round and round the same memory."""
    jobs = setting.threads
    share = target.size // jobs // setting.block_bytes * setting.block_bytes
    return [
        fio,
        "--name=aio_bench",
        "--filename=" + target.path.replace(":", r"\:"),
        f"--rw={direction}",
        f"--ioengine={ENGINES[setting.backend]}",
        f"--bs={setting.block_bytes}",
        f"--iodepth={1 if setting.backend == 'threads' else setting.depth}",
        *([f"--numjobs={jobs}", "--group_reporting", f"--offset_increment={share}"] if jobs > 1 else []),
        f"--size={share}",
        "--direct=1",
        f"--iomem={HUGE_PAGES if huge else PLAIN_PAGES}",
        "--time_based",
        f"--runtime={max(1, round(seconds))}",
        "--overwrite=1",
        "--allow_file_create=0",
        *(["--readonly"] if direction == READ else []),
        "--output-format=json",
    ]


def parse_fio(output: str, direction: str) -> Trial:
    """What fio's JSON says. Raises ZinferError when it is none, or no byte was moved."""
    try:
        job = json.loads(output[output.index("{") :])["jobs"][0]
        side = job[direction]
        nbytes, seconds = int(side["io_bytes"]), float(side["runtime"]) / 1e3
        cpu = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100 * float(job["job_runtime"]) / 1e3
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ZinferError(f"fio's answer is not understood ({type(error).__name__}: {error})") from error
    if nbytes <= 0 or seconds <= 0:
        raise ZinferError("fio moved no byte")
    return Trial(nbytes, seconds, cpu, {})


def free_huge_bytes(meminfo: str | None = None) -> int:
    """Bytes of reserved huge pages that nobody uses, from the text of /proc/meminfo."""
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    fields = dict(re.findall(r"^(HugePages_Free|Hugepagesize):\s+(\d+)", text, re.MULTILINE))
    return int(fields.get("HugePages_Free", 0)) * int(fields.get("Hugepagesize", 0)) * 1024


def _fio_memory(setting: Setting) -> int:
    """Bytes of huge pages that fio takes: each job rounds its buffers up, and has some room to align them."""
    huge = 2 << 20
    return setting.threads * (-(-setting.in_flight // setting.threads // huge) + 1) * huge
