"""Peak memory of a shallow and a deep model of one width at one budget: depth must not show.

    python -m benchmarks.depth --folder DIR --budget 1GiB --layers 12 48 --rounds 5

Synthesises the models under --folder where they are not there yet. Needs no root.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from transformers import LlamaConfig

from benchmarks import BenchmarkError
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.drive import drive_of
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of, table
from benchmarks.worker import Outcome, Task, read_outcome, weight_files
from zinfer.planner.memory import parse_size
from zinfer.synth import synthesise

HEAD_SIZE = 64
VOCABULARY = 32000
NEW_TOKENS = 4
PROMPT = list(range(1, 17))
DIFFERENCE_BOUND = 0.05
ACCOUNT = ("planned_resident_bytes", "window_bytes", "small_bytes", "bounce_bytes", "conversion_bytes")
GB = 1e9


@dataclass(frozen=True)
class Peak:
    """One run: its peak anonymous memory as sampled from outside, and what it told about itself. In bytes."""

    anonymous: int
    outcome: Outcome

    @property
    def account(self) -> int:
        """The sum of what zinfer planned to allocate."""
        report = self.outcome.report or {}
        return sum(report[name] for name in ACCOUNT)


def make_model(folder: str, hidden: int, layers: int, vocabulary: int) -> str:
    """The checkpoint of a Llama-shaped model of this size under `folder`, made once; its path."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="bfloat16",
    )
    return synthesise(config, os.path.join(folder, f"llama-{hidden}x{layers}"), progress=sys.stderr.isatty())


def run_one(checkpoint: str, budget: int) -> Peak:
    """Decode a few tokens in a process of its own. Raises BenchmarkError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "outcome.json")
        task = Task("zinfer", checkpoint, PROMPT, NEW_TOKENS, cores(), max_memory=budget, probe_seconds=0)
        ended = run_sampled(task.command(out), anonymous_bytes)
        if ended.exit_code != 0:
            raise BenchmarkError(f"{checkpoint} failed with exit code {ended.exit_code}:\n{ended.tail}")
        return Peak(ended.peak, read_outcome(out))


def difference(shallow: Sequence[float], deep: Sequence[float]) -> float:
    """Median over the rounds of |deep - shallow| / shallow."""
    return Spread.of([abs(b - a) / a for a, b in zip(shallow, deep, strict=True)]).median


FIGURES: dict[str, Callable[[Peak], float]] = {
    "peak anonymous memory": lambda peak: peak.anonymous,
    "peak resident memory (VmHWM)": lambda peak: peak.outcome.process_peak,
    "zinfer's account": lambda peak: peak.account,
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", required=True, help="where the models are, or are made (some 7 GB)")
    parser.add_argument("--budget", default="1GiB", help="zinfer's max_memory; less than the shallow model")
    parser.add_argument("--layers", nargs=2, type=int, default=[12, 48], metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--hidden", type=int, default=2048, help="width; a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.hidden % HEAD_SIZE:
        parser.error(f"--rounds is at least 1 and --hidden a multiple of {HEAD_SIZE}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when the peaks differ by less than 5 %."""
    options = _parse(arguments)
    budget, load = parse_size(options.budget), os.getloadavg()[0]
    models = [
        make_model(options.folder, options.hidden, layers, options.vocabulary) for layers in options.layers
    ]
    sizes = [sum(os.path.getsize(path) for path in weight_files(model)) for model in models]
    if sizes[0] < budget:
        raise BenchmarkError(
            f"the shallow model has {sizes[0]} bytes, the budget is {budget}: nothing would stream"
        )
    peaks: list[list[Peak]] = [[], []]
    for number in range(options.rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            peaks[index].append(run_one(models[index], budget))
    values = {name: [[figure(peak) for peak in side] for side in peaks] for name, figure in FIGURES.items()}
    rows = [
        [name, *(Spread.of(side).text(GB, 3) for side in sides), f"{difference(*sides):.2%}"]
        for name, sides in values.items()
    ]
    header = ["GB, median (range)", *(f"{layers} layers" for layers in options.layers), "difference"]
    body = (
        f"Models of width {options.hidden}: {sizes[0] / GB:.2f} GB and {sizes[1] / GB:.2f} GB of weights, "
        f"batch 1, {len(PROMPT)} prompt and {NEW_TOKENS} new tokens, max_memory {options.budget}, rounds: "
        f"{options.rounds}.\n\n" + table(header, rows)
    )
    result = Result(
        name="depth",
        drive=drive_of(options.folder),
        settings={**vars(options), "model_bytes": sizes, "threads": cores()},
        rounds=[{"shallow": asdict(a), "deep": asdict(b)} for a, b in zip(*peaks, strict=True)],
        figures={name: [Spread.of(side) for side in sides] for name, sides in values.items()},
        requirements=[
            Requirement(f"difference in {name}", difference(*sides), DIFFERENCE_BOUND, False)
            for name, sides in values.items()
        ],
        body=body,
        load_average=load,
    )
    return conclude(result, "benchmarks.depth", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
