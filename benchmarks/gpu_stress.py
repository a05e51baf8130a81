"""Sweeps of a small model whose recycled memory is poisoned: each has to give the logits of the model in memory.

    python -m benchmarks.gpu_stress CHECKPOINT --sweeps 1000

benchmarks.gpu does this in its own process, and calls this module for compute-sanitizer, where that is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import zinfer
from benchmarks import BenchmarkError
from benchmarks.gpu_card import Card, CudaCard, StagedCard
from benchmarks.gpu_figures import Stress
from benchmarks.gpu_runs import prompts
from benchmarks.report import main_of
from benchmarks.worker import weight_files

LENGTH = 8  # tokens
SHARE = 3  # of the model's bytes, which device and host have each: some stay there, the rest passes through
SANITIZED = 3  # sweeps
FOUND = 9  # the sanitizer's exit code for errors


def stress(card: Card, checkpoint: str, sweeps: int, left: Callable[[], float]) -> Stress:
    """Run `sweeps`, or as many as there are seconds `left` for."""
    with torch.no_grad():
        reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
        reference = reference.to(card.torch_device)
        ids = prompts(card, 1, LENGTH, reference.config.vocab_size)
        expected = reference(input_ids=ids).logits
    del reference
    card.clear()
    part = sum(os.path.getsize(path) for path in weight_files(checkpoint)) // SHARE
    processor = card.processor(poison=True)
    model = zinfer.run(
        checkpoint,
        device=processor,
        offload="nvme",
        max_memory={0: processor.overhead + part, "cpu": part},
        progress=False,
    )
    processor.limit(None)  # the budget made weights pass; whether so small a one holds is not asked here
    done = different = 0
    with model:
        while done < sweeps and left() > 0:
            different += not torch.equal(model(input_ids=ids).logits, expected)
            done += 1
    return Stress(done, different)


def sanitized(checkpoint: str, seconds: float) -> str:
    """What compute-sanitizer says of a few sweeps, in a process of their own, for so many seconds at most.

    Raises BenchmarkError where it finds something.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not there"
    command = [program, "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable]
    command += ["-m", "benchmarks.gpu_stress", checkpoint, "--sweeps", str(SANITIZED)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        return f"{SANITIZED} sweeps did not end within {seconds:.0f} s"
    if ended.returncode:
        tail = "\n".join((ended.stdout + ended.stderr).splitlines()[-40:])
        raise BenchmarkError(f"compute-sanitizer ended with exit code {ended.returncode}\n{tail}")
    return f"memcheck found nothing in {SANITIZED} sweeps"


def main(arguments: Sequence[str]) -> int:
    """0 when every sweep gave the same logits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stress")
    parser.add_argument("checkpoint")
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--staged", action="store_true", help="on the staged device, without a GPU")
    options = parser.parse_args(arguments)
    card = StagedCard() if options.staged else CudaCard()
    found = stress(card, options.checkpoint, options.sweeps, lambda: 1.0)
    sys.stdout.write(f"{found.sweeps} sweeps, {found.different} with other logits\n")
    return 1 if found.different else 0


if __name__ == "__main__":
    main_of(main)
