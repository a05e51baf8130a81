"""The trace: which weight follows which, learned from what operators really did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._met: set[Item] = set()
        self._came_after: dict[Item, Item] = {last: item for item, last in self._after.items()}

    def observe(self, before: Item | None, last: Item | None, item: Item) -> None:
        """Record that `item` came after `last`, which came after `before`."""
        if last is not None:
            self._after[last] = item
            self._after_pair[before, last] = item
            if item not in self._met:  # later ones may have passed over others
                self._met.add(item)
                self._came_after[item] = last

    def put_back(self, item: Item, passed_over: Callable[[Item], bool]) -> None:
        """Expect `item`, which was not used lately, where it was first met: it will be asked for again.

        `passed_over`: items that are not asked for now, so that it follows what came before them.
        """
        last = self._came_after.get(item)
        for _ in range(len(self._came_after)):
            if last is None or last == item or not passed_over(last):
                break
            last = self._came_after.get(last)
        following = None if last is None else self._after.get(last)
        if last is None or following is None or last == item or following == item or passed_over(last):
            return
        ahead: Item | None = following
        for _ in range(len(self._after)):
            if ahead is None or not passed_over(ahead):
                break
            ahead = self._after.get(ahead)
        if ahead == item:
            return  # it is expected still
        beyond = self._after_pair.get((last, following))
        for pair, after in list(self._after_pair.items()):
            if pair[1] == last and after == following:
                self._after_pair[pair] = item
        self._after[last] = item
        self._after_pair[last, item] = self._after[item] = following
        if beyond is not None:
            self._after_pair[item, following] = beyond

    def saw(self, before: Item | None, last: Item) -> bool:
        """Whether this pair was observed, so that its successor is more than a guess."""
        return (before, last) in self._after_pair

    def successor(self, before: Item | None, last: Item) -> Item | None:
        """The item expected after `before`, `last`."""
        pair = self._after_pair.get((before, last))
        return self._after.get(last) if pair is None else pair
