"""Where a layer's experts come from: what forward.py and residency.py ask of a cache of experts, wherever that is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Protocol

import torch

from zinfer.experts.layers import Expert, ExpertLayer

Landed = list[tuple[Expert, list[torch.Tensor]]]


class ExpertSource(Protocol):
    """Experts where a model computes. Any thread may call any method."""

    slot_bytes: int  # of one expert
    allowed: int  # experts that may be there now

    @property
    def limit(self) -> int:
        """Bytes that experts may take now."""

    @property
    def count(self) -> int:
        """Experts that are there or on their way."""

    def arrivals(
        self, layer: ExpertLayer, picked: Sequence[int], then: Callable[[], object] | None = None
    ) -> Generator[Landed, None, None]:
        """The experts of `layer` that were `picked` (indices), with their tensors: as they land, several at a time.

        The tensors are valid until the next are asked for. All that are missing are requested at once, as far as there
        is room; `then` is called when that is done, if there was. Raises DriveError, CheckpointChangedError,
        ClosedError, and BudgetError where not even one has room.
        """

    def needs(self, picks: int) -> None:
        """A token takes `picks` experts of a layer at once: tells, once, where not even those have room together."""

    @property
    def notes(self) -> list[str]:
        """What does not run as it should, for the report."""

    def curious(self, picks: int, layer: ExpertLayer) -> bool:
        """Whether to guess what `layer`, the next one, picks, where this one picked `picks` times, counting all tokens.

        Rarely where guesses do not pay: that is found out at the cost of asking.
        """

    def foresee(self, layer: ExpertLayer, guessed: Iterable[int], before: ExpertLayer) -> None:
        """`layer`, next after `before`, may pick the experts `guessed` (indices): read them if guesses pay."""

    def resize(self, limit: int) -> None:
        """Take at most `limit` bytes from now on, or those of one expert; memory that is not needed goes back."""

    def close(self) -> None:
        """Drop every expert and give the memory back as soon as the last tensor on it dies."""
