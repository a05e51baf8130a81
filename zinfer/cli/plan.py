"""`zinfer plan`: where a model's weights would live, and how fast it would generate."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from zinfer.cli.options import check_memory, memory, positive
from zinfer.cli.terminal import Terminal, logging_to

NAME = "plan"
SUMMARY = "predict how fast a model would generate, and where its weights would live"
DESCRIPTION = """\
Predict seconds a token, tokens a second, the first token's time, the bytes on each tier and the bottleneck, for a
model on this machine or another. The model is run on tensors without data: no weight is read, none is needed."""
EPILOG = """\
examples:
  zinfer plan ./llama-demo --max-memory cpu=3GiB
  zinfer plan llama-3.1-70b --hardware a6000 --batch 96 --prompt 512 --new-tokens 32
  zinfer plan Qwen/Qwen3-32B --hardware my-machine.json --max-memory cpu=64GiB --max-memory 0=20GiB --json

`--hardware this` measures drive, memory and arithmetic once, in a few seconds, says so, and keeps the figures;
`aio_bench DIR` measures the drive with more care. docs/planner.md has the formula, and the fields of a FILE."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint's folder, a config.json, a hub id (only its config is fetched), or a built-in shape",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--hardware", default="this", metavar="NAME",
        help="a6000, rtx4090, h200, a JSON FILE, or this (default), the machine at hand",
    )  # fmt: skip
    machine.add_argument(
        "--device", metavar="DEVICE",
        help="where this machine would compute: cpu, cuda, cuda:1 ...; default: the GPU where there is one",
    )  # fmt: skip
    machine.add_argument(
        "--max-memory", action="append", type=memory, default=[], metavar="DEVICE=SIZE",
        help="ceiling for cpu (cpu=3GiB) or for the device (0=20GiB); default: what that machine has, or this one free",
    )  # fmt: skip
    machine.add_argument("--remeasure", action="store_true", help="measure this machine again")
    task = parser.add_argument_group("the task")
    task.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once; default: 1")
    task.add_argument(
        "--prompt", type=positive, default=512, metavar="N", help="tokens of each prompt; default: 512"
    )
    task.add_argument(
        "--new-tokens", type=positive, default=32, metavar="N", help="tokens to generate; default: 32"
    )
    task.add_argument("--dtype", default="auto", help="bfloat16, float32 ...; default: the checkpoint's")
    task.add_argument(
        "--offload", choices=("auto", "nvme", "cpu", "none"), default="nvme", help="as for zinfer run"
    )
    task.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="build the model with the code that the checkpoint's folder brings",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the plan as JSON, each weight's tier included"
    )


def main(arguments: argparse.Namespace) -> int:
    """Carry out `zinfer plan`; returns 0. Raises the errors of zinfer.plan and of wrong options."""
    check_memory(arguments.max_memory)
    import transformers

    import zinfer

    debug = getattr(arguments, "debug", False)
    if not debug:
        transformers.logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": True} if arguments.trust_remote_code else {}
    with logging_to(Terminal(), logging.DEBUG if debug else logging.INFO):
        found = zinfer.plan(
            arguments.model,
            hardware=arguments.hardware,
            device=arguments.device,
            max_memory=dict(arguments.max_memory) or None,
            batch=arguments.batch,
            prompt=arguments.prompt,
            new_tokens=arguments.new_tokens,
            offload=arguments.offload,
            dtype=arguments.dtype,
            remeasure=arguments.remeasure,
            **options,
        )
    sys.stdout.write(f"{json.dumps(found.as_dict(), indent=2) if arguments.json else found}\n")
    return 0
