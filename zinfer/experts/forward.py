"""What transformers calls in place of a layer's experts: those that were picked are read, and computed as they land.

Those that landed together are computed by the layer's own "eager" code, each on a row for every token that goes to it;
the results are added in the order of the experts' numbers, as that code does. So they are the same bit for bit,
whatever lands first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from zinfer.experts.layers import ExpertLayer, router_of
from zinfer.experts.lookahead import guess
from zinfer.experts.source import ExpertSource, Landed
from zinfer.weights.parameter import StreamedParameter

NAME = "zinfer"  # of this experts implementation, in transformers' registry
ATTRIBUTE = "_zinfer_experts"


class Following:
    """The layer of experts that runs next, and what picks among them."""

    def __init__(self, layer: ExpertLayer, router: nn.Module) -> None:
        self.layer, self.router = layer, router

    def guess(self, states: torch.Tensor, picks: int) -> Sequence[int]:
        """See lookahead.py; none where its router streams."""
        if any(isinstance(weight, StreamedParameter) for weight in self.router.parameters()):
            return []
        return guess(self.router, states, picks)


class StreamedExperts:
    """The experts of one module, and the cache that they come from. Copies of the module share it."""

    def __init__(self, layer: ExpertLayer, cache: ExpertSource, following: Following | None = None) -> None:
        self.layer, self.cache, self.following = layer, cache, following

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedExperts:
        return self

    def __call__(
        self, module: nn.Module, states: torch.Tensor, picked: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output for `states`, (tokens, hidden).

        `picked` and `shares` are (tokens, k): the experts of each token and how much of each it takes. A number that is
        no expert's (transformers masks with the first such) adds nothing.
        """
        self.cache.needs(picked.shape[-1])
        wanted = [index for index in torch.unique(picked).tolist() if 0 <= index < self.layer.count]
        out = torch.zeros_like(states)
        # By expert: the token's place among its k comes first, as in the eager code, whose products have their rows so.
        places = picked.t()
        landed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        following = 0
        arriving = self.cache.arrivals(
            self.layer, wanted, partial(self._look_ahead, states, picked.shape[-1])
        )
        with closing(arriving):  # whoever keeps an error must not keep experts with it
            for group in arriving:
                mine = [(expert.index, *torch.where(places == expert.index)) for expert, _ in group]
                tokens = torch.cat([token for _, _, token in mine])
                positions = torch.cat([position for _, position, _ in mine])
                with _at_hand(self.layer, group):
                    results = _eager(module)(
                        module,
                        states[tokens],
                        picked[tokens, positions].unsqueeze(1),
                        shares[tokens, positions].unsqueeze(1),
                    )
                del group
                for (index, _, token), result in zip(
                    mine, results.split([len(token) for _, _, token in mine]), strict=True
                ):
                    landed[index] = token, result
                while following < len(wanted) and wanted[following] in landed:
                    out.index_add_(0, *landed.pop(wanted[following]))
                    following += 1
        return out

    def _look_ahead(self, states: torch.Tensor, picks: int) -> None:
        if self.following is not None:
            guessed = self.following.guess(states, picks)
            self.cache.foresee(self.following.layer, guessed, self.layer)


def follow_each_other(
    model: nn.Module, layers: Sequence[tuple[ExpertLayer, nn.Module]], cache: ExpertSource
) -> None:
    """Have the experts of each of `layers`, modules of `model` in the order they run in, stream through `cache`."""
    for (layer, module), after in zip_longest(layers, layers[1:]):
        router = router_of(model, after[1]) if after is not None else None
        following = Following(after[0], router) if router is not None else None
        setattr(module, ATTRIBUTE, StreamedExperts(layer, cache, following))


class _at_hand:
    """While inside, `weight[index]` of the layer's weights is what `group` has, for this thread."""

    def __init__(self, layer: ExpertLayer, group: Landed) -> None:
        self._weights, self._group = layer.weights, group

    def __enter__(self) -> None:
        for position, weight in enumerate(self._weights):
            assert weight.slices is not None
            weight.slices.tensors = {expert.index: tensors[position] for expert, tensors in self._group}

    def __exit__(self, *_: object) -> None:
        for weight in self._weights:
            assert weight.slices is not None
            weight.slices.tensors = {}


def _eager(module: nn.Module) -> Callable[..., torch.Tensor]:
    """The code of the module's own class, beneath transformers' dispatch."""
    plain: Callable[..., torch.Tensor] = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return plain


def forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation "zinfer": see StreamedExperts. A module that streams none is computed by "eager"."""
    streamed: StreamedExperts | None = module.__dict__.get(ATTRIBUTE)
    if streamed is None:
        return _eager(module)(module, hidden_states, top_k_index, top_k_weights)
    return streamed(module, hidden_states, top_k_index, top_k_weights)


def streams_experts(asked: str | None, offload: str) -> bool:
    """Whether experts are read one by one where the user `asked` for an implementation, or for none (None)."""
    return asked in (None, "eager") and offload in ("auto", "nvme")


def can_stream_experts(model: nn.Module) -> bool:
    """Whether `model` is of a class whose experts transformers dispatches."""
    return isinstance(model, PreTrainedModel) and model._can_set_experts_implementation()


def use_streamed_experts(model: Any) -> None:
    """Have `model` compute its experts by `forward`."""
    model.set_experts_implementation(NAME)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
