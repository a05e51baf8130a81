"""What a forward pass takes besides weights: its key-value cache, exactly, and its activations, roughly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils

# What a Cache is made of; not every version of transformers has all of them.
_HOLDERS = tuple(
    getattr(cache_utils, name)
    for name in ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")
    if hasattr(cache_utils, name)
)


@dataclass(frozen=True)
class Pass:
    """One call of a model: `rows` sequences, `tokens` new positions in each, logits for the last `logits` of them."""

    rows: int
    tokens: int
    logits: int

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Pass | None:
        """From the arguments of forward(); None where no tensor says how long the sequences are."""
        named = (kwargs.get(name) for name in ("input_ids", "decoder_input_ids", "inputs_embeds"))
        shapes = [
            value.shape for value in (*named, *args) if isinstance(value, torch.Tensor) and value.dim() > 1
        ]
        if not shapes:
            return None
        rows, tokens = max((shape[0], shape[1]) for shape in shapes)
        kept = kwargs.get("logits_to_keep", 0)
        kept = kept if isinstance(kept, int) and 0 < kept < tokens else tokens
        return cls(rows, tokens, kept)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors in a transformers Cache, or in a legacy tuple of them; 0 for anything else."""
    if isinstance(cache, torch.Tensor):
        return cache.nbytes
    if isinstance(cache, (list, tuple)):
        return sum(map(cache_bytes, cache))
    if isinstance(cache, dict):
        return sum(map(cache_bytes, cache.values()))
    return sum(map(cache_bytes, vars(cache).values())) if isinstance(cache, _HOLDERS) else 0


def cache_length(cache: Any) -> int:
    """Positions that a transformers Cache holds; 0 for anything else."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def cache_growth(cache: Any, config: Any, itemsize: int, coming: Pass) -> int:
    """Bytes that `coming` adds to `cache` at most.

    Once there is something in it, it grows in proportion; a static one does not. Before, the shape comes from the
    config: layers x 2 x heads for keys and values x head size, sliding windows no longer than they are.
    """
    now = cache_bytes(cache)
    layers = getattr(cache, "layers", None) or ()
    reserved = [
        layer.max_cache_len for layer in layers if isinstance(getattr(layer, "max_cache_len", None), int)
    ]
    if reserved and len(reserved) == len(layers):
        made = any(getattr(layer, "keys", None) is not None for layer in layers)
        return 0 if made else coming.rows * _bytes_a_row(config, itemsize, max(reserved))
    length = cache_length(cache) if now else 0
    if length:
        return now * coming.tokens // length
    return coming.rows * _bytes_a_row(config, itemsize, coming.tokens)


def _bytes_a_row(config: Any, itemsize: int, tokens: int) -> int:
    text = _text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    hidden, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(hidden, int) and isinstance(layers, int)) or heads < 1:
        return 0  # unknown: what the first pass makes is counted after it
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "kv_lora_rank", None):  # latent attention caches what its heads have in common
        width = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        width = 2 * kv_heads * (getattr(text, "head_dim", None) or hidden // heads)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or tokens
    positions = {"sliding_attention": min(tokens, window), "linear_attention": 0}
    return itemsize * width * sum(positions.get(kind, tokens) for kind in kinds)


def activation_bytes(config: Any, itemsize: int, coming: Pass) -> int:
    """Roughly what `coming` holds at once: a layer's widest intermediates and the logits. 0 where the config is silent.

    Four tensors of the hidden size (residual, norm, attention in and out) and three of the intermediate size (gate,
    up, their product), for each new position, as transformers' decoder layers have it, and half as much again for
    what the allocator keeps.
    """
    text = _text_config(config)
    sizes = [getattr(text, name, None) or 0 for name in ("hidden_size", "intermediate_size", "vocab_size")]
    hidden, intermediate, vocabulary = (size if isinstance(size, int) else 0 for size in sizes)
    elements = coming.tokens * (4 * hidden + 3 * intermediate) + coming.logits * vocabulary
    return coming.rows * itemsize * elements * 3 // 2


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
