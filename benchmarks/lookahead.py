"""Reading ahead what the next layer's router names: seconds a token with it and without, on several checkpoints.

    zinfer synth qwen3-moe-demo DIR-SKEW --layers 8 --router-skew none|mild|strong
    python -m benchmarks.lookahead --checkpoints DIR-none DIR-mild DIR-strong

One process for each checkpoint. Tokens are drawn, and decoded in blocks that take turns with and without look-ahead on
the same loaded model, so that both meet the same cache and the same drive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.drive import drive_of
from benchmarks.report import Requirement, Result, Spread, conclude, cores, main_of, table
from benchmarks.worker import vocabulary_of, weight_files

WORSE = 1.02  # times the seconds without
GB = 1e9


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lookahead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--checkpoints", nargs="+", required=True, help="folders of mixtures of experts")
    parser.add_argument("--share", type=float, default=0.3, help="of the model's bytes, the budget")
    parser.add_argument("--rounds", type=int, default=9, help="blocks with look-ahead, and without")
    parser.add_argument("--block", type=int, default=8, help="tokens of a block")
    parser.add_argument("--settling", type=int, default=24, help="tokens before the first block")
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    parser.add_argument("--decode", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.rounds, options.block) < 1 or not 0 < options.share <= 1:
        parser.error("--rounds and --block are at least 1, --share is above 0 and at most 1")
    return options


def decode(checkpoint: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a token of each block, with look-ahead and without, and what guesses were worth."""
    import torch

    import zinfer

    torch.set_num_threads(cores())
    nbytes = sum(os.path.getsize(path) for path in weight_files(checkpoint))
    dice, ids_below = random.Random(0), vocabulary_of(checkpoint)
    blocks: dict[str, list[float]] = {"on": [], "off": []}
    with zinfer.run(
        checkpoint, offload="nvme", device="cpu", max_memory={"cpu": round(options.share * nbytes)}
    ) as model:
        cache = model.zinfer._streaming.host_experts
        if cache is None:
            raise BenchmarkError(f"{checkpoint}: no experts that are read one by one")
        past: Any = None
        ids = torch.tensor([[dice.randrange(ids_below) for _ in range(4)]])

        def tokens(count: int) -> float:
            nonlocal past, ids
            started = time.perf_counter()
            with torch.no_grad():
                for _ in range(count):
                    past = model(input_ids=ids, past_key_values=past, use_cache=True).past_key_values
                    ids = torch.tensor([[dice.randrange(ids_below)]])
            return (time.perf_counter() - started) / count

        tokens(options.settling)
        for number in range(options.rounds):
            for mode in ("on", "off") if number % 2 == 0 else ("off", "on"):
                cache.looks_ahead = mode == "on"
                tokens(1)  # what was guessed in the other mode has been used
                blocks[mode].append(tokens(options.block))
        figures = model.zinfer.report().as_dict()["experts"]
    return {"blocks": blocks, "experts": figures}


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when look-ahead is nowhere worse."""
    options = _parse(arguments)
    if options.decode:
        sys.stdout.write(json.dumps(decode(options.decode, options)))
        return 0
    drive, load = drive_of(options.checkpoints[0]), os.getloadavg()[0]
    rounds, lines, requirements = [], [], []
    for checkpoint in options.checkpoints:
        own = [f"--{name}={getattr(options, name)}" for name in ("share", "rounds", "block", "settling")]
        command = [sys.executable, "-m", "benchmarks.lookahead", "--checkpoints", checkpoint, *own]
        done = subprocess.run([*command, "--decode", checkpoint], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise BenchmarkError(f"{checkpoint}: the process that decodes ended with {done.returncode}")
        found = json.loads(done.stdout)
        name = os.path.basename(os.path.normpath(checkpoint))
        on, off = found["blocks"]["on"], found["blocks"]["off"]
        ratio = Spread.of([a / b for a, b in zip(on, off, strict=True)])
        figures = found["experts"]
        right = figures["right_share"]
        lines.append(
            [
                name,
                Spread.of(on).text(1, 3),
                Spread.of(off).text(1, 3),
                ratio.text(1, 3),
                "-" if right is None else f"{100 * right:.0f} %",
                "yes" if figures["looks_ahead"] or figures["foreseen"] else "no",
                f"{100 * figures['hits'] / (figures['hits'] + figures['misses']):.0f} %",
                f"{figures['guessed_bytes'] / max(1, figures['read_bytes']):.2f}",
            ]
        )
        rounds.append({"checkpoint": name, **found})
        requirements.append(Requirement(f"{name}: s a token with / without", ratio.median, WORSE, False))
        sys.stderr.write(f"{name}: {ratio.text(1, 3)}\n")
    header = [
        "checkpoint",
        "s a token with look-ahead",
        "without",
        "with / without",
        "guesses right",
        "acted on",
    ]
    header += ["picked experts that were there", "of bytes read, in vain"]
    result = Result(
        name="lookahead",
        drive=drive,
        settings={key: value for key, value in vars(options).items() if key != "decode"}
        | {"checkpoints": [os.path.basename(os.path.normpath(folder)) for folder in options.checkpoints]},
        rounds=rounds,
        figures={},
        requirements=requirements,
        body=(
            f"Batch 1, ids drawn, a budget of {100 * options.share:.0f} % of the model's bytes; {options.rounds} "
            f"blocks of {options.block} tokens each way, in turns on one loaded model; medians and ranges, the ratio "
            f"block by block.\n\n{table(header, lines)}"
        ),
        load_average=load,
    )
    return conclude(result, "benchmarks.lookahead", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
