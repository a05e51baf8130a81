"""The trace: which weight follows which, learned from what operators really did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Trace(Generic[Item]):
    """A successor model of the operator order.

    Remembers what came after each pair of consecutive items, falling back to what came after the last
    one alone, and before anything was seen to `guess` (taken as a cycle). There is no position and no
    end of a sweep: the last operator of one token is followed by the first of the next, prefill,
    decode, encoder and decoder share what they have in common, and a divergence costs only the
    items it touches, since the model re-joins at the next item it knows.
    """

    def __init__(self, guess: Sequence[Item]) -> None:
        self._after: dict[Item, Item] = dict(zip(guess, [*guess[1:], *guess[:1]], strict=True))
        self._after_pair: dict[tuple[Item | None, Item], Item] = {}

    def observe(self, before: Item | None, last: Item | None, item: Item) -> None:
        """Record that `item` came after `last`, which came after `before`."""
        if last is not None:
            self._after[last] = item
            self._after_pair[before, last] = item

    def saw(self, before: Item | None, last: Item) -> bool:
        """Whether this pair was observed, so that its successor is more than a guess."""
        return (before, last) in self._after_pair

    def successor(self, before: Item | None, last: Item) -> Item | None:
        """The item expected after `before`, `last`."""
        pair = self._after_pair.get((before, last))
        return self._after.get(last) if pair is None else pair
