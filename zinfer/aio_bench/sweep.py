"""Measure every setting of a plan, in turn, so that what changes on the machine meanwhile hits all alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from zinfer.aio import Engine
from zinfer.aio.profile import BACKENDS, Backend
from zinfer.aio_bench.measurement import Measurement, Trial
from zinfer.aio_bench.memory import pool_of
from zinfer.aio_bench.settings import READ, WRITE, Plan, Setting
from zinfer.aio_bench.target import Target, by_drive
from zinfer.aio_bench.trial import run_trial
from zinfer.errors import OptionError

WINDOW_BYTES = 256 << 20  # about what zinfer reads ahead into: far more than a processor's cache holds
WINDOW_TRIALS = 5
FIRST_GUESS = 1e9  # bytes a second, before anything was measured


def usable_backends(
    wanted: Sequence[str] = BACKENDS, *, direct: bool = True
) -> tuple[list[Backend], dict[str, str]]:
    """Those of `wanted` that work here, and why the others do not; libaio only where files are `direct`."""
    usable: list[Backend] = []
    refused: dict[str, str] = {}
    for name in BACKENDS:
        if name not in wanted:
            continue
        if name == "libaio" and not direct:
            refused[name] = "the file is read through the page cache, where libaio blocks"
            continue
        try:
            Engine(name).close()
        except OptionError as error:
            refused[name] = str(error)
        else:
            usable.append(name)
    return usable, refused


def sweep(
    targets: Sequence[Target], plan: Plan, progress: Callable[[str], None] = lambda text: None
) -> list[Measurement]:
    """A Measurement for each setting and direction of `plan`; `progress` hears of each trial as it starts.

    Raises DriveError for the first trial that fails.
    """
    trials: dict[tuple[str, Setting], list[Trial]] = defaultdict(list)
    rates: dict[tuple[str, Setting], float] = {}
    last = dict.fromkeys(plan.directions, FIRST_GUESS)
    with pool_of(len(by_drive(targets)) * max(setting.in_flight for setting in plan.settings)) as pool:
        for direction, setting in plan.order():
            progress(f"{direction} through {setting.backend}")
            key = direction, setting
            trial = run_trial(
                targets,
                setting,
                direction,
                pool=pool,
                seconds=plan.seconds,
                expected_rate=rates.get(key, last[direction]),
                most_bytes=plan.allowances[setting] if direction == WRITE else None,
            )
            rates[key] = last[direction] = trial.rate
            trials[key].append(trial)
    return [
        Measurement.of(direction, setting, trials[direction, setting])
        for direction in plan.directions
        for setting in plan.settings
    ]


def into_window(
    targets: Sequence[Target], setting: Setting, seconds: float, expected_rate: float
) -> Measurement:
    """Reads with `setting` into as much memory, for each drive, as zinfer reads ahead into.

    What a drive sustains there is less than into a few blocks that stay in a processor's cache, and is what a sweep
    can count on. Raises DriveError, and BudgetError where there is not that much memory.
    """
    memory = max(WINDOW_BYTES, setting.in_flight)
    with pool_of(len(by_drive(targets)) * memory) as pool:
        trials = [
            run_trial(
                targets,
                setting,
                READ,
                pool=pool,
                seconds=seconds,
                expected_rate=expected_rate,
                memory_bytes=memory,
            )
            for _ in range(WINDOW_TRIALS)
        ]
    return Measurement.of(READ, setting, trials)
