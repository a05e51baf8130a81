"""Long prompts and large batches: generate() prefills in chunks where a whole prompt would not fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from zinfer.caches_on_host import CachesOnHost
from zinfer.kv_cache import (
    Pass,
    activation_bytes,
    cache_growth,
    growth_where_computed,
    pads,
    prefills_in_chunks,
)
from zinfer.kv_offload.lane import working_bytes
from zinfer.planner.chunks import chunks_of, prefill_chunk
from zinfer.planner.placement import smallest
from zinfer.residency import Residency
from zinfer.streaming import Streaming
from zinfer.wording import size_text

logger = logging.getLogger("zinfer")

# What generate() gives a model that reads text alone. Anything else may belong to certain positions of the prompt.
_OF_TEXT = {"attention_mask", "position_ids", "cache_position", "past_key_values"}


class Prefill:
    """Chooses the chunks that transformers cuts a prompt into (GenerationConfig.prefill_chunk_size).

    A prompt is cut where its activations do not fit beside the least that weights need and the cache of the whole
    generation. Residents leave before that, for a chunk costs a whole sweep.
    `residency`: None where all weights are to stay; `caches`: who puts caches
    into host memory, if anybody. Any thread may call any method.
    """

    def __init__(
        self,
        model: nn.Module,
        streaming: Streaming,
        residency: Residency | None,
        caches: CachesOnHost | None,
    ) -> None:
        self._config: Any = getattr(model, "config", None)
        self._itemsize = getattr(getattr(model, "dtype", None), "itemsize", 4)
        self._streaming = streaming
        self._residency = residency
        self._caches = caches
        self._note = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to report of the last prompt that was cut, if any was."""
        return (self._note,) if self._note else ()

    def chunk(self, input_ids: torch.Tensor, settings: Any, inputs: Mapping[str, Any]) -> int | None:
        """Tokens to prefill at once; None for all of them, and where it is not for us to say.

        As generate() has prepared them: `input_ids`, a row for each beam; `settings`, its GenerationConfig; `inputs`,
        further arguments of the model.
        """
        cache: Any = inputs.get("past_key_values")
        given = getattr(settings, "prefill_chunk_size", 0)  # transformers that knows none cannot cut
        if given is not None or not self._can_cut(settings, inputs, cache):
            return None
        past = cache.get_seq_length()
        rows, length = input_ids.shape
        mask = inputs.get("attention_mask")
        tokens = length if mask is not None and mask.shape[1] != length else length - past
        kept = 1 if isinstance(inputs.get("logits_to_keep"), int) and inputs["logits_to_keep"] == 1 else 0
        longest = past + tokens + max(0, (settings.max_length or 0) - length - 1)
        needs = partial(self._needs, rows, tokens, past, kept, tokens > 1 and pads(mask))
        if tokens < 2 or not needs(tokens):
            return None
        room = self._room(cache, rows, longest - past)
        if room <= 0:  # the end of the longest generation will not fit: this prompt may
            room = self._room(cache, rows, tokens)
        chunk = prefill_chunk(tokens, room, needs)
        if room <= 0 or chunk >= tokens:
            return None
        self._tell(rows, tokens, chunk, needs(tokens), room)
        return chunk

    def _can_cut(self, settings: Any, inputs: Mapping[str, Any], cache: Any) -> bool:
        """Whether chunks give what a whole prompt does: text alone, a cache of keys and values, logits of the end."""
        mask = inputs.get("attention_mask")
        strange = [
            name for name, value in inputs.items() if name not in _OF_TEXT and not _is_setting(name, value)
        ]
        details = settings.return_dict_in_generate and (
            settings.output_attentions or settings.output_hidden_states
        )
        return (
            prefills_in_chunks(self._config)
            and isinstance(cache, Cache)
            and all(
                isinstance(layer, (DynamicLayer, StaticLayer)) and _is_plain(layer) for layer in cache.layers
            )
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
            and not strange
            and not details
        )

    def _needs(self, rows: int, whole: int, past: int, kept: int, masked: bool, tokens: int) -> int:
        """Bytes besides weights and caches for the last chunk of `tokens`, where a prompt has `whole`."""
        before = past + whole - tokens
        coming = Pass(rows, tokens, kept or tokens, masked=masked)
        return activation_bytes(self._config, self._itemsize, coming, before)

    def _room(self, cache: Any, rows: int, tokens: int) -> int:
        """Bytes for activations where `tokens` positions more are cached and as few weights as possible are there."""
        account, footprints = self._streaming.account, self._streaming.footprints
        growth = cache_growth(cache, self._config, self._itemsize, Pass(rows, tokens, 1))
        cached = growth_where_computed(cache, growth)
        if self._caches is not None and self._caches.takes(cache):
            cached = working_bytes(growth.largest)
        left = account.free - account.small - account.bounce - cached
        if self._residency is None:
            return left - account.residents - account.window - account.conversions
        least = smallest(footprints) if footprints else 0
        return left - least - self._residency.cache_bytes - self._residency.lost_bytes

    def _tell(self, rows: int, tokens: int, chunk: int, whole: int, room: int) -> None:
        first, passes = not self._note, chunks_of(tokens, chunk)
        self._note = (
            f"a prompt of {rows} x {tokens} tokens was prefilled in {passes} chunks of {chunk}, each a sweep: at once "
            f"it would take {size_text(whole)} besides weights and caches, and there is room for {size_text(room)}"
        )
        logger.log(logging.WARNING if first else logging.DEBUG, "%s", self._note)


def _is_setting(name: str, value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or name == "logits_to_keep"


def _is_plain(layer: Any) -> bool:
    """Whether it caches keys and values as they are, and nothing else."""
    return not any(
        "Quantized" in kind.__name__ or "Linear" in kind.__name__ or "Indexed" in kind.__name__
        for kind in type(layer).__mro__
    )
