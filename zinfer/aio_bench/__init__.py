"""Judge a drive: which block size, depth and backend move bytes fastest, and how fast that is.

    with made_targets(["/mnt/nvme"], nbytes) as targets:      # nameless files, gone at the end
        for measurement in sweep(targets, plan):              # every setting, in turn, several rounds
            ...
    best = choose(measurements)                               # what zinfer then uses (zinfer.aio.profile)

The command is `aio_bench` (zinfer/cli/aio_bench.py). Nothing is written to a file that this package did not make.
"""

from zinfer.aio_bench.measurement import Measurement, choose
from zinfer.aio_bench.settings import READ, WRITE, Plan, Setting, make_plan
from zinfer.aio_bench.sweep import sweep
from zinfer.aio_bench.target import Target, given_targets, made_targets

__all__ = [
    "READ",
    "WRITE",
    "Measurement",
    "Plan",
    "Setting",
    "Target",
    "choose",
    "given_targets",
    "made_targets",
    "make_plan",
    "sweep",
]
