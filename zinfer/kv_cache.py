"""What a forward pass takes besides weights: its key-value cache, as far as it can be foreseen, and its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils

from zinfer.kv_offload.lane import working_bytes
from zinfer.kv_offload.layers import layers_on_host

# What a Cache is made of; not every version of transformers has all of them.
_HOLDERS = tuple(
    getattr(cache_utils, name)
    for name in ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")
    if hasattr(cache_utils, name)
)
CACHE_NAMES = ("past_key_values", "cache_params")  # what models call theirs, as argument and in their output


@dataclass(frozen=True)
class Pass:
    """One call of a model: `rows` sequences, `tokens` new positions in each, logits for the last `logits` of them.

    `source`: positions that an encoder made, or will make, of each; 0 where there is none. `masked`: some position is
    padding, so that operators are given a mask for each pair of positions, which they are not of whole prompts.
    """

    rows: int
    tokens: int
    logits: int
    source: int = 0
    masked: bool = False

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Pass | None:
        """From the arguments of forward(); None where no tensor says how long the sequences are."""
        decoded = _shape(kwargs.get("decoder_input_ids"), kwargs.get("decoder_inputs_embeds"))
        given = _shape(kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        encoded = kwargs.get("encoder_outputs")
        if isinstance(encoded, (tuple, Mapping)):
            encoded = next(iter(encoded.values() if isinstance(encoded, Mapping) else encoded), None)
        source = _shape(encoded) or (given if decoded else None)
        shape = decoded or given
        if shape is None:
            return None
        rows, tokens = shape
        kept = kwargs.get("logits_to_keep", 0)
        kept = kept if isinstance(kept, int) and 0 < kept < tokens else tokens
        mask = kwargs.get("decoder_attention_mask" if decoded else "attention_mask")
        return cls(rows, tokens, kept, source[1] if source else 0, tokens > 1 and pads(mask))


def pads(mask: Any) -> bool:
    """Whether the attention mask `mask` leaves any position out, or is more than one value for each. May wait for it.

    transformers asks the same before it makes masks, once a pass.
    """
    return isinstance(mask, torch.Tensor) and (mask.dim() != 2 or mask.is_meta or not bool(mask.all()))


def _shape(*candidates: Any) -> tuple[int, int] | None:
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[0], value.shape[1]
    return None


def caches_of(arguments: Mapping[str, Any]) -> list[Any]:
    """The caches among a call's keyword arguments, or in its output."""
    found = (arguments.get(name) for name in CACHE_NAMES)
    return [cache for cache in found if cache is not None]


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers Cache (or a legacy tuple of tensors) takes where the model computes; else 0.

    A sliding window may be a view of more: what counts is what is allocated, each storage once. Of layers in host
    memory, what counts is how much of them is on the device at once.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(cache)
    }
    on_host = max((layer.nbytes for layer in layers_on_host(cache)), default=0)
    return sum(storages.values()) + working_bytes(on_host)


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    if isinstance(cache, torch.Tensor):
        if not cache.is_meta:
            yield cache
    elif isinstance(cache, (list, tuple)):
        for value in cache:
            yield from _tensors(value)
    elif isinstance(cache, dict):
        yield from _tensors(list(cache.values()))
    elif isinstance(cache, _HOLDERS):
        yield from _tensors(list(vars(cache).values()))


def cache_length(cache: Any) -> int:
    """Positions that a transformers Cache holds; 0 for anything else, and for a purely recurrent state."""
    layers = list(_layers(cache))
    return max((layer.keys.shape[-2] for layer in layers if _grows(layer)), default=0)


@dataclass(frozen=True)
class Growth:
    """Bytes that a pass adds to a cache. `sure`: it is no more than that, so that a refusal would be right.

    `layers`: how many grow; `largest`: bytes of the largest of them after the pass.
    """

    nbytes: int
    sure: bool
    layers: int
    largest: int


def cache_growth(cache: Any, config: Any, itemsize: int, coming: Pass) -> Growth:
    """What `coming` adds to `cache` at most.

    Layers that hold something grow in proportion to their positions; static ones and recurrent states do not. Before,
    the shape comes from the config: layers x 2 x heads for keys and values x head size. A sliding window counts in
    full: its first pass holds all positions.
    """
    layers = list(_layers(cache))
    more = [_bytes_a_position(layer) * coming.tokens for layer in layers if _grows(layer)]
    grown = sum(more)
    if grown or (layers and cache_bytes(cache) and any(_made(layer) for layer in layers)):
        largest = max((now + add for now, add in zip(_sizes(cache), more, strict=True)), default=0)
        return Growth(grown, True, len(more), largest)
    reserved = [
        layer.max_cache_len for layer in layers if isinstance(getattr(layer, "max_cache_len", None), int)
    ]
    width, attending, sure = _bytes_of_position(config, itemsize)
    positions = max([coming.tokens, *reserved]) + coming.source  # an encoder's are kept for cross-attention
    layer = coming.rows * width * positions
    return Growth(layer * attending, sure, attending, layer)


def growth_where_computed(cache: Any, foreseen: Growth) -> int:
    """Bytes that `foreseen` takes where the model computes: all of them, unless `cache` is in host memory."""
    if not layers_on_host(cache):
        return foreseen.nbytes
    return max(0, working_bytes(foreseen.largest) - working_bytes(max(_sizes(cache), default=0)))


def _sizes(cache: Any) -> list[int]:
    """Bytes of each layer that grows."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in _layers(cache) if _grows(layer)]


def _layers(cache: Any) -> Iterator[Any]:
    """Of a cache, or of the part of an encoder-decoder's that grows."""
    own = getattr(cache, "self_attention_cache", cache)
    yield from getattr(own, "layers", None) or ()


def _made(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), torch.Tensor)


def _grows(layer: Any) -> bool:
    return _made(layer) and layer.keys.dim() == 4 and layer.keys.shape[-2] > 0 and not _static(layer)


def _static(layer: Any) -> bool:
    return isinstance(getattr(layer, "max_cache_len", None), int) and "Static" in type(layer).__name__


def _bytes_a_position(layer: Any) -> int:
    return (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]


def _bytes_of_position(config: Any, itemsize: int) -> tuple[int, int, bool]:
    """Bytes of a layer's cache for one position of one sequence by the config, such layers, and whether that is all."""
    text = _text_config(config)
    heads, hidden = (_number(text, name) for name in ("num_attention_heads", "hidden_size"))
    layers = _number(text, "num_hidden_layers")
    if not (heads and hidden and layers):
        return 0, 0, False  # what the first pass makes is counted after it
    if rank := _number(text, "kv_lora_rank"):  # latent attention caches what its heads have in common
        width = rank + _number(text, "qk_rope_head_dim")
    else:
        width = 2 * _key_value_heads(text, heads) * (_number(text, "head_dim") or hidden // heads)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    attending = sum(kind not in ("linear_attention", "mamba", "conv", "moe", "mlp") for kind in kinds)
    plain = all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    sure = (
        plain
        and not _number(text, "num_kv_shared_layers")
        and not getattr(config, "is_encoder_decoder", False)
    )
    return itemsize * width, attending, sure


def _key_value_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return _number(text, "num_key_value_heads") or _number(text, "num_kv_heads") or heads


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def activation_bytes(config: Any, itemsize: int, coming: Pass, past: int = 0) -> int:
    """Roughly what `coming` holds at once: a layer's widest intermediates and the logits. 0 where the config is silent.

    Four tensors of the hidden size (residual, norm, attention in and out) and three of the intermediate size (gate,
    up, their product), for each new position, as transformers' decoder layers have it, and half as much again for
    what the allocator keeps. Each expert that a position picks has three of the hidden size and three of its own.
    Several tokens after `past` positions attend with a mask for each pair of positions, once
    as booleans and once as numbers, and to keys and values that are repeated for each head; so do those of the first
    pass where some are padding, or outside a sliding window. Eager attention does in any case, and has a score for each
    pair and head: what its softmax takes, in 32 bits, and what it makes.
    """
    text = _text_config(config)
    hidden, intermediate, vocabulary = (
        _number(text, name) for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    picks = _number(text, "num_experts_per_tok")
    of_expert = _number(text, "moe_intermediate_size") or intermediate
    each = 4 * hidden + 3 * intermediate + picks * (3 * hidden + 3 * of_expert)
    elements = coming.tokens * each + coming.logits * vocabulary
    heads, positions = _number(text, "num_attention_heads"), past + coming.tokens
    eager = getattr(text, "_attn_implementation", None) == "eager" and heads > 0
    slides = 0 < _number(text, "sliding_window") < positions
    pairs = coming.rows * coming.tokens * positions
    of_pairs = 0
    if elements and (eager or (coming.tokens > 1 and (past or coming.masked or slides))):
        elements += 2 * hidden * positions
        of_pairs = pairs * (1 + itemsize) if coming.tokens > 1 else 0
        of_pairs += pairs * heads * max(2 * itemsize, itemsize + 8) if eager else 0
    return coming.rows * itemsize * elements * 3 // 2 + of_pairs


def prefills_in_chunks(config: Any) -> bool:
    """Whether a prompt may be cut: where each position attends to those before it, and to nothing else.

    Not with an encoder, with states that several tokens cannot follow up, with attention that looks ahead, and where
    how positions are encoded depends on how many there are.
    """
    text = _text_config(config)
    _, attending, sure = _bytes_of_position(config, 1)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    ahead = any(getattr(text, name, None) for name in ("use_bidirectional_attention", "prefix_lm"))
    return (
        bool(attending)
        and sure
        and not ahead
        and getattr(text, "is_causal", True) is not False
        and not any(kind in str(rope) for kind in ("dynamic", "longrope"))
    )


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
