"""transformers' cache layers with their keys and values in host memory."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from zinfer.kv_offload.lane import Lane
from zinfer.kv_offload.positions import Kind, Positions


class OnHost(DynamicLayer):
    """What a layer does differently when its states are in host memory: it has them on the device in update() only.

    All else is its class's own code. Between updates `keys` and `values` have shape and dtype, on torch's meta device,
    and no bytes: methods that ask for lengths, or slice, work on those, and the slice tells what to drop.
    """

    positions: Positions
    lane: Lane

    @property
    def nbytes(self) -> int:
        """Bytes of its states in host memory."""
        return self.positions.length * self.positions.width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As its class's: the states of all positions that the operators need, on the device."""
        positions, new = self.positions, key_states.shape[-2]
        if positions.length:
            self.keys, self.values = self.lane.bring(positions, new)
        elif self.is_initialized:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        try:
            full: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            assert self.keys is not None
            kept = self.keys.shape[-2]
            self._forget()  # so that the next layer can come where this one's states were
            fresh = min(new, kept)
            if fresh == kept:
                positions.clear()
                positions.keys, positions.values = Kind.of(key_states), Kind.of(value_states)
            else:
                positions.keep(positions.length + fresh - kept, kept - fresh)
            if fresh:
                last = slice(new - fresh, None)
                self.lane.send(positions, key_states[:, :, last], value_states[:, :, last], new)
        finally:
            self._stand_in()
        self.lane.go_on(positions, new)
        return full

    def crop(self, tokens_to_remove: int) -> None:
        """As its class's."""
        super().crop(tokens_to_remove)
        if self.keys is not None and self.is_initialized:
            self.positions.keep(
                self.keys.storage_offset() // max(self.keys.stride(-2), 1), self.keys.shape[-2]
            )
            self._stand_in()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As its class's, in host memory."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As its class's, in host memory."""
        self.batch_select_indices(torch.arange(self.positions.keys.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As its class's, in host memory."""
        if self.positions.length:
            self.positions.select(torch.arange(self.positions.keys.rows)[indices.cpu()])
            self._stand_in()

    def reset(self) -> None:
        """As its class's."""
        super().reset()
        self.positions.clear()
        self._forget()
        self.is_initialized = False

    def growth(self, new: int) -> int:
        """Positions that are kept beyond those that are, once `new` came."""
        return new

    def _forget(self) -> None:
        self.keys = self.values = None

    def _stand_in(self) -> None:
        self.keys = self.positions.keys.stand_in(self.positions.length)
        self.values = self.positions.values.stand_in(self.positions.length)


class OnHostLayer(OnHost):
    """All positions, in host memory."""


class OnHostSlidingLayer(OnHost, DynamicSlidingWindowLayer):
    """A sliding window of positions, in host memory."""

    def growth(self, new: int) -> int:
        """See OnHost."""
        length = self.positions.length
        window = length + new if getattr(self, "record_past", False) else max(self.sliding_window - 1, 1)
        return max(0, min(length + new, window) - length)


# What each kind of layer becomes. Those in STAYING have little, or nothing: recurrent states do not grow.
MOVED: dict[type, type[OnHost]] = {DynamicLayer: OnHostLayer, DynamicSlidingWindowLayer: OnHostSlidingLayer}
STAYING = tuple(  # not every version of transformers has both
    getattr(cache_utils, name)
    for name in ("DummyLayer", "LinearAttentionLayer")
    if hasattr(cache_utils, name)
)


def layers_on_host(cache: Any) -> list[OnHost]:
    """The layers of `cache` whose states are in host memory."""
    return [layer for layer in getattr(cache, "layers", None) or () if isinstance(layer, OnHost)]


def is_empty(cache: Any) -> TypeGuard[DynamicCache]:
    """Whether `cache` is a DynamicCache that could go to host memory: plain, and nothing in it yet."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
        return False
    moving = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return not any(isinstance(layer, OnHost) or layer.is_initialized for layer in moving)


def move_to_host(cache: Cache, lane: Lane, layers: int) -> None:
    """Have the layers of `cache`, an empty one, keep what they are given in host memory, and come through `lane`.

    `layers`: how many there are to be, where the cache would add them as they are used.
    """
    if not cache.layers:
        cache.layers.extend(DynamicLayer() for _ in range(layers))
    for layer in cache.layers:
        moved = MOVED.get(type(layer))
        if moved is not None:
            layer.__class__ = moved
            layer.lane, layer.positions = lane, lane.add()  # type: ignore[union-attr]
