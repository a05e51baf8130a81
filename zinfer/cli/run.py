"""`zinfer run`: generate text with a model whose weights stream."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zinfer._version import __version__
from zinfer.cli.options import check_memory, memory, positive
from zinfer.cli.progress import Progress, SweepMeter
from zinfer.cli.streamers import IdStreamer, TextStreamer, TokenStreamer
from zinfer.cli.terminal import Terminal, check_writable, logging_to
from zinfer.errors import CheckpointError, OptionError, ZinferError

NAME = "run"
SUMMARY = "generate text with a model whose weights stream from the drive"
DESCRIPTION = """\
Generate text with a Hugging Face model, its weights streaming from the drive within a memory budget.
The text goes to stdout as it comes; progress and a closing report go to stderr."""
EPILOG = """\
examples:
  zinfer run ./llama-demo --prompt "Once upon a time" --max-memory cpu=3GiB
  zinfer run Qwen/Qwen3-32B --prompt "Hello" --offload nvme --nvme-path /mnt/nvme --sample --temperature 0.7
  zinfer run ./no-tokenizer --ids "1,15,27" --max-new-tokens 5 --json report.json

Decoding is greedy unless --sample is given. `zinfer doctor DIR` measures the drive first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder or a hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to go on from")
    prompt.add_argument(
        "--ids",
        type=_ids,
        metavar="1,2,3",
        help="token ids to go on from, for a checkpoint without a tokenizer; ids are written too",
    )
    place = parser.add_argument_group("where the weights are")
    place.add_argument(
        "--offload", choices=("auto", "nvme", "cpu", "none"), default="auto",
        help="auto: memory if all fits, else the drive (default); nvme: stream from the drive, keep what "
        "fits; cpu: all in host memory; none: a plain model in memory",
    )  # fmt: skip
    place.add_argument(
        "--nvme-path", action="append", metavar="DIR",
        help="drive to stream from; default: where the checkpoint lies. Given several times: the checkpoint is "
        "written there once, striped over all of them",
    )  # fmt: skip
    place.add_argument(
        "--device", metavar="DEVICE",
        help="where to compute: cpu, cuda, cuda:1 ...; default: the GPU where there is one",
    )  # fmt: skip
    place.add_argument(
        "--max-memory", action="append", type=memory, default=[], metavar="DEVICE=SIZE",
        help="ceiling on weights, buffers and caches, of host memory (cpu=3GiB) or of the device (0=20GiB); default: "
        "what is free",
    )  # fmt: skip
    place.add_argument(
        "--kv-offload", choices=("cpu",),
        help="keep key-value caches in host memory and bring them to the device layer by layer",
    )  # fmt: skip
    place.add_argument("--dtype", default="auto", help="bfloat16, float32 ...; default: the checkpoint's")
    place.add_argument("--revision", help="branch, tag or commit of a hub id")
    place.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that the checkpoint brings"
    )
    text = parser.add_argument_group("generation")
    text.add_argument("--max-new-tokens", type=positive, default=20, metavar="N", help="default: 20")
    text.add_argument("--min-new-tokens", type=positive, metavar="N", help="do not end before N tokens")
    text.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    text.add_argument("--temperature", type=float, metavar="T", help="above 0; with --sample")
    text.add_argument("--top-p", type=float, metavar="P", help="above 0, up to 1; with --sample")
    text.add_argument("--seed", type=int, metavar="N", help="makes --sample repeatable")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="default: a line on stderr where that is a terminal; --progress elsewhere: a line a token",
    )  # fmt: skip
    output.add_argument(
        "--timeline", metavar="FILE",
        help="record reads, waits and operators there, for https://ui.perfetto.dev and `zinfer timeline FILE`",
    )  # fmt: skip
    output.add_argument("--json", metavar="FILE", help="write the report, the ids and the text there too")


def main(arguments: argparse.Namespace) -> int:
    """Carry out `zinfer run`; returns 0. Raises the errors of zinfer.run and of wrong options."""
    _check(arguments)
    _quieten(debug := getattr(arguments, "debug", False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a character that stdout's encoding lacks must not end the run
    terminal = Terminal()
    with logging_to(terminal, logging.DEBUG if debug else logging.WARNING):
        return _run(arguments, terminal)


def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    import zinfer
    from zinfer.locate import local_folder

    hub = {} if arguments.revision is None else {"revision": arguments.revision}
    trust = arguments.trust_remote_code
    folder = local_folder(arguments.model, hub)
    config = _generating_config(folder, trust)
    prompt = _prompt(arguments, folder, config, trust)
    model = zinfer.run(
        folder,
        offload=arguments.offload,
        nvme_path=arguments.nvme_path,
        device=arguments.device,
        dtype=arguments.dtype,
        max_memory=dict(arguments.max_memory) or None,
        progress=arguments.progress,
        trust_remote_code=trust,
        timeline=arguments.timeline is not None,
        kv_offload=arguments.kv_offload,
    )
    with model:
        streamer, seconds = _generate(model, prompt, arguments, terminal)
        _predict(model.zinfer)
        report = model.zinfer.report()
    if arguments.timeline:
        model.zinfer.timeline(arguments.timeline)
    terminal.note(f"{report}\n{_tokens_line(prompt, streamer, seconds)}")
    if arguments.json:
        summary = {
            "zinfer": __version__,
            "model": arguments.model,
            "prompt_ids": prompt.ids,
            "new_ids": streamer.ids,
            "text": streamer.text if isinstance(streamer, TextStreamer) else None,
            "seconds": seconds,
            "report": report.as_dict(),
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
    return 0


def _predict(runtime: Any) -> None:
    """Have the report show what was to be expected; a plan that cannot be made does not end a run that was."""
    try:
        runtime.predict()
    except ZinferError as error:
        logging.getLogger("zinfer").debug("no prediction: %s", error)


@dataclass(frozen=True)
class Prompt:
    """What to go on from, and the tokenizer for what comes; None when ids are all there is."""

    ids: list[int]
    tokenizer: Any


def _check(arguments: argparse.Namespace) -> None:
    """Raises OptionError for options that contradict or would have no effect."""
    if not arguments.sample:
        for option in ("temperature", "top_p", "seed"):
            if getattr(arguments, option) is not None:
                raise OptionError(f"--{option.replace('_', '-')} has no effect without --sample")
    if arguments.temperature is not None and not 0 < arguments.temperature < float("inf"):
        raise OptionError(
            f"--temperature {arguments.temperature}: it is above 0; leave --sample out for greedy text"
        )
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise OptionError(f"--top-p {arguments.top_p}: it is above 0 and at most 1")
    if (arguments.min_new_tokens or 0) > arguments.max_new_tokens:
        raise OptionError(
            f"--min-new-tokens {arguments.min_new_tokens} is more than "
            f"--max-new-tokens {arguments.max_new_tokens}"
        )
    check_memory(arguments.max_memory)
    for option in ("json", "timeline"):
        if (path := getattr(arguments, option)) is not None:
            check_writable(f"--{option}", path)
    if arguments.json and arguments.timeline and _same(arguments.json, arguments.timeline):
        raise OptionError(f"--json and --timeline name the same file, {arguments.json}; give each its own")


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _generating_config(folder: str, trust: bool) -> Any:
    """The config in `folder`. Raises CheckpointError unless its model generates text."""
    from zinfer.weights.loading import load_config, model_class

    config, _ = load_config(folder, {"trust_remote_code": trust})
    cls: Any = model_class(config, folder, trust)
    if not (hasattr(cls, "can_generate") and cls.can_generate()):
        raise CheckpointError(
            f"{folder}: {cls.__name__} does not generate text, and that is all `zinfer run` does; use it "
            "from Python with zinfer.run()"
        )
    return config


def _prompt(arguments: argparse.Namespace, folder: str, config: Any, trust: bool) -> Prompt:
    if arguments.ids is not None:
        vocabulary = getattr(
            config.get_text_config(decoder=not config.is_encoder_decoder), "vocab_size", None
        )
        outside = [one for one in arguments.ids if vocabulary is not None and one >= vocabulary]
        if outside:
            raise OptionError(f"--ids: {outside} lie outside the model's vocabulary of {vocabulary}")
        return Prompt(arguments.ids, None)
    tokenizer = _tokenizer(folder, trust)
    ids = tokenizer(arguments.prompt)["input_ids"]
    if not ids:
        raise OptionError("--prompt: the tokenizer makes no token of it; give at least one")
    return Prompt(list(ids), tokenizer)


def _tokenizer(folder: str, trust: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder}: no tokenizer can be loaded from it ({reason}); add the tokenizer's files, or pass "
            'token ids with --ids "1,2,3" instead of --prompt'
        ) from error


def _generate(
    model: Any, prompt: Prompt, arguments: argparse.Namespace, terminal: Terminal
) -> tuple[TokenStreamer, float]:
    """Generate to the terminal; returns the tokens and the seconds it took."""
    import torch

    runtime, plan = model.zinfer, model.zinfer.report()
    residents_to_load = max(0, plan.planned_resident_bytes - (plan.resident_bytes - plan.small_bytes))
    meter = SweepMeter(runtime, arguments.max_new_tokens, runtime.sweep_bytes + residents_to_load)
    if arguments.sample and arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    ids = torch.tensor([prompt.ids], device=model.device)
    with Progress(
        terminal, meter, shown=arguments.progress is not False and (terminal.live or arguments.progress)
    ) as progress:
        streamer: TokenStreamer
        if prompt.tokenizer is None:
            streamer = IdStreamer(terminal.write, progress.token)
        else:
            streamer = TextStreamer(prompt.tokenizer, terminal.write, progress.token)
        started = time.perf_counter()
        try:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), streamer=streamer, **_settings(model, arguments)
            )
        finally:
            if streamer.ids:
                terminal.write("\n")
    return streamer, time.perf_counter() - started


def _settings(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords for generate; what generation_config says of sampling holds with --sample only."""
    settings: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "num_beams": 1,
        "do_sample": arguments.sample,
    }
    if arguments.min_new_tokens is not None:
        settings["min_new_tokens"] = arguments.min_new_tokens
    for option in ("temperature", "top_p"):
        if getattr(arguments, option) is not None:
            settings[option] = getattr(arguments, option)
    return settings


def _tokens_line(prompt: Prompt, streamer: TokenStreamer, seconds: float) -> str:
    count = len(streamer.ids)
    text = f"tokens    {len(prompt.ids)} in the prompt, {count} new in {seconds:.2f} s"
    if count and isinstance(streamer, TextStreamer):
        silent = sum(
            1 for one in streamer.ids if not prompt.tokenizer.decode([one], skip_special_tokens=True)
        )
        if silent:
            text += f", {silent} of them without text in this tokenizer"
    return text


def _quieten(debug: bool) -> None:
    """transformers' remarks are for those who program with it."""
    import transformers

    if not debug:
        transformers.logging.set_verbosity_error()


def _ids(text: str) -> Sequence[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as '1,2,3'")
    return [int(part) for part in parts]
