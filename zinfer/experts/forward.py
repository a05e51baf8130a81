"""What transformers calls in place of a layer's experts: those that were picked are read, and computed as they land.

Each is computed by the layer's own "eager" code, on the tokens that go to it; the results are added in the order of
the experts' numbers, as that code does. So they are the same bit for bit, whatever lands first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from zinfer.experts.cache import ExpertCache
from zinfer.experts.layers import ExpertLayer

NAME = "zinfer"  # of this experts implementation, in transformers' registry
ATTRIBUTE = "_zinfer_experts"


class StreamedExperts:
    """The experts of one module, and the cache that they come from. Copies of the module share it."""

    def __init__(self, layer: ExpertLayer, cache: ExpertCache) -> None:
        self.layer, self.cache = layer, cache

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedExperts:
        return self

    def __call__(
        self, module: nn.Module, states: torch.Tensor, picked: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output for `states`, (tokens, hidden).

        `picked` and `shares` are (tokens, k): the experts of each token and how much of each it takes. A number that is
        no expert's (transformers masks with the first such) adds nothing.
        """
        eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        # By expert: the token's place among its k comes first, as in the eager code, whose products have their rows so.
        places = picked.t()
        wanted = [
            self.layer.experts[index]
            for index in torch.unique(picked).tolist()
            if 0 <= index < self.layer.count
        ]
        out = torch.zeros_like(states)
        order = [expert.index for expert in wanted]
        landed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        following = 0
        for expert, tensors in self.cache.arrivals(wanted):
            position, token = torch.where(places == expert.index)
            with _at_hand(self.layer, expert.index, tensors):
                one = torch.full((len(token), 1), expert.index, dtype=picked.dtype, device=picked.device)
                result = eager(module, states[token], one, shares[token, position].unsqueeze(1))
            landed[expert.index] = token, result
            while following < len(order) and order[following] in landed:
                token, result = landed.pop(order[following])
                out.index_add_(0, token, result)
                following += 1
        return out


class _at_hand:
    """While inside, `weight[index]` of the layer's weights is what `tensors` say, for this thread."""

    def __init__(self, layer: ExpertLayer, index: int, tensors: list[torch.Tensor]) -> None:
        self._weights, self._index, self._tensors = layer.weights, index, tensors

    def __enter__(self) -> None:
        for weight, tensor in zip(self._weights, self._tensors, strict=True):
            assert weight.slices is not None
            weight.slices.tensors[self._index] = tensor

    def __exit__(self, *_: object) -> None:
        for weight in self._weights:
            assert weight.slices is not None
            weight.slices.tensors.pop(self._index, None)


def forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation "zinfer": see StreamedExperts. A module that streams none is computed by "eager"."""
    streamed: StreamedExperts | None = module.__dict__.get(ATTRIBUTE)
    if streamed is None:
        result: torch.Tensor = type(module).forward.__wrapped__(  # type: ignore[attr-defined]
            module, hidden_states, top_k_index, top_k_weights
        )
        return result
    return streamed(module, hidden_states, top_k_index, top_k_weights)


def streams_experts(asked: str | None, offload: str, *, attached: bool) -> bool:
    """Whether experts are read one by one where the user `asked` for an implementation, or for none (None).

    On a device with memory of its own (`attached`) they stream whole, as other weights do.
    """
    return asked in (None, "eager") and offload in ("auto", "nvme") and not attached


def can_stream_experts(model: nn.Module) -> bool:
    """Whether `model` is of a class whose experts transformers dispatches."""
    return isinstance(model, PreTrainedModel) and model._can_set_experts_implementation()


def use_streamed_experts(model: Any) -> None:
    """Have `model` compute its experts by `forward`."""
    model.set_experts_implementation(NAME)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
