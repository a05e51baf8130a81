"""What benchmarks.gpu measures: models that decode and read prompts on a card, and the yardsticks beside them."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig

import zinfer
from benchmarks.gpu_card import Card, Watch
from benchmarks.gpu_figures import Prefill, Round, copying
from zinfer.aio.block_device import block_device_of
from zinfer.aio.probe import measure_read_rate
from zinfer.aio.profile import load_profile
from zinfer.aio.settings import settings_for
from zinfer.aio_bench import Setting, given_targets
from zinfer.aio_bench.sweep import into_window, usable_backends
from zinfer.errors import BudgetError
from zinfer.planner.hardware import Hardware
from zinfer.planner.memory import total_memory
from zinfer.synth import synthesise
from zinfer.timeline import chrome

HEAD_SIZE = 128
KEY_VALUE_HEADS = 8
MEMORY = 256 << 20  # bytes that a drive is read into, about a window
TRIALS = 5  # of aio_bench, in one measurement
ROWS = (1, 16, 64, 256, 1024, 4096)  # of the products that the planner is told of
PEAK_ROWS = 8192
QUIET, PATIENCE = 0.1, 20.0  # seconds without a read, after which the windows are full; to wait for that
REASON = 160  # characters


@dataclass(frozen=True)
class Shape:
    """A model like Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


def model_folder(folder: str, shape: Shape) -> str:
    """Where make_model puts it."""
    return os.path.join(folder, f"llama-{shape.hidden}x{shape.layers}")


def fitting_layers(shape: Shape, room: int) -> Shape:
    """`shape` with the layers that `room` bytes hold, beside embedding and head in bf16; all of them at most."""
    heads = 2 * 2 * shape.vocabulary * shape.hidden
    layer = 2 * shape.hidden * (4 * shape.hidden + 3 * shape.intermediate)  # more than grouped heads take
    return replace(shape, layers=min(shape.layers, max(1, (room - heads) // layer)))


def make_model(folder: str, shape: Shape) -> str:
    """The model of this shape under `folder`, in bf16, made once."""
    heads = max(KEY_VALUE_HEADS, shape.hidden // HEAD_SIZE)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="bfloat16",
    )
    return synthesise(config, model_folder(folder, shape), progress=sys.stderr.isatty())


def drive_rate(paths: Sequence[str], seconds: float) -> float:
    """Bytes a second at which `paths` can be read into a window: by aio_bench, with the setting that zinfer uses.

    Or by plain direct reads, where those are faster.
    """
    plain = measure_read_rate(paths, seconds / 2, MEMORY)
    device = block_device_of(paths[0])
    wanted = settings_for(device, load_profile(device))
    usable, _ = usable_backends(direct=plain.direct)
    backend = next((name for name in usable if name == wanted.backend), usable[0])
    depth = wanted.workers if backend == "threads" else wanted.depth
    with given_targets(paths) as targets:
        setting = Setting(backend, wanted.block_bytes, depth)
        engine = into_window(targets, setting, seconds / 2 / TRIALS, plain.bytes_per_second)
    return max(plain.bytes_per_second, engine.rate)


def card_hardware(card: Card, shape: Shape, drive: float, seconds: float) -> tuple[Hardware, float]:
    """The card and what feeds it, as the planner knows a machine, and its peak of bf16 products in flop a second."""
    widths = shape.hidden, shape.intermediate
    curve = [(rows, card.matmul_rate(rows, *widths, seconds)) for rows in ROWS]
    peaks = [card.matmul_rate(PEAK_ROWS, shape.hidden, out, seconds) for out in widths]
    copies = card.copy_rate(seconds)
    hardware = Hardware(
        name=card.name,
        drive_read=drive,
        host_memory=total_memory(),
        host_bandwidth=copies,
        device_memory=card.total,
        device_bandwidth=card.memory_rate(seconds),
        host_to_device=copies,
        matmul={"bfloat16": tuple(curve)},
        sources={"host_bandwidth": "not measured: nothing computes there"},
    )
    card.clear()
    return hardware, max(*peaks, *(rate for _, rate in curve))


@contextmanager
def streaming(
    card: Card, files: Sequence[str], offload: str, ceilings: dict[Any, int], **changes: Any
) -> Iterator[Any]:
    """The model whose checkpoint `files` are, streaming to `card`; `changes` as for zinfer.run."""
    processor = card.processor()
    try:
        model = zinfer.run(
            os.path.dirname(files[0]),
            device=processor,
            offload=offload,
            max_memory=ceilings,
            timeline=True,
            progress=False,
            **changes,
        )
        try:
            yield model
        finally:
            model.zinfer.close()
    finally:
        processor.limit(None)
        card.clear()


def prompts(card: Card, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Random ids on the card, the same ones each time."""
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))
    return ids.to(card.torch_device)


class Stepper:
    """Decodes greedily, a token of each sequence at each call; the first call reads the prompts."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._model, self._ids, self._cache = model, ids, None

    def __call__(self) -> None:
        """Returns when the token is on the host, as it is where text is put out or a stop is looked for."""
        result = self._model(
            input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = result.past_key_values
        self._ids = result.logits[:, -1:].argmax(-1)
        self._ids.tolist()


def decode(
    card: Card,
    model: Any,
    ids: torch.Tensor,
    *,
    rounds: int,
    tokens: int,
    yardstick: Callable[[], float],
    watch: Watch,
    left: Callable[[], float],
) -> Iterator[Round]:
    """Decode after `ids`, `tokens` in a row that count in each round, with `yardstick` before and after each.

    The first token after a pause does not count, as the windows filled meanwhile, nor does the last, in which nothing
    is read or copied for a next one. There are `rounds`, but for those that would take longer than the seconds `left`.
    """
    step = Stepper(model, ids)
    with watch:
        step()
    settle(card, model)
    before = yardstick()
    for number in range(rounds):
        begun = time.monotonic()
        with watch:
            step()
            read, started = model.zinfer.bytes_read, time.perf_counter()
            for _ in range(tokens):
                step()
            seconds, read = time.perf_counter() - started, model.zinfer.bytes_read - read
            step()
        settle(card, model)
        copied = copying(timeline_of(model), tokens)
        after = yardstick()
        yield Round(tokens, seconds, copied.nbytes, copied.busy, read, (before, after))
        before = after
        if number + 1 < rounds and left() < time.monotonic() - begun:
            return


def settle(card: Card, model: Any) -> None:
    """Wait until nothing runs on the card and nothing is read ahead any more."""
    card.finish()
    deadline, read = time.monotonic() + PATIENCE, -1
    while read != model.zinfer.bytes_read and time.monotonic() < deadline:
        read = model.zinfer.bytes_read
        time.sleep(QUIET)


def timeline_of(model: Any) -> Any:
    """What was recorded so far."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "timeline.json")
        model.zinfer.timeline(path)
        return chrome.read(path)


def layer_flops(model: Any) -> int:
    """Flops that the linear layers do for one position, the head and attention's own left out: 2 for each weight."""
    linears = (part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear))
    return sum(2 * part.weight.numel() for part in linears)


def prefill(
    card: Card,
    model: Any,
    *,
    batches: Sequence[int],
    prompt: int,
    passes: int,
    watch: Watch,
    left: Callable[[], float],
) -> Iterator[Prefill]:
    """Read `prompt` tokens of each sequence at rising batches, until one does not fit memory, or the seconds `left`.

    How long one takes is told by the one before it.
    """
    token = 0.0  # seconds of a pass for each of its tokens, at most
    for batch in batches:
        flops = float(batch * prompt * layer_flops(model))
        if left() <= (1 + passes) * token * batch * prompt:
            yield Prefill(batch, prompt, flops, failed="no time was left")
            return
        ids = prompts(card, batch, prompt, model.config.vocab_size)
        try:
            with watch:
                Stepper(model, ids)()  # the memory that it takes is allocated now
                seconds = [_seconds(Stepper(model, ids)) for _ in range(passes)]
        except (BudgetError, torch.OutOfMemoryError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            reason = ""
            token = max(seconds) / (batch * prompt)
        gc.collect()  # not while the error holds the frames, and what they hold
        if reason:
            yield Prefill(batch, prompt, flops, failed=reason[:REASON])
            return
        yield Prefill(batch, prompt, flops, seconds)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
