"""One part of benchmarks.gpu, in a process of its own, which may be ended at any time: what it found is saved by then.

python -m benchmarks.gpu_part STATE NAME END
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import transformers

import zinfer
from benchmarks import BenchmarkError
from benchmarks.gpu_card import Card, CudaCard, StagedCard, Watch
from benchmarks.gpu_figures import TIMES_BUDGET, Bound, Decode, Memory, Round
from benchmarks.gpu_process import State
from benchmarks.gpu_runs import (
    Shape,
    card_hardware,
    decode,
    drive_rate,
    fitting_layers,
    make_model,
    model_folder,
    prefill,
    prompts,
    streaming,
)
from benchmarks.gpu_stress import sanitized, stress
from benchmarks.report import main_of
from benchmarks.worker import weight_files
from zinfer.planner.hardware import hardware_from
from zinfer.planner.memory import free_memory, parse_size

STRESS_LAYERS, STRESS_VOCABULARY = 8, 512
SANITIZER_SECONDS = 90.0
DECODE_PROMPT = 32  # tokens
PASSES = 2  # of each prefill
ROOM = 0.9  # of the free drive and host memory, which the model may take
WRITING = 0.7  # of the time there is, in which the model has to be written at the rate of a small one
HOST_SHARE = 1.25  # of the model's bytes, which are max_memory["cpu"] where all of it is in host memory
SLACK = 1.05  # of the model's bytes over TIMES_BUDGET of the budget's
GRACE = 6.0  # seconds before its end in which a part gives its memory back
REASON = 300  # characters
Kind = TypeVar("Kind")


class Part:
    """What all parts have: options, findings, and the seconds left. `path`: the State's; `end` by time.monotonic."""

    def __init__(self, path: str, end: float) -> None:
        state = State.load(path)
        self._path, self._state, self._end = path, state, end
        self.options, self.found = argparse.Namespace(**state.options), state.found

    def left(self) -> float:
        """Seconds in which anything more can be measured."""
        return self._end - GRACE - time.monotonic()

    def save(self) -> None:
        """Keep what was found so far."""
        self._state.save(self._path)

    def attempt(self, name: str, work: Callable[[], Kind]) -> Kind | None:
        """What `work` returns; None, and a line in what failed, where it fails or there is no time for it."""
        if self.left() <= 0:
            self._failed(f"{name}: no time was left")
            return None
        try:
            return work()
        except (
            Exception
        ) as error:  # whatever it is costs this step alone, is told, and is a requirement missed
            traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0]
            self._failed(f"{name}: {type(error).__name__}: {reason[:REASON]}")
            return None

    def _failed(self, line: str) -> None:
        self.found.failed.append(line)
        self.save()

    def run(self, name: str) -> None:
        """The part of that name."""
        parts: dict[str, Callable[[], None]] = {
            "model": self.model,
            "card": self.card,
            "drive": self.drive,
            "host": self.host,
            "stress": self.stress,
            "sanitizer": self.sanitizer,
        }
        self.attempt(name, parts[name])
        self.save()

    def model(self) -> None:
        """Make the models: the small one first, whose rate tells how large the other can be."""
        options, found = self.options, self.found
        wanted = Shape(options.hidden, options.intermediate, options.layers, options.vocabulary)
        begun = time.monotonic()
        small = self._stress_model()
        rate = sum(map(os.path.getsize, weight_files(small))) / (time.monotonic() - begun)
        free = ROOM * min(shutil.disk_usage(options.folder).free, free_memory())
        if not os.path.exists(model_folder(options.folder, wanted)):
            wanted = fitting_layers(wanted, int(min(free, WRITING * rate * self.left())))
        found.checkpoint = make_model(options.folder, wanted)
        found.layers = wanted.layers
        found.model_bytes = sum(map(os.path.getsize, self._files))
        found.budget = min(found.budget, int(found.model_bytes / (TIMES_BUDGET * SLACK)))

    def _stress_model(self) -> str:
        hidden = self.options.stress_hidden
        return make_model(
            self.options.folder, Shape(hidden, hidden * 11 // 4, STRESS_LAYERS, STRESS_VOCABULARY)
        )

    @property
    def _files(self) -> list[str]:
        if not self.found.checkpoint:
            raise BenchmarkError("there is no model to measure with")
        return weight_files(self.found.checkpoint)

    def _card(self) -> Card:
        """The card, for this process; others' memory there is what is in use before this is called."""
        card: Card = StagedCard() if self.options.staged else CudaCard()
        self.found.card, self.found.facts = card.name, card.facts()
        return card

    def _budgets(self) -> dict[Any, int]:
        """max_memory of the model in host memory."""
        found = self.found
        return {0: found.budget, "cpu": min(int(HOST_SHARE * found.model_bytes), free_memory())}

    def card(self) -> None:
        """What card and drive do without zinfer, and what zinfer's planner says of it by its own measurement."""
        options, found, card = self.options, self.found, self._card()
        self.save()
        shape = Shape(options.hidden, options.intermediate, found.layers, options.vocabulary)
        measured, found.peak_flops = card_hardware(card, shape, self._drive_rate(), options.seconds)
        found.hardware = measured.as_dict()
        self.save()
        processor = card.processor()
        for number, batch in enumerate(options.decode_batches):
            # Measured now, whatever an earlier run has kept; and once, unless something disturbed that.
            plan = partial(self._plan, batch, self._budgets(), device=processor, remeasure=number == 0)
            bound = self.attempt(f"zinfer.plan, batch {batch}", plan)
            if bound is not None:
                found.plans[batch] = bound
                self.save()

    def _plan(self, batch: int, budgets: dict[Any, int], **options: Any) -> Bound:
        """What the planner says of decoding as _rounds does it."""
        planned = zinfer.plan(
            self.found.checkpoint,
            max_memory=budgets,
            offload=self.options.offload,
            batch=batch,
            prompt=DECODE_PROMPT,
            new_tokens=2 + self.options.rounds * (2 + self.options.tokens),
            **options,
        )
        return Bound(planned.seconds_a_token, planned.bottleneck)

    def drive(self) -> None:
        """Decode with the first layers of the model, most of which come from the drive each time."""
        options, card = self.options, self._card()
        sizes = {0: parse_size(options.drive_device_memory), "cpu": parse_size(options.drive_host_memory)}
        layers = min(options.drive_layers, self.found.layers)
        with streaming(card, self._files, "nvme", sizes, num_hidden_layers=layers) as model:
            for each in self._rounds(card, model, 1, Watch(card.used), self._drive_rate):
                self.found.from_drive.append(each)
                self.save()

    def host(self) -> None:
        """Decode and read prompts with the weights in host memory; what the card takes meanwhile."""
        options, card, found = self.options, self._card(), self.found
        count = card.nvml()
        watch = Watch(card.used) if count is None else Watch(card.used, count)

        def seen() -> None:
            nvml = watch.peaks[1] if count is not None else None
            found.memory = Memory(found.budget, watch.peak, nvml, card.listed_bytes())
            self.save()

        def decoded(batch: int) -> None:
            yardstick = partial(card.copy_rate, options.seconds)
            rounds: list[Round] = []
            for each in self._rounds(card, model, batch, watch, yardstick):
                if not rounds:
                    found.from_host.append(Decode(batch, rounds))
                rounds.append(each)
                seen()

        def prompted() -> None:
            for each in prefill(
                card,
                model,
                batches=options.batches,
                prompt=options.prompt,
                passes=PASSES,
                watch=watch,
                left=self.left,
            ):
                found.prefills.append(each)
                seen()

        with streaming(card, self._files, options.offload, self._budgets()) as model:
            report = model.zinfer.report()
            taken = {0: report.device.budget, "cpu": report.budget}
            for batch in options.decode_batches:
                self.attempt(f"decode, batch {batch}", partial(decoded, batch))
            self.attempt("prefill", prompted)
            for batch in options.decode_batches:
                self.attempt(f"plan with plain rates, batch {batch}", partial(self._plain, batch, taken))

    def _plain(self, batch: int, budgets: dict[Any, int]) -> None:
        if self.found.hardware is None:
            raise BenchmarkError("the card was not measured, so that nothing can be planned")
        hardware = hardware_from(self.found.hardware, "the card as measured")
        self.found.plain[batch] = self._plan(batch, budgets, hardware=hardware)
        self.save()

    def stress(self) -> None:
        """Sweeps of a small model whose recycled memory is poisoned."""
        card = self._card()
        self.found.stress = stress(card, self._stress_model(), self.options.sweeps, self.left)

    def sanitizer(self) -> None:
        """A few sweeps under compute-sanitizer."""
        seconds = min(SANITIZER_SECONDS, self.left())
        self.found.sanitizer = sanitized(self._stress_model(), seconds)

    def _rounds(
        self, card: Card, model: Any, batch: int, watch: Watch, yardstick: Callable[[], float]
    ) -> Iterator[Round]:
        options = self.options
        return decode(
            card,
            model,
            prompts(card, batch, DECODE_PROMPT, options.vocabulary),
            rounds=options.rounds,
            tokens=options.tokens,
            yardstick=yardstick,
            watch=watch,
            left=self.left,
        )

    def _drive_rate(self) -> float:
        return drive_rate(self._files, self.options.seconds)


def main(arguments: Sequence[str]) -> int:
    """0, as whatever fails is told in what was found."""
    path, name, end = arguments
    transformers.logging.set_verbosity_error()  # of the layers that are left out
    transformers.logging.disable_progress_bar()
    Part(path, float(end)).run(name)
    sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main_of(main)
