"""The tools that are compared: one module each, run by worker.py with the Python of the tool's own venv.

A module has `PACKAGES`, the distributions whose versions matter, and `prepare(task)`, which imports all that
the tool needs, its model's own module included, and returns what loads the model. Some have
`convert(checkpoint, target)`, which writes the tool's own copy of the weights into the folder
`target` once, before the runs.

At the top of a module stands only what every Python has: the parent process imports them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from benchmarks import BenchmarkError


class Session(ABC):
    """A loaded model that decodes greedily, with a key-value cache. One thread uses it."""

    @abstractmethod
    def step(self, rows: list[list[int]]) -> list[int]:
        """Append ids to each sequence, as many to each; the likeliest next id of each."""

    @property
    def engine_bytes(self) -> int | None:
        """Bytes that the tool itself says it has read; None where it does not tell."""
        return None

    @property
    def resident(self) -> int | None:
        """Bytes of weights in memory for good at this moment; None where it does not tell."""
        return None

    @property
    def read_ahead(self) -> int | None:
        """Bytes of weights read, or on their way, for operators still to come; None where it does not tell."""
        return None

    @property
    def counts(self) -> dict[str, float] | None:
        """What the tool has counted so far, as a benchmark of its own wants it; None where it does not."""
        return None

    def restart(self) -> None:
        """Begin a new sequence; the model stays as it is."""
        raise BenchmarkError(f"{type(self).__name__} begins no second sequence")

    def close(self) -> dict[str, Any] | None:
        """Give up what outlives the process; the tool's own report, where it makes one."""
        return None
