"""Which experts a cache gives up: those whose next use is expected last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HALF_LIFE = 32.0  # passes after which a use counts half; benchmarks/evictions.py compares


class Uses:
    """How often each expert is picked, and when it will be next. Not thread-safe.

    `counts`: experts of each layer, in the order in which the layers run; experts are numbered through. A pass visits
    every layer once. `half_life`: see HALF_LIFE; 0 remembers the last visit alone, infinity every one alike.
    """

    def __init__(self, counts: Sequence[int], half_life: float = HALF_LIFE) -> None:
        self._ends = np.cumsum(counts)
        self._layer_of = np.repeat(np.arange(len(counts)), counts)
        self._layers = len(counts)
        self._share = np.zeros(len(self._layer_of))  # of the visits to its layer, those that picked an expert
        self._visits = np.zeros(self._layers)
        self._half_life = half_life

    def visited(self, layer: int, numbers: Sequence[int]) -> None:
        """`layer` runs, and picked the experts `numbers`."""
        end = self._ends[layer]
        start = self._ends[layer - 1] if layer else 0
        self._visits[layer] += 1
        fresh = 1 / self._visits[layer]  # the mean, as long as there are few
        if np.isfinite(self._half_life):
            fresh = max(fresh, 1 - 0.5 ** (1 / self._half_life) if self._half_life else 1.0)
        self._share[start:end] *= 1 - fresh
        self._share[numbers] += fresh

    def next_use(self, numbers: npt.NDArray[np.intp], layer: int) -> npt.NDArray[np.float64]:
        """Passes from now, while `layer` runs, until each of `numbers` is expected to be used.

        An expert that is picked in a share q of the visits to its layer is picked 1/q visits from now on average (the
        mean of a geometric distribution), of which the next one is part of a pass away.
        """
        distance = ((self._layer_of[numbers] - layer - 1) % self._layers + 1) / self._layers
        with np.errstate(divide="ignore"):
            return np.asarray(distance + 1 / self._share[numbers] - 1)

    def latest(self, numbers: npt.NDArray[np.intp], layer: int) -> list[int]:
        """`numbers` by their next use, the latest first."""
        order = np.argsort(-self.next_use(numbers, layer), kind="stable")
        return [int(number) for number in numbers[order]]
