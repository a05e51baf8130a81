"""`zinfer synth`: write a checkpoint with random weights, to try a model's size before downloading it."""

from __future__ import annotations

import argparse
import os
import sys

from zinfer.errors import OptionError
from zinfer.planner.memory import parse_size

NAME = "synth"
SUMMARY = "write a checkpoint of any config with seeded random weights"
DESCRIPTION = """\
Write a checkpoint of any Hugging Face config with seeded random weights: sharded like the hub's, with a
byte-level tokenizer, at the drive's speed and in constant memory. OUT that holds it already is kept."""
EPILOG = """\
examples:
  zinfer synth --list
  zinfer synth llama-demo ./llama-demo
  zinfer synth llama-3.1-70b /mnt/nvme/llama-70b-8-layers --layers 8
  zinfer synth qwen3-moe-demo ./moe-skewed --router-skew strong
  zinfer synth ./config.json ./out --dtype float16 --seed 7 --shard-size 2GB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a built-in shape (--list), a config.json, or a folder with one",
    )
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="folder to write; absent, empty, or the same checkpoint"
    )
    parser.add_argument("--list", action="store_true", help="print the built-in shapes and their sizes")
    parser.add_argument("--seed", type=int, metavar="N", help="other weights for another N; default: 0")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: the config's, else bfloat16")
    parser.add_argument("--layers", type=int, metavar="N", help="this many layers instead of the config's")
    parser.add_argument(
        "--router-skew",
        metavar="HOW",
        help="none, mild or strong: how much a mixture's routers favour some experts; default: none",
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="most bytes in one file; default: 5GB")


def main(arguments: argparse.Namespace) -> int:
    """Carry out `zinfer synth`; returns 0. Raises the errors of zinfer.synth.synthesise."""
    options = {
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "layers": arguments.layers,
        "router_skew": arguments.router_skew,
        "shard_bytes": None if arguments.shard_size is None else parse_size(arguments.shard_size),
    }
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.list:
        if arguments.config is not None or given:
            raise OptionError("--list prints the built-in shapes and takes nothing else")
        sys.stdout.write(shapes_table())
        return 0
    if arguments.config is None or arguments.out is None:
        raise OptionError("CONFIG and OUT are required; `zinfer synth --list` prints the built-in shapes")
    from zinfer.synth import synthesise

    out = synthesise(arguments.config, arguments.out, progress=sys.stderr.isatty(), **given)
    nbytes = sum(entry.stat().st_size for entry in os.scandir(out) if entry.name.endswith(".safetensors"))
    sys.stderr.write(f"{out}: {nbytes / 1e9:.2f} GB of weights\n")
    return 0


def shapes_table() -> str:
    """One line a built-in shape: name, architecture, parameters, bytes in its own dtype."""
    import torch

    from zinfer.synth.inventory import model_class
    from zinfer.synth.shapes import SHAPES, resolve_config

    lines = [f"{'shape':<16} {'architecture':<22} {'parameters':>16} {'bytes':>17}"]
    for name in SHAPES:
        config = resolve_config(name)
        cls = model_class(config)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
        itemsize = getattr(torch, str(config.dtype or "bfloat16").removeprefix("torch.")).itemsize
        lines.append(f"{name:<16} {cls.__name__:<22} {count:>16,} {count * itemsize:>17,}")
    return "\n".join(lines) + "\n"
