"""zinfer beside the tools one would otherwise pick, on one checkpoint larger than memory, in one run.

    python -m benchmarks.peers --folder PEERS
    python -m benchmarks.versus --checkpoint DIR --peers-folder PEERS

Each run is a process of its own in a memory cgroup of its own, from a cold page cache. Needs root.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from benchmarks import BenchmarkError
from benchmarks.bench import IN_MEMORY_FACTOR, Bench, Run, RunFailed, prompt_of
from benchmarks.cells import Cell, Found, plan, seconds_left
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import drive_of
from benchmarks.peers import TOOLS, Tool, python_of
from benchmarks.report import Result, Spread, conclude, cores, main_of
from benchmarks.versus_tables import (
    GB,
    cell_table,
    requirements,
    rounds_table,
    summary_table,
)
from benchmarks.worker import UNCOUNTED, Task, weight_files

HEADLINE = "3GiB:1"
CELLS = [f"{size}GiB:{batch}" for batch in (1, 32) for size in (1, 2, 3, 4)]
PROMPT_TOKENS = 16


@dataclass
class Versus:
    """One comparison: its options, and what has been found so far."""

    options: argparse.Namespace
    checkpoint: str
    scratch: str
    tools: list[str]
    bench: Bench
    cells: dict[Cell, Found]
    references: dict[int, Run] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    taken: dict[str, list[float]] = field(default_factory=dict)

    def task(self, tool: str, batch: int, counted: int) -> Task:
        """What a worker of `tool` does."""
        return Task(
            tool,
            self.checkpoint,
            prompt_of(PROMPT_TOKENS),
            counted + UNCOUNTED,
            cores(),
            batch=batch,
            python=python_of(TOOLS[tool], self.options.peers_folder),
            scratch=self.scratch,
            converted=self.converted.get(tool),
            probe_seconds=self.options.probe_seconds,
        )

    def prepare(self) -> None:
        """Find each tool's Python and write its copy of the weights; a tool without them is unusable."""
        for tool in (TOOLS[name] for name in self.tools):
            try:
                python = python_of(tool, self.options.peers_folder)
                if tool.converts:
                    self._convert(tool, python)
            except BenchmarkError as error:
                self.unusable[tool.name] = str(error)
                sys.stderr.write(f"{tool.name}: {error}\n")

    def _convert(self, tool: Tool, python: str) -> None:
        target = os.path.join(self.scratch, tool.name)
        os.mkdir(target)
        command = [python, "-m", "benchmarks.tools", tool.name, self.checkpoint, target]
        ended = run_sampled(command, anonymous_bytes)
        if ended.exit_code != 0:
            raise BenchmarkError(f"conversion failed: {(ended.tail.strip().splitlines() or ['?'])[-1]}")
        self.converted[tool.name] = target
        self.remarks.append(f"{tool.title} had its own copy of the weights written in {ended.seconds:.0f} s")
        sys.stderr.write(f"{tool.name}: converted in {ended.seconds:.0f} s\n")

    def run_in_memory(self, model_bytes: int) -> None:
        """The reference of each batch, without a limit, where the machine has room."""
        for batch in sorted({cell.batch for cell in self.cells}):
            if psutil.virtual_memory().available < IN_MEMORY_FACTOR * model_bytes:
                self.remarks.append("the model does not fit into this machine's memory")
                return
            counted = max(self.options.counted, self.options.other_counted)
            try:
                self.references[batch] = self.bench.run(self.task("memory", batch, counted), None)
            except RunFailed as error:
                self.remarks.append(f"in memory, batch {batch}: {error.reason}")

    def run_cells(self, rounds: dict[Cell, int], headline: Cell) -> None:
        """All limited runs. A tool that fails in a cell is told there, and not tried in it again."""
        steps = plan([*self.cells], self.tools, rounds)
        began = time.monotonic()
        for index, step in enumerate(steps):
            found = self.cells[step.cell]
            reason = self.unusable.get(step.tool) or found.failed.get(step.tool)
            if reason is not None:
                found.failed[step.tool] = reason
                continue
            left = seconds_left(steps[index:], self.taken)
            about = f", about {left / 60:.0f} min left" if left is not None else ""
            sys.stderr.write(
                f"[{(time.monotonic() - began) / 60:.1f} min{about}] {step.cell.name}, round "
                f"{step.number + 1} of {rounds[step.cell]}: {TOOLS[step.tool].title}\n"
            )
            counted = self.options.counted if step.cell == headline else self.options.other_counted
            started = time.monotonic()
            try:
                run = self.bench.run(self.task(step.tool, step.cell.batch, counted), step.cell.limit)
                found.runs.setdefault(step.tool, {})[step.number] = run
            except RunFailed as error:
                later = f"in round {step.number + 1}: " if step.number else ""
                found.failed[step.tool] = later + error.reason
                sys.stderr.write(f"{step.tool}: {error.reason}\n")
            self.taken.setdefault(step.tool, []).append(time.monotonic() - started)

    def versions(self) -> str:
        """The packages of each tool that ran, for the results file."""
        found = {tool: run for cell in self.cells.values() for tool in cell.runs for run in cell.of(tool)}
        lines = []
        for tool in self.tools:
            if tool in found and TOOLS[tool].installs:
                packages = found[tool].outcome.versions.items()
                lines.append(f"{TOOLS[tool].title}: " + ", ".join(f"{name} {at}" for name, at in packages))
        return "; ".join(lines)


def body(versus: Versus, headline: Found | None, model_bytes: int) -> str:
    """The results file's text and tables."""
    options, cells = versus.options, [*versus.cells.values()]
    conversions = f" Before the runs: {'; '.join(versus.remarks)}." if versus.remarks else ""
    versions = versus.versions()
    parts = [
        f"{model_bytes / GB:.2f} GB of weights, {PROMPT_TOKENS} prompt tokens a row, greedy, threads: {cores()}. "
        f"Counted tokens: {options.counted} in {headline.cell.name if headline else 'no cell'}, "
        f"{options.other_counted} elsewhere; rounds: {options.rounds} and {options.other_rounds}; a limit "
        "counts the page cache. Load and first token are counted from the loading call, after all imports. "
        f"{len(versus.bench.discarded)} runs were disturbed by other processes and repeated."
        f"{conversions}{f' Venvs: {versions}.' if versions else ''}",
        "## Seconds a token",
        summary_table(cells, versus.tools, "seconds_a_token", 2),
        "## Seconds to the first token, loading included",
        summary_table(cells, versus.tools, "first_seconds", 1),
    ]
    for found in cells:
        parts += [
            f"## {found.title}",
            cell_table(found, versus.tools, versus.references.get(found.cell.batch)),
        ]
        if found is headline:
            parts += ["Seconds a token, round by round:", rounds_table(found, versus.tools)]
    return "\n\n".join(parts)


def rounds_json(cells: Sequence[Found]) -> list[dict[str, Any]]:
    """Every run of every cell, as plain values."""
    return [
        {
            "cell": found.cell.name,
            "failed": found.failed,
            "runs": {
                tool: {str(number): asdict(run) for number, run in runs.items()}
                for tool, runs in found.runs.items()
            },
        }
        for found in cells
    ]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versus", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a safetensors checkpoint")
    parser.add_argument("--peers-folder", help="where python -m benchmarks.peers made the venvs")
    parser.add_argument(
        "--cells", nargs="+", default=CELLS, metavar="LIMIT:BATCH", help=f"default: {' '.join(CELLS)}"
    )
    parser.add_argument(
        "--headline",
        metavar="LIMIT:BATCH",
        help=f"the cell with --rounds and --counted; default: {HEADLINE} if it is one of the cells",
    )
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--rounds", type=int, default=5, help="of the headline cell")
    parser.add_argument("--other-rounds", type=int, default=1, help="of every other cell")
    parser.add_argument("--counted", type=int, default=5, help="counted tokens in the headline cell")
    parser.add_argument("--other-counted", type=int, default=3, help="counted tokens in every other cell")
    parser.add_argument("--run-seconds", type=float, default=240, help="a run that takes longer is stopped")
    parser.add_argument("--probe-seconds", type=float, default=1, help="how long each pause reads the drive")
    parser.add_argument(
        "--scratch",
        help="folder on the checkpoint's drive for the tools' own files, removed in the end; default: beside it",
    )
    parser.add_argument(
        "--keep-page-cache", action="store_true", help="start runs with the page cache as it is"
    )
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--repeats", type=int, default=1, help="times a disturbed run is repeated at most")
    parser.add_argument(
        "--patience", type=float, default=10, help="seconds to wait, before each run, for a quiet machine"
    )
    options = parser.parse_args(arguments)
    if min(options.rounds, options.other_rounds, options.counted, options.other_counted) < 1:
        parser.error("rounds and counted tokens are at least 1")
    if options.probe_seconds <= 0 or options.run_seconds <= 0:
        parser.error("--probe-seconds and --run-seconds are more than 0")
    if options.headline and options.headline not in options.cells:
        parser.error(f"--headline {options.headline} is not one of the --cells")
    if "zinfer" not in options.tools:
        parser.error("--tools must name zinfer: all others are compared with it")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when every requirement is met."""
    options = _parse(arguments)
    checkpoint = os.path.abspath(options.checkpoint)
    headline = Cell.parse(options.headline or HEADLINE)
    cells = {cell: Found(cell) for cell in map(Cell.parse, options.cells)}
    drive, load = drive_of(checkpoint), os.getloadavg()[0]
    model_bytes = sum(os.path.getsize(path) for path in weight_files(checkpoint))
    parent = options.scratch or os.path.dirname(checkpoint)
    bench = Bench(drive, options.keep_page_cache, options.patience, options.repeats, options.run_seconds)
    rounds = {cell: options.rounds if cell == headline else options.other_rounds for cell in cells}
    tools = list(dict.fromkeys(options.tools))
    with tempfile.TemporaryDirectory(prefix="zinfer-versus-", dir=parent) as scratch:
        versus = Versus(options, checkpoint, scratch, tools, bench, cells)
        versus.prepare()
        if "memory" in tools:
            versus.run_in_memory(model_bytes)
        versus.run_cells(rounds, headline)
    found = [*cells.values()]
    result = Result(
        name="versus",
        drive=drive,
        settings={**vars(options), "model_bytes": model_bytes, "threads": cores()},
        rounds=rounds_json(found),
        figures={
            "seconds_a_token": {
                each.cell.name: {
                    tool: Spread.of([run.seconds_a_token for run in each.of(tool)]) for tool in each.runs
                }
                for each in found
            },
            "in_memory": {str(batch): asdict(run) for batch, run in versus.references.items()},
            "discarded": [asdict(run) for run in bench.discarded],
        },
        requirements=requirements(found, cells.get(headline), tools, versus.references, model_bytes),
        body=body(versus, cells.get(headline), model_bytes),
        load_average=load,
    )
    return conclude(result, "benchmarks.versus", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
