"""Guessing which experts the next layer will pick, and whether that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

MEMORY = 0.995  # of what is known of guesses, this much counts after another one
ENOUGH = 64.0  # guesses that are looked at before any is trusted
PAYS = 0.5  # of guesses have to be right: a wrong one costs a read, and an expert that was there


class Trust:
    """The share of guesses that were right lately. Guesses are checked even while none is acted on. Not thread-safe."""

    def __init__(self) -> None:
        self._right = 0.0
        self._all = 0.0

    def note(self, right: int, count: int) -> None:
        """Of `count` experts that were guessed and not in memory, `right` were picked."""
        kept = MEMORY**count
        self._right = kept * self._right + right
        self._all = kept * self._all + count

    @property
    def share(self) -> float | None:
        """The share that was right, or None before enough were seen."""
        return self._right / self._all if self._all >= ENOUGH else None

    @property
    def pays(self) -> bool:
        """Whether to read what is guessed."""
        return self.share is not None and self.share >= PAYS


def guess(router: nn.Module, states: torch.Tensor, picks: int) -> Sequence[int]:
    """The experts that `router` picks for `states`, (tokens, hidden) of the layer before; `picks` for each token.

    None of them where it cannot say. The states are not yet those of its layer, but close: a layer adds little to them.
    """
    with torch.no_grad():
        found = router.forward(states)  # without hooks: whoever asked for the logits wants each once
    if isinstance(found, tuple):
        indices = [part for part in found if isinstance(part, torch.Tensor) and not part.is_floating_point()]
        if indices:
            return [int(index) for index in torch.unique(indices[-1]).tolist()]
        found = found[0]
    if not isinstance(found, torch.Tensor) or found.shape[-1] < picks:
        return []
    best = found.reshape(-1, found.shape[-1]).topk(picks, dim=-1).indices
    return [int(index) for index in torch.unique(best).tolist()]
