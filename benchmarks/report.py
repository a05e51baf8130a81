"""What every benchmark writes: the machine, medians with spread, requirements, a JSON and a Markdown file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import BenchmarkError
from benchmarks.drive import Drive

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("zinfer", "torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Spread:
    """Median and range of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises statistics.StatisticsError for no values at all."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """`1.53 (1.50-1.61)`, each figure divided by `scale`; one figure where all are the same."""
        median, low, high = (f"{value / scale:.{digits}f}" for value in (self.median, self.low, self.high))
        return median if low == high else f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Requirement:
    """A figure to reach: `measured` (the median over the rounds) against `bound`; None: it was not measured."""

    name: str
    measured: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the figure was reached; not where there is none."""
        if self.measured is None:
            return False
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True)
class Result:
    """One finished benchmark. `settings`, `rounds` and `figures` are plain values, for the JSON file.

    `drive`: None where the kernel does not tell which it is. `machine`: what else the figures depend on, as text.
    """

    name: str
    drive: Drive | None
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    figures: dict[str, Any]
    requirements: list[Requirement]
    body: str  # Markdown: tables and remarks
    load_average: float  # over the minute before the first round
    machine: dict[str, str] = field(default_factory=dict)


def hardware(result: Result) -> dict[str, str]:
    """What the figures depend on, as text."""
    return {
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "drive": result.drive.describe() if result.drive else "not told by the kernel",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        **result.machine,
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in sys.modules or package == "zinfer":  # run from a source tree
                found[package] = str(__import__(package).__version__)
    return found


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line that repeats this run."""
    return shlex.join(["python", "-m", module, *arguments])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def requirements_table(requirements: Sequence[Requirement]) -> str:
    """A Markdown table of `requirements`, figures to four digits."""
    rows = [
        [
            item.name,
            "not measured" if item.measured is None else f"{item.measured:.4g}",
            f"{'>=' if item.at_least else '<='} {item.bound:.4g}",
            _verdict(item),
        ]
        for item in requirements
    ]
    return table(["required", "measured", "bound", "met"], rows)


def markdown(result: Result, repeat: str) -> str:
    """The results file: hardware, versions, command, then the tables."""
    machine = [f"- {key}: {value}" for key, value in hardware(result).items()]
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            f"# {result.name}",
            "",
            *machine,
            f"- versions: {software}",
            f"- command: `{repeat}`",
            f"- load average of the minute before: {result.load_average:.2f}",
            "",
            result.body.strip(),
            "",
            requirements_table(result.requirements),
            "",
        ]
    )


def write(result: Result, repeat: str, json_path: str | None = None) -> tuple[Path, Path]:
    """Write the JSON and the Markdown file beside each other; returns their paths.

    Without `json_path` they go to `benchmarks/results/<name>-<drive>-<cores>core`, so that another run
    on the same kind of machine replaces them.
    """
    kind = result.drive.kind if result.drive else "drive"
    default = RESULTS / f"{result.name}-{kind}-{cores()}core.json"
    to_json = Path(json_path) if json_path else default
    to_json.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": result.name,
        "hardware": hardware(result),
        "versions": versions(),
        "command": repeat,
        "load_average": result.load_average,
        "settings": result.settings,
        "figures": result.figures,
        "requirements": [{**asdict(item), "met": item.met} for item in result.requirements],
        "rounds": result.rounds,
    }
    to_json.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    to_markdown = to_json.with_suffix(".md")
    to_markdown.write_text(markdown(result, repeat), encoding="utf-8")
    return to_json, to_markdown


def conclude(result: Result, module: str, arguments: Sequence[str], json_path: str | None) -> int:
    """Write the files, print the tables; exit code 1 when a requirement was missed."""
    paths = write(result, command(module, arguments), json_path)
    sys.stdout.write(f"{result.body.strip()}\n\n{requirements_table(result.requirements)}\n\n")
    sys.stdout.write("".join(f"written: {os.path.relpath(path)}\n" for path in paths))
    return 0 if all(item.met for item in result.requirements) else 1


def main_of(body: Callable[[Sequence[str]], int]) -> None:
    """Run `body` on the command line's arguments; a BenchmarkError becomes one line and exit code 2."""
    try:
        sys.exit(body(sys.argv[1:]))
    except BenchmarkError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _verdict(item: Requirement) -> str:
    return "yes" if item.met else "**no**"


def _plain(value: Any) -> Any:
    return asdict(value)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
