"""zinfer against a peer on one checkpoint larger than its memory limit, interleaved in one run.

    python -m benchmarks.decode --checkpoint DIR --limit 3GiB --rounds 5 --new-tokens 8

Each run is a process of its own in a memory cgroup of its own, from a cold page cache. Needs root.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import psutil

from benchmarks import BenchmarkError, spans
from benchmarks.cgroup import Usage, run_limited
from benchmarks.drive import Drive, drive_of
from benchmarks.launch import Measured, run_quietly
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of, table
from benchmarks.worker import Task, read_outcome, weight_files
from zinfer.planner.memory import parse_size

PEERS = ("accelerate",)
IN_MEMORY_FACTOR = 1.5  # free memory over model bytes, for the reference in memory to be run at all
PROMPT_TOKENS = 16
PROMPT_IDS = 256  # prompt ids lie below this; any vocabulary has as many
GB = 1e9

SHARE_BOUND = 0.85
RESIDENT_BOUND = 1.8e9
RATIO_BOUND = 0.5
LOAD_BOUND = 1.1
QUIET_ROUNDS = 3  # fewer do not carry a median


@dataclass(frozen=True)
class Run(Measured):
    """One tool's process in one round: what it did, and what its group and the drive saw."""

    usage: Usage

    @property
    def read_rate(self) -> float:
        """Bytes a second that the process had the drive read over all counted tokens."""
        assert self.outcome.decode is not None
        return self.outcome.decode.process.read / self.outcome.decode.seconds

    @property
    def probe_rate(self) -> float:
        """Mean of the drive's plain direct read rate before and after the counted tokens."""
        return fmean(self.outcome.probe_rates)

    @property
    def share(self) -> float:
        """Read rate while decoding over the probe's."""
        return self.read_rate / self.probe_rate

    @property
    def first_read(self) -> int:
        """Bytes read from the loading call to the first token."""
        assert self.outcome.first_token is not None
        return self.outcome.first_token.process.read

    @property
    def written(self) -> int:
        """Bytes the process had written to a drive, for load and first token and for the counted ones."""
        assert self.outcome.first_token is not None and self.outcome.decode is not None
        return self.outcome.first_token.process.written + self.outcome.decode.process.written

    @property
    def prefill_seconds(self) -> float:
        """From the loaded model to the first token."""
        assert self.outcome.first_token is not None
        return self.outcome.first_token.seconds - self.outcome.load_seconds

    @property
    def foreign_read(self) -> int:
        """Bytes that others read from the drive in those spans."""
        return spans.foreign_read(self.watched)

    @property
    def foreign_cpu(self) -> float:
        """Cores that others kept busy in those spans: the most of them."""
        return spans.foreign_cpu(self.watched)


def run_one(task: Task, limit: int | None, drive: Drive, keep_page_cache: bool) -> Run:
    """Run one worker. Raises BenchmarkError, with the end of its output, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "outcome.json")
        usage = run_limited(task.command(out), limit, drive, keep_page_cache=keep_page_cache)
        if usage.exit_code != 0:
            killed = f", {usage.oom_kills} killed for memory" if usage.oom_kills else ""
            raise BenchmarkError(
                f"{task.tool} failed with exit code {usage.exit_code}{killed}:\n{usage.tail}"
            )
        return Run(read_outcome(out), usage)


@dataclass
class Bench:
    """Runs workers one after the other, each on a machine as quiet as `patience` and `repeats` allow."""

    limit: int
    drive: Drive
    keep_page_cache: bool
    patience: float
    repeats: int
    discarded: list[Run] = field(default_factory=list)

    def run(self, task: Task, *, limited: bool = True) -> Run:
        """One run in memory limited as the others, or not limited; see run_quietly."""
        return run_quietly(
            task.tool,
            lambda: run_one(task, self.limit if limited else None, self.drive, self.keep_page_cache),
            self.drive,
            self.patience,
            self.repeats,
            self.discarded,
        )


def interleave(tools: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round: forwards, backwards, forwards ... so that neither tool always goes first."""
    return [list(tools) if number % 2 == 0 else list(reversed(tools)) for number in range(rounds)]


def _quiet_count(runs: dict[str, list[Run]]) -> int:
    return sum(not any(run.disturbed for run in both) for both in zip(*runs.values(), strict=True))


def quiet_rounds(runs: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The rounds in which no run was disturbed, or all rounds where those are too few."""
    rounds = list(zip(*runs.values(), strict=True))
    quiet = [both for both in rounds if not any(run.disturbed for run in both)]
    chosen = quiet if len(quiet) >= min(QUIET_ROUNDS, len(rounds)) else rounds
    return {tool: [both[index] for both in chosen] for index, tool in enumerate(runs)}


def _quietness(runs: dict[str, list[Run]], discarded: Sequence[Run]) -> str:
    quiet, total = _quiet_count(runs), len(runs["zinfer"])
    counted = len(quiet_rounds(runs)["zinfer"])
    return (
        f"Other processes disturbed {total - quiet} of {total} rounds, and {len(discarded)} runs that were "
        f"discarded and repeated; the medians are over {counted} rounds."
    )


def tool_rows(runs: dict[str, list[Run]], model_bytes: int) -> str:
    """One row a figure, one column a tool; medians and ranges over the rounds."""
    figures: list[tuple[str, Callable[[Run], float | None], float, int]] = [
        ("seconds a token", lambda run: run.seconds_a_token, 1, 2),
        ("load, seconds", lambda run: run.outcome.load_seconds, 1, 2),
        ("first token after load, seconds", lambda run: run.prefill_seconds, 1, 2),
        ("read for load and first token, GB", lambda run: run.first_read, GB, 2),
        ("... over the model's bytes", lambda run: run.first_read / model_bytes, 1, 3),
        ("read a token, GB", lambda run: run.bytes_a_token, GB, 2),
        ("written, MB", lambda run: run.written, 1e6, 2),
        ("read rate while decoding, GB/s", lambda run: run.read_rate, GB, 2),
        ("drive's own rate in the pauses, GB/s", lambda run: run.probe_rate, GB, 2),
        ("share of the drive", lambda run: run.share, 1, 3),
        ("weights kept resident, GB", lambda run: run.outcome.resident, GB, 2),
        ("peak anonymous memory, GB", lambda run: run.usage.peak_anonymous, GB, 2),
        ("peak memory with page cache, GB", lambda run: run.usage.max_usage, GB, 2),
        ("read by other processes meanwhile, MB", lambda run: run.foreign_read, 1e6, 1),
        ("cores busy with other processes meanwhile", lambda run: run.foreign_cpu, 1, 2),
    ]
    rows = []
    for name, figure, scale, digits in figures:
        cells = []
        for mine in runs.values():
            values = [value for run in mine if (value := figure(run)) is not None]
            cells.append(Spread.of(values).text(scale, digits) if values else "")
        rows.append([name, *cells])
    return table(["median (range) over the rounds", *runs], rows)


def round_rows(runs: dict[str, list[Run]]) -> str:
    """One row a round: seconds a token of each tool, and the ratios within the round."""
    header = ["round", *(f"{tool}, s a token" for tool in runs)]
    header += [f"zinfer / {peer}" for peer in runs if peer != "zinfer"] + ["share of the drive", "disturbed"]
    rows = []
    for number, mine in enumerate(runs["zinfer"]):
        others = [runs[peer][number] for peer in runs if peer != "zinfer"]
        rows.append(
            [
                str(number + 1),
                *(f"{runs[tool][number].seconds_a_token:.3f}" for tool in runs),
                *(f"{mine.seconds_a_token / other.seconds_a_token:.3f}" for other in others),
                f"{mine.share:.3f}",
                ", ".join(tool for tool in runs if runs[tool][number].disturbed),
            ]
        )
    return table(header, rows)


def requirements(runs: dict[str, list[Run]], tokens_equal: bool, model_bytes: int) -> list[Requirement]:
    """What zinfer promises, as measured; the worst round counts where the promise is a ceiling."""
    mine = runs["zinfer"]
    found = [
        Requirement(
            "share of the drive while decoding",
            Spread.of([run.share for run in mine]).median,
            SHARE_BOUND,
            True,
        ),
        Requirement(
            "bytes kept resident",
            Spread.of([run.outcome.resident or 0 for run in mine]).low,
            RESIDENT_BOUND,
            True,
        ),
        Requirement(
            "bytes read for load and first token / model bytes",
            Spread.of([run.first_read / model_bytes for run in mine]).high,
            LOAD_BOUND,
            False,
        ),
        Requirement(
            "bytes zinfer wrote",
            max((run.outcome.report or {}).get("bytes_written", 0) for run in mine),
            0,
            False,
        ),
        Requirement("processes killed", sum(run.usage.oom_kills for run in mine), 0, False),
        Requirement("tokens equal in every run (1: yes)", float(tokens_equal), 1, True),
    ]
    for peer in (tool for tool in runs if tool != "zinfer"):
        ratios = [a.seconds_a_token / b.seconds_a_token for a, b in zip(mine, runs[peer], strict=True)]
        found.append(
            Requirement(f"seconds a token, zinfer / {peer}", Spread.of(ratios).median, RATIO_BOUND, False)
        )
    return found


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a safetensors checkpoint")
    parser.add_argument("--limit", default="3GiB", help="memory limit of each run, page cache counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--new-tokens", type=int, default=8, help="at least 3: one is prefill's, one is not counted"
    )
    parser.add_argument("--probe-seconds", type=float, default=1, help="how long each pause reads the drive")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--scratch", help="folder on the checkpoint's drive for a peer's files; default: beside it"
    )
    parser.add_argument(
        "--keep-page-cache", action="store_true", help="start runs with the page cache as it is"
    )
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--repeats", type=int, default=2, help="times a disturbed run is repeated at most")
    parser.add_argument(
        "--patience", type=float, default=30, help="seconds to wait, before each run, for a quiet machine"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.new_tokens < 3 or options.probe_seconds <= 0:
        parser.error("--rounds is at least 1, --new-tokens at least 3 and --probe-seconds more than 0")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when every requirement is met."""
    options = _parse(arguments)
    checkpoint = os.path.abspath(options.checkpoint)
    limit, drive, load = parse_size(options.limit), drive_of(checkpoint), os.getloadavg()[0]
    model_bytes = sum(os.path.getsize(path) for path in weight_files(checkpoint))
    scratch = options.scratch or os.path.dirname(checkpoint)
    prompt = [(37 * index + 11) % PROMPT_IDS for index in range(PROMPT_TOKENS)]

    def task(tool: str) -> Task:
        return Task(
            tool,
            checkpoint,
            prompt,
            options.new_tokens,
            cores(),
            scratch=scratch,
            probe_seconds=options.probe_seconds,
        )

    tools = ["zinfer", *options.peers]
    runs: dict[str, list[Run]] = {tool: [] for tool in tools}
    bench = Bench(limit, drive, options.keep_page_cache, options.patience, options.repeats)
    for order in interleave(tools, options.rounds):
        for tool in order:
            runs[tool].append(bench.run(task(tool)))
    reference = None
    if psutil.virtual_memory().available > IN_MEMORY_FACTOR * model_bytes:
        reference = bench.run(task("memory"), limited=False)
    everything = (
        [run for mine in runs.values() for run in mine] + bench.discarded + ([reference] if reference else [])
    )
    equal = len({tuple(run.outcome.tokens) for run in everything}) == 1
    counted = quiet_rounds(runs)
    required = requirements(counted, equal, model_bytes)
    required.append(
        Requirement("rounds on a quiet machine", _quiet_count(runs), min(QUIET_ROUNDS, options.rounds), True)
    )
    in_memory = (
        f"In memory, without a limit: {reference.seconds_a_token:.3f} s a token, once"
        f"{' and disturbed' if reference.disturbed else ''}."
        if reference
        else "Not run in memory: the model does not fit."
    )
    body = "\n\n".join(
        [
            f"{model_bytes / GB:.2f} GB of weights, batch 1, {PROMPT_TOKENS} prompt tokens, "
            f"{options.new_tokens} new ones of which the last {options.new_tokens - 2} count, "
            f"{options.limit} of memory with the page cache counted, rounds: {options.rounds}, threads: "
            f"{cores()}. {in_memory} The tokens of all runs are {'equal' if equal else 'NOT equal'}."
            f" {_quietness(runs, bench.discarded)}",
            tool_rows(counted, model_bytes),
            round_rows(runs),
        ]
    )
    result = Result(
        name="decode",
        drive=drive,
        settings={**vars(options), "model_bytes": model_bytes, "threads": cores(), "prompt": prompt},
        rounds=[{tool: asdict(runs[tool][number]) for tool in tools} for number in range(options.rounds)],
        figures={
            "seconds_a_token": {
                tool: Spread.of([run.seconds_a_token for run in mine]) for tool, mine in counted.items()
            },
            "share": Spread.of([run.share for run in counted["zinfer"]]),
            "discarded": [asdict(run) for run in bench.discarded],
            "tokens_equal": equal,
            "in_memory": asdict(reference) if reference else None,
        },
        requirements=required,
        body=body,
        load_average=load,
    )
    return conclude(result, "benchmarks.decode", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
