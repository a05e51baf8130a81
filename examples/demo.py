"""The main job, start to finish: a 6.6-GB model generates text within 3 GiB, and the text is checked.

    python -m examples.demo [--shape llama-demo] [--folder demo-data] [--budget 3GiB] [--new-tokens 8]

1. Synthesise a Llama-shaped checkpoint with random weights (once; needs about 7 GB of disk).
2. Measure what the drive gives now, with plain direct reads.
3. `zinfer run` streams it under the budget, in a memory cgroup of that size where one can be made.
4. The same tokens from transformers, the model held in memory; with fewer layers where memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.cgroup import memory_group
from zinfer.aio.probe import measure_read_rate
from zinfer.planner.memory import free_memory, parse_size
from zinfer.synth import SHAPES, synthesise

PROMPT = "The weights of a large language model"
CUT_LAYERS = 2
IN_MEMORY = """
import json, sys, torch, transformers
folder, options = sys.argv[1], json.loads(sys.argv[2])
transformers.logging.set_verbosity_error()
config = options.pop("config")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **config).eval()
ids = torch.tensor([options.pop("ids")])
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
print(json.dumps(tokens[0, ids.shape[1]:].tolist()))
"""
STREAMED = IN_MEMORY.replace(
    "transformers.AutoModelForCausalLM.from_pretrained(folder, **config).eval()",
    "__import__('zinfer').run(folder, offload='nvme', **config)",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the tokens are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-demo", choices=sorted(SHAPES))
    parser.add_argument("--folder", default="demo-data", help="where the checkpoint is kept")
    parser.add_argument("--budget", default="3GiB")
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args(arguments)
    checkpoint = str(Path(options.folder, options.shape))

    say(f"1. A checkpoint in {checkpoint} ({options.shape}, random weights)")
    os.makedirs(options.folder, exist_ok=True)
    synthesise(options.shape, checkpoint)
    shards = sorted(glob(f"{checkpoint}/*.safetensors"))
    size = sum(os.path.getsize(shard) for shard in shards)
    print(f"   {size / 2**30:.2f} GiB in {len(shards)} shard(s)")

    say("2. What the drive gives now: plain direct reads into huge pages")
    before = measure_read_rate(shards, 2.0)
    print(
        f"   {before.bytes_per_second / 1e9:.2f} GB/s{'' if before.direct else ' (through the page cache)'}"
    )

    say(f"3. zinfer run, {options.budget} of memory")
    summary = stream(checkpoint, options.budget, options.new_tokens)
    after = measure_read_rate(shards, 2.0)
    show(summary, (before.bytes_per_second + after.bytes_per_second) / 2)

    say("4. The same tokens from the model held in memory?")
    return compare(checkpoint, size, summary)


def say(text: str) -> None:
    """A heading."""
    print(f"\n{text}", flush=True)


@contextmanager
def limited(budget: str) -> Iterator[list[str]]:
    """A command prefix that caps memory at `budget`, page cache included; empty where that is not permitted."""
    try:
        with memory_group(parse_size(budget)) as group:
            print(f"   in a memory cgroup of {budget}, page cache counted", flush=True)
            yield ["sh", "-c", f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"', "sh"]
            print(f"   the group held {group.max_usage / 2**30:.2f} GiB at most, {group.oom_kills} kills")
    except BenchmarkError as error:
        print(f"   without a memory cgroup ({error}); the budget is zinfer's own", flush=True)
        yield []


def stream(checkpoint: str, budget: str, new_tokens: int) -> dict:
    """Generate with `zinfer run`; returns what it wrote with --json."""
    with tempfile.TemporaryDirectory() as scratch, limited(budget) as prefix:
        out = os.path.join(scratch, "run.json")
        command = [sys.executable, "-m", "zinfer", "run", checkpoint, "--prompt", PROMPT, "--offload", "nvme"]
        command += ["--max-memory", f"cpu={budget}", "--max-new-tokens", str(new_tokens)]
        command += ["--min-new-tokens", str(new_tokens), "--progress", "--json", out]
        subprocess.run([*prefix, *command], check=True)
        with open(out, encoding="utf-8") as file:
            return json.load(file)


def show(summary: dict, drive: float) -> None:
    """The figures that matter, in a few lines."""
    report = summary["report"]
    print(f"   read         {report['bytes_read'] / 2**30:.2f} GiB, wrote {report['bytes_written']} bytes")
    print(f"   peak memory  {report['process_peak_bytes'] / 2**30:.2f} GiB of the whole process")
    if report["read_rate"] is not None:
        share = report["read_rate"] / drive
        print(
            f"   drive        {report['read_rate'] / 1e9:.2f} GB/s while decoding, {share:.0%} of plain reads"
        )
        print(f"   time         {report['sweep_seconds']:.2f} s a token")


def compare(checkpoint: str, size: int, summary: dict) -> int:
    """Generate the same in memory, or a cut-down depth both ways where memory is short."""
    ids, new_tokens = summary["prompt_ids"], len(summary["new_ids"])
    options = {"ids": ids, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    if free_memory() > 1.3 * size + 2**30:
        streamed = summary["new_ids"]
        config = {}
    else:
        print(f"   (memory is short: both ways with the first {CUT_LAYERS} layers only)")
        config = {"num_hidden_layers": CUT_LAYERS}
        streamed = tokens(STREAMED, checkpoint, options | {"config": config})
    in_memory = tokens(IN_MEMORY, checkpoint, options | {"config": config})
    print(f"   streamed   {streamed}\n   in memory  {in_memory}")
    print("   equal" if streamed == in_memory else "   NOT EQUAL: this is a bug, please report it")
    return 0 if streamed == in_memory else 1


def tokens(program: str, checkpoint: str, options: dict) -> list[int]:
    """Run `program` in a process of its own; the last line it prints is the token ids."""
    command = [sys.executable, "-c", program, checkpoint, json.dumps(options)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
