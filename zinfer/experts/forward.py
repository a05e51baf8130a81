"""What transformers calls in place of a layer's experts: those that were picked are read, and computed as they land.

Those that landed together are computed by the layer's own "eager" code, each on a row for every token that goes to it;
what it would add to its sum is added in the order of the experts' numbers, as that code does, and in the same
precision. So the results are the same bit for bit, whatever lands first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from zinfer.experts.layers import ExpertLayer, router_of
from zinfer.experts.lookahead import guess
from zinfer.experts.source import ExpertSource, Landed
from zinfer.weights.parameter import NoGradient, StreamedParameter
from zinfer.weights.shortage import ran_out

logger = logging.getLogger("zinfer")

NAME = "zinfer"  # of this experts implementation, in transformers' registry
ATTRIBUTE = "_zinfer_experts"


# What a router raises that wants more than the states, or others.
UNSUITED = (TypeError, ValueError, IndexError, RuntimeError)


class Following:
    """The layer of experts that runs next, and what picks among them."""

    def __init__(self, layer: ExpertLayer, router: nn.Module) -> None:
        self.layer = layer
        self._router: nn.Module | None = router

    def guess(self, states: torch.Tensor, picks: int) -> Sequence[int]:
        """See lookahead.py; none where its router streams, or needs more than states: it is not asked again then."""
        router = self._router
        if router is None or any(isinstance(weight, StreamedParameter) for weight in router.parameters()):
            return []
        try:
            return guess(router, states, picks)
        except UNSUITED as error:
            if ran_out(error):
                raise
            self._router = None
            logger.info("%s cannot be asked ahead: %s", type(router).__name__, error)
            return []


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
        no expert's (transformers masks with the first such) adds nothing. No gradient flows.
        """
        with torch.no_grad():
            out = self._computed(module, states, picked, shares)
        trained = torch.is_grad_enabled() and states.requires_grad
        return NoGradient.apply(states, out) if trained else out

    def _computed(
        self, module: nn.Module, states: torch.Tensor, picked: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        self.cache.needs(picked.shape[-1])
        wanted = [index for index in torch.unique(picked).tolist() if 0 <= index < self.layer.count]
        # By expert: the token's place among its k comes first, as in the eager code, whose products have their rows so.
        places = picked.t()
        landed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        out, dtype, following = torch.zeros_like(states), states.dtype, 0
        arriving = self.cache.arrivals(
            self.layer, wanted, partial(self._look_ahead, states, picked.shape[-1])
        )
        with closing(arriving):  # whoever keeps an error must not keep experts with it
            for group in arriving:
                mine = {index: torch.where(places == index) for index in sorted(e.index for e, _ in group)}
                positions, tokens = (torch.cat(parts) for parts in zip(*mine.values(), strict=True))
                with _at_hand(self.layer, group), _Addends() as addends:
                    result = type(module).forward.__wrapped__(  # type: ignore[attr-defined]
                        module,
                        states[tokens],
                        picked[tokens, positions].unsqueeze(1),
                        shares[tokens, positions].unsqueeze(1),
                    )
                del group
                dtype = result.dtype
                found = addends.found or list(result.split([len(token) for _, token in mine.values()]))
                for (index, (_, token)), addend in zip(mine.items(), found, strict=True):
                    landed[index] = token, addend
                if not following:
                    out = out.to(
                        found[0].dtype
                    )  # some classes add in another precision, and round in the end
                while following < len(wanted) and wanted[following] in landed:
                    out.index_add_(0, *landed.pop(wanted[following]))
                    following += 1
        return out.to(dtype)

    def _look_ahead(self, states: torch.Tensor, picks: int) -> None:
        if self.following is not None and self.cache.curious(len(states) * picks, self.following.layer):
            guessed = self.following.guess(states, picks)
            self.cache.foresee(self.following.layer, guessed, self.layer)


class _Addends(TorchFunctionMode):
    """While inside, what the eager code would add to its sum, expert by expert, is written down instead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.index_add_:
            self.found.append(args[3])
            return args[0]
        return func(*args, **(kwargs or {}))


def follow_each_other(
    model: nn.Module, layers: Sequence[tuple[ExpertLayer, nn.Module]], cache: ExpertSource
) -> None:
    """Have the experts of each of `layers`, modules of `model` in the order they run in, stream through `cache`."""
    stacks = {id(module): re.sub(r"\d+", "", name) for name, module in model.named_modules()}
    for (layer, module), after in zip_longest(layers, layers[1:]):
        following = None
        if after is not None and stacks[id(module)] == stacks[id(after[1])]:
            router = router_of(model, after[1])
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


def forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation "zinfer": see StreamedExperts. A module that streams none is computed by "eager"."""
    streamed: StreamedExperts | None = module.__dict__.get(ATTRIBUTE)
    if streamed is None:
        plain: torch.Tensor = type(module).forward.__wrapped__(  # type: ignore[attr-defined]
            module, hidden_states, top_k_index, top_k_weights
        )
        return plain
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
