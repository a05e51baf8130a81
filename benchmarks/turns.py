"""One model in memory, a token with zinfer and a token without in turns: what zinfer's Python costs.

Both models stand on the same tensors, so that addresses, pages and kernels are the same and nothing but zinfer
differs. zinfer streams from the drive as ever, within a budget that holds every weight. sweep.py starts this in a
process of its own and reads its JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.bound import Overhead
from benchmarks.child import anonymous_bytes, run_sampled
from benchmarks.worker import weight_files

ROOM, ROOM_BYTES = 1.1, 256 << 20  # a budget that holds everything, from the weights' bytes
SETTLE_SECONDS = 120


@dataclass(frozen=True)
class Turns:
    """What to measure: `pairs` of tokens at batch 1 after `prompt`."""

    checkpoint: str
    prompt: list[int]
    pairs: int
    threads: int


def measure(task: Turns) -> Overhead:
    """Take the turns, in this process."""
    import torch
    import transformers

    import zinfer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    mine = zinfer.run(task.checkpoint, offload="nvme", max_memory={"cpu": roomy(task.checkpoint)})
    with torch.no_grad():
        settle(mine, task.prompt)
        plain = on_the_same_tensors(mine)
        steps = [_stepper(mine, task.prompt), _stepper(plain, task.prompt)]
        seconds: list[list[float]] = [[], []]
        tokens = [[step()] for step in steps]
        for number in range(task.pairs):
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                started = time.perf_counter()
                tokens[index].append(steps[index]())
                seconds[index].append(time.perf_counter() - started)
    mine.zinfer.close()
    return Overhead(seconds[0], seconds[1], tokens[0] == tokens[1])


def roomy(checkpoint: str) -> int:
    """A budget that holds all weights of `checkpoint`, buffers and a short cache too."""
    return int(ROOM * sum(os.path.getsize(path) for path in weight_files(checkpoint))) + ROOM_BYTES


def settle(model: Any, prompt: Sequence[int]) -> None:
    """Run passes until every weight that operators ask for in full is resident: the first ones load them.

    Raises BenchmarkError where that does not happen.
    """
    import torch

    deadline = time.monotonic() + SETTLE_SECONDS
    while streamed := streamed_weights(model):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{len(streamed)} weights still stream: is there memory for all of them?")
        model(input_ids=torch.tensor([list(prompt)]), use_cache=False)


def streamed_weights(model: Any) -> list[str]:
    """Names of the weights that stream, but for tables of which operators look up rows."""
    from torch import nn

    from zinfer.weights.parameter import StreamedParameter

    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    return [
        name
        for name, weight in model.named_parameters()
        if isinstance(weight, StreamedParameter) and id(weight) not in tables
    ]


def on_the_same_tensors(model: Any) -> Any:
    """The plain transformers model on the resident tensors of `model`, and on copies of its streamed tables.

    Raises BenchmarkError where transformers would copy one.
    """
    from zinfer.weights.parameter import StreamedParameter

    state = {
        name: tensor.clone().detach() if isinstance(tensor, StreamedParameter) else tensor.data
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    plain = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype="auto").eval()
    copied = [
        name for name, tensor in plain.state_dict().items() if tensor.data_ptr() != state[name].data_ptr()
    ]
    if copied:
        raise BenchmarkError(f"{type(model).__name__}: transformers copies {', '.join(copied)}")
    return plain


def _stepper(model: Any, prompt: Sequence[int]) -> Callable[[], int]:
    """What computes the next token at each call, the prompt's first."""
    import torch

    cache, ids = None, list(prompt)

    def step() -> int:
        nonlocal cache, ids
        result = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, ids = result.past_key_values, [int(result.logits[0, -1].argmax())]
        return ids[0]

    return step


def take_turns(task: Turns) -> Overhead:
    """Take the turns in a process of its own. Raises BenchmarkError, with the end of its output, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "overhead.json")
        command = [sys.executable, "-m", "benchmarks.turns", json.dumps(asdict(task)), str(out)]
        ended = run_sampled(command, anonymous_bytes)
        if ended.exit_code != 0:
            raise BenchmarkError(f"the turns failed with exit code {ended.exit_code}:\n{ended.tail}")
        return Overhead(**json.loads(out.read_text()))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(Turns(**json.loads(sys.argv[1]))))))
