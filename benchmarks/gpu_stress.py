"""Sweeps of a small model whose recycled memory is poisoned: each has to give the logits of the model in memory.

    python -m benchmarks.gpu_stress CHECKPOINT --sweeps 1000

benchmarks.gpu does this in its own process, and calls this module for compute-sanitizer, where that is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import zinfer
from benchmarks import BenchmarkError
from benchmarks.child import run_sampled
from benchmarks.gpu_card import Card, CudaCard, StagedCard
from benchmarks.gpu_figures import Stress
from benchmarks.gpu_runs import prompts
from benchmarks.report import main_of
from benchmarks.worker import weight_files

LENGTH = 8  # tokens
SHARE = 3  # of the model's bytes, which device and host have each: some stay there, the rest passes through
SANITIZED = 3  # sweeps
FOUND = 9  # the sanitizer's exit code for errors
INVALID = "= Invalid "  # how it begins to tell of an access: `========= Invalid __global__ read of size 4`
OTHER = "Other logits"  # how this program tells of them
TAIL = 2000  # characters


def stress(card: Card, checkpoint: str, sweeps: int, left: Callable[[], float]) -> Stress:
    """Run `sweeps`, or as many as there are seconds `left` for."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # before cuBLAS is used: the same bits each time
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

    Raises BenchmarkError where it finds an access that is wrong, or a sweep with other logits. That it does not work
    here, as in many a container, is no finding.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not there"
    # Calls of the CUDA runtime that fail are torch's own trials, which it expects to fail.
    command = [program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu_stress", checkpoint, "--sweeps", str(SANITIZED)]
    ended = run_sampled(command, lambda _: 0, seconds=max(seconds, 1))
    if INVALID in ended.tail or OTHER in ended.tail:
        raise BenchmarkError(f"compute-sanitizer found something: {ended.tail[-TAIL:]}")
    if ended.exit_code == 0:
        return f"memcheck found nothing in {SANITIZED} sweeps"
    if ended.seconds >= seconds:
        return f"{SANITIZED} sweeps did not end within {seconds:.0f} s"
    last = (ended.tail.strip().splitlines() or ["nothing was printed"])[-1]
    return f"compute-sanitizer does not work here: exit code {ended.exit_code}: {last}"


def main(arguments: Sequence[str]) -> int:
    """0 when every sweep gave the same logits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stress")
    parser.add_argument("checkpoint")
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--staged", action="store_true", help="on the staged device, without a GPU")
    options = parser.parse_args(arguments)
    card = StagedCard() if options.staged else CudaCard()
    found = stress(card, options.checkpoint, options.sweeps, lambda: 1.0)
    if found.different:
        sys.stdout.write(f"{OTHER} in {found.different} of {found.sweeps} sweeps\n")
    return 1 if found.different else 0


if __name__ == "__main__":
    main_of(main)
