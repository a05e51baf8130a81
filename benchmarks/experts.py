"""A mixture of experts larger than its memory: zinfer reads those that are picked, beside accelerate's disk offload.

    zinfer synth qwen3-moe-demo DIR
    python -m benchmarks.experts --checkpoint DIR --limit 3GiB --rounds 5

Each run is a process of its own in a memory cgroup of its own. The routing is the model's own as it decodes greedily;
or that with ids that are drawn, as random weights repeat a token and route alike; or every layer's experts are drawn
afresh for each token. In the end a prompt of --prefill tokens is read, beside transformers with all in memory. Needs
root.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.bench import WINDOW_BYTES, Bench, Run, counting, prompt_of, tried_twice
from benchmarks.drive import drive_of
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of, table
from benchmarks.worker import UNCOUNTED, Task, weight_files
from zinfer.planner.memory import parse_size

GB = 1e9
ROUTINGS = ("own", "drawn ids", "uniform")
FASTER = {"own": 25.0, "uniform": 8.0}  # than accelerate, times
READ_BOUND = 1.02  # bytes over those of misses and of other weights that stream
PREFILL_BOUND = 1.15  # seconds over the drive's or the processor's, whichever is more
USE_BOUND = 0.85  # of the drive's rate, while a read is in flight
TIME_BOUND = 1.10  # seconds over bytes at the drive's rate, where the drive is the bottleneck
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Point:
    """zinfer and accelerate in one round, with one routing."""

    routing: str
    mine: Run
    other: Run
    model_bytes: int

    @property
    def faster(self) -> float:
        """accelerate's seconds a token over zinfer's."""
        return self.other.seconds_a_token / self.mine.seconds_a_token

    @property
    def rate(self) -> float:
        """Bytes a second that plain reads into as much memory as a window bring, mean over the pauses."""
        return sum(self.mine.outcome.memory_rates) / len(self.mine.outcome.memory_rates)

    @property
    def read(self) -> float:
        """Bytes read for a counted token, the mean."""
        decode = self.mine.outcome.decode
        assert decode is not None
        return decode.process.read / len(self.mine.outcome.tokens_each)

    @property
    def needed(self) -> float:
        """Bytes of the experts that were missing, and of the other weights that stream, for a counted token."""
        first, last = (counts or {} for counts in self.mine.outcome.counts[:2])
        tokens = len(self.mine.outcome.tokens_each)
        return (last["expert_bytes"] - first["expert_bytes"]) / tokens + last["sweep_bytes"]

    @property
    def misses(self) -> float:
        """Experts read for a counted token."""
        first, last = (counts or {} for counts in self.mine.outcome.counts[:2])
        return (last["misses"] - first["misses"]) / len(self.mine.outcome.tokens_each)

    @property
    def busy_share(self) -> float:
        """Rate while a read was in flight, over the drive's."""
        first, last = (counts or {} for counts in self.mine.outcome.counts[:2])
        decode = self.mine.outcome.decode
        assert decode is not None
        busy = last["busy_seconds"] - first["busy_seconds"]
        return decode.process.read / busy / self.rate if busy else 1.0

    @property
    def over_drive(self) -> float:
        """Seconds a token over its bytes at the drive's rate."""
        return self.mine.seconds_a_token * self.rate / self.read if self.read else 0.0

    @property
    def wasted(self) -> float:
        """Bytes read in vain, on a guess, for a counted token."""
        first, last = (counts or {} for counts in self.mine.outcome.counts[:2])
        return (last["guessed_bytes"] - first["guessed_bytes"]) / len(self.mine.outcome.tokens_each)

    @property
    def prefill(self) -> float:
        """Seconds of the long prompt."""
        assert self.mine.outcome.prefill is not None
        return self.mine.outcome.prefill.seconds

    @property
    def prefill_drive(self) -> float:
        """Seconds that the drive takes for what was not in memory when it began."""
        held = (self.mine.outcome.counts[2] or {})["held_bytes"]
        return max(0.0, self.model_bytes - held) / self.rate

    @property
    def disturbed(self) -> bool:
        """Whether neighbours falsified zinfer's times; accelerate's are too long for that to matter."""
        return self.mine.disturbed


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a mixture's safetensors checkpoint")
    parser.add_argument("--limit", default="3GiB", help="memory of each run's group, page cache included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counted", type=int, default=20, help="tokens that count of zinfer's")
    parser.add_argument("--other-counted", type=int, default=3, help="tokens that count of accelerate's")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--settling", type=int, default=10, help="zinfer's tokens before those that count")
    parser.add_argument(
        "--probe-seconds", type=float, default=0.5, help="how long each pause reads the drive"
    )
    parser.add_argument(
        "--scratch", help="folder for accelerate's files, removed in the end; default: beside the model"
    )
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--repeats", type=int, default=1, help="times a disturbed run is repeated at most")
    parser.add_argument("--patience", type=float, default=5, help="seconds to wait for a quiet machine")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.counted, options.other_counted) < 1:
        parser.error("--rounds, --counted and --other-counted are at least 1")
    return options


def _task(options: argparse.Namespace, tool: str, routing: str, scratch: str) -> Task:
    mine = tool == "zinfer"
    settling = options.settling if mine else 0
    counted = options.counted if mine else options.other_counted
    return Task(
        tool,
        os.path.abspath(options.checkpoint),
        prompt_of(PROMPT_TOKENS),
        counted + UNCOUNTED + settling,
        cores(),
        scratch=scratch,
        probe_seconds=options.probe_seconds if mine else 0,
        probe_bytes=WINDOW_BYTES if mine else 0,
        settling=settling,
        varied=routing != "own",
        uniform_routing=routing == "uniform",
        prefill=options.prefill if mine and routing == "own" else 0,
    )


def _in_memory(options: argparse.Namespace, scratch: str) -> Task:
    """The long prompt with all weights in memory."""
    task = _task(options, "memory", "own", scratch)
    return replace(task, prefill=options.prefill)


def counted(points: Sequence[Point]) -> list[Point]:
    """The undisturbed points, or all of them where those are too few."""
    return counting(points, lambda point: point.disturbed)


def requirements(
    points: dict[str, list[Point]], computing: Sequence[float], failed: Sequence[str]
) -> list[Requirement]:
    """What zinfer promises of mixtures, medians over the rounds; of the time, where the drive is the bottleneck."""
    found = []
    for routing, all_points in points.items():
        mine = counted(all_points)
        if routing in FASTER:
            found.append(
                Requirement(
                    f"{routing} routing: times faster a token than accelerate",
                    median(point.faster for point in mine),
                    FASTER[routing],
                    True,
                )
            )
        found += [
            Requirement(
                f"{routing} routing: bytes read / (experts missing + others that stream)",
                median(point.read / point.needed for point in mine) if mine[0].needed else 1.0,
                READ_BOUND,
                False,
            ),
        ]
    uniform = counted(points["uniform"]) if points.get("uniform") else []
    if uniform:
        found += [
            Requirement(
                "uniform routing: rate while a read is in flight / the drive's",
                median(point.busy_share for point in uniform),
                USE_BOUND,
                True,
            ),
            Requirement(
                "uniform routing: s a token / (bytes / the drive's rate)",
                median(point.over_drive for point in uniform),
                TIME_BOUND,
                False,
            ),
        ]
    own = counted(points["own"]) if points.get("own") else []
    if own and computing:
        found.append(
            Requirement(
                "long prompt: s / the most of (absent bytes / drive, s with all in memory)",
                median(p.prefill / max(p.prefill_drive, median(computing)) for p in own),
                PREFILL_BOUND,
                False,
            )
        )
    reports = [p.mine.outcome.report or {} for all_points in points.values() for p in all_points]
    written = max((report["bytes_written"] for report in reports), default=0)
    return [
        *found,
        Requirement("bytes written by zinfer", written, 0, False),
        Requirement("runs that failed twice", len(failed), 0, False),
    ]


def rows(points: dict[str, list[Point]]) -> str:
    """One row a routing."""
    header = [
        "routing",
        "zinfer, s a token",
        "accelerate",
        "times faster",
        "experts read a token",
        "GB read a token",
    ]
    header += [
        "over what was missing",
        "in vain, on guesses",
        "of the drive while reading",
        "s / (bytes / drive)",
        "drive, GB/s",
    ]
    header += ["first token, s", "accelerate's", "written, GB: zinfer, accelerate"]
    lines = []
    for routing, all_points in points.items():
        mine = counted(all_points)

        def spread(figure: Any, digits: int, mine: list[Point] = mine) -> str:
            return Spread.of([figure(point) for point in mine]).text(1, digits)

        lines.append(
            [
                routing,
                spread(lambda p: p.mine.seconds_a_token, 3),
                spread(lambda p: p.other.seconds_a_token, 2),
                spread(lambda p: p.faster, 1),
                spread(lambda p: p.misses, 1),
                spread(lambda p: p.read / GB, 3),
                spread(lambda p: p.read / p.needed if p.needed else 1.0, 4),
                spread(lambda p: p.wasted / GB, 3),
                spread(lambda p: p.busy_share, 3),
                spread(lambda p: p.over_drive, 3),
                spread(lambda p: p.rate / GB, 2),
                spread(lambda p: p.mine.first_seconds, 1),
                spread(lambda p: p.other.first_seconds, 1),
                f"{max(p.mine.written for p in mine) / GB:.1f}, {max(p.other.written for p in mine) / GB:.1f}",
            ]
        )
    return table(header, lines)


def _prefill_text(points: dict[str, list[Point]], computing: Sequence[float], tokens: int) -> str:
    own = counted(points["own"]) if points.get("own") else []
    if not own or not computing:
        return "The long prompt was not measured."
    mine, drive = Spread.of([p.prefill for p in own]), Spread.of([p.prefill_drive for p in own])
    return (
        f"A prompt of {tokens} tokens after those takes {mine.text()} s; the drive {drive.text()} s for what was not "
        f"in memory then, and transformers with all weights in memory {Spread.of(computing).text()} s."
    )


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when every requirement is met."""
    options = _parse(arguments)
    checkpoint, limit = os.path.abspath(options.checkpoint), parse_size(options.limit)
    drive, load = drive_of(checkpoint), os.getloadavg()[0]
    model_bytes = sum(os.path.getsize(path) for path in weight_files(checkpoint))
    bench = Bench(drive, True, options.patience, options.repeats)
    free = replace(bench, grouped=False)
    computing: list[float] = []
    points: dict[str, list[Point]] = {routing: [] for routing in ROUTINGS}
    failed: list[str] = []
    kept: list[dict[str, Any]] = []
    parent = options.scratch or os.path.dirname(checkpoint)
    with tempfile.TemporaryDirectory(prefix="zinfer-experts-", dir=parent) as scratch:
        for number in range(options.rounds):
            for routing in ROUTINGS if number % 2 == 0 else reversed(ROUTINGS):
                found: dict[str, Run] = {}
                tools = ("zinfer", "accelerate") if number % 2 == 0 else ("accelerate", "zinfer")
                for tool in tools:
                    task = _task(options, tool, routing, scratch)
                    label = f"{tool}, {routing} routing, round {number + 1}"
                    run = tried_twice(partial(bench.run, task, limit, label), label, failed)
                    if run is not None:
                        found[tool] = run
                if len(found) == len(tools):
                    points[routing].append(Point(routing, found["zinfer"], found["accelerate"], model_bytes))
                kept.append({"routing": routing, "runs": {tool: asdict(run) for tool, run in found.items()}})
            label = f"memory, round {number + 1}"
            reference = tried_twice(
                partial(free.run, _in_memory(options, scratch), None, label), label, failed
            )
            if reference is not None and reference.outcome.prefill is not None:
                computing.append(reference.outcome.prefill.seconds)
                kept.append({"routing": "own", "runs": {"memory": asdict(reference)}})
    points = {routing: mine for routing, mine in points.items() if mine}
    for text in failed:
        sys.stderr.write(f"failed twice: {text}\n")
    body = (
        f"{model_bytes / GB:.2f} GB of weights in a memory group of {options.limit}, page cache included; batch 1, "
        f"{PROMPT_TOKENS} prompt tokens, then {options.settling} and {options.counted} that count (accelerate: "
        f"{options.other_counted}), rounds: {options.rounds}, threads: {cores()}; medians and ranges. The drive is "
        f"measured before and after the counted tokens by plain direct reads into {WINDOW_BYTES >> 20} MiB.\n\n"
        f"{rows(points)}\n\n{_prefill_text(points, computing, options.prefill)}"
    )
    result = Result(
        name="experts",
        drive=drive,
        settings={**vars(options), "model_bytes": model_bytes, "threads": cores()},
        rounds=kept,
        figures={
            routing: {"seconds_a_token": Spread.of([p.mine.seconds_a_token for p in mine])}
            for routing, mine in points.items()
        },
        requirements=requirements(points, computing, failed),
        body=body,
        load_average=load,
    )
    return conclude(result, "benchmarks.experts", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
