"""zinfer, with the budget it chooses itself unless the task names one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.tools import Session
from benchmarks.tools.greedy import GreedySession, import_transformers

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("torch", "transformers", "safetensors")


class ZinferSession(GreedySession):
    """The model of `zinfer.run`."""

    @property
    def engine_bytes(self) -> int | None:
        """What its I/O engine has read."""
        return int(self.model.zinfer.bytes_read)

    @property
    def resident(self) -> int | None:
        """What stays by now."""
        return int(self.model.zinfer.resident_bytes)

    @property
    def read_ahead(self) -> int | None:
        """What its look-ahead has in the window, and on the way."""
        return int(self.model.zinfer.read_ahead_bytes)

    @property
    def counts(self) -> dict[str, float] | None:
        """Experts that were missing, and their bytes; those of wrong guesses; those of other weights a sweep.

        Also seconds that the drive was busy, and bytes of weights that are in memory now.
        """
        report = self.model.zinfer.report()
        if report.experts is None:
            return None
        return {
            "misses": report.experts.misses,
            "expert_bytes": report.experts.read_bytes - report.experts.guessed_bytes,
            "guessed_bytes": report.experts.guessed_bytes,
            "held_bytes": report.experts.cached_bytes + report.resident_bytes,
            "sweep_bytes": self.model.zinfer.sweep_bytes,
            "busy_seconds": report.busy_seconds,
        }

    def close(self) -> dict[str, Any] | None:
        """Its report, and the bytes of the key-value cache in the end."""
        report: dict[str, Any] = self.model.zinfer.report().as_dict()
        self.model.zinfer.close()
        return {**report, "cache_bytes": self.cache_bytes}


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    import_transformers(task)
    import zinfer

    limit = {"cpu": task.max_memory} if task.max_memory else None
    return lambda: ZinferSession(zinfer.run(task.checkpoint, offload="nvme", max_memory=limit))
