"""Named shapes: plain config dictionaries, and the way from a name, a path or an object to a config.

`bos_token_id`, `eos_token_id` and `pad_token_id` are those of the byte-level tokenizer that a synthetic
checkpoint carries (bytes are 0..255), not those of the model that lends its shape.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import transformers
from transformers import PreTrainedConfig

from zinfer.errors import CheckpointError, OptionError
from zinfer.weights.loading import REFUSALS
from zinfer.wording import brief

_SPECIALS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    positions: int,
    rope: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **_SPECIALS,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **_SPECIALS,
    }


def _qwen3_moe(
    hidden: int,
    intermediate: int,
    moe_intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    head_dim: int,
    experts: int,
    experts_per_token: int,
    positions: int,
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": moe_intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **_SPECIALS,
    }


_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Sizes are those of the weights in bfloat16.
SHAPES: dict[str, dict[str, Any]] = {
    # 6 MB: tests and first tries
    "llama-tiny": _llama(256, 688, 4, 8, 4, 512, positions=2048),
    # 6.6 GB: the demonstration's dense model
    "llama-demo": _llama(4096, 11008, 15, 32, 32, 32000, positions=4096),
    # 13.5 GB
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, positions=4096),
    # 16 GB
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, positions=131072, rope=_LLAMA_3_1_ROPE),
    # 141 GB
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256, positions=131072, rope=_LLAMA_3_1_ROPE),
    # 812 GB
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256, positions=131072, rope=_LLAMA_3_1_ROPE),
    # 138 GB
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, positions=4096),
    # 141 GB
    "llama-3-70b": _llama(
        8192, 28672, 80, 64, 8, 128256, positions=8192, rope={"rope_type": "default", "rope_theta": 500000.0}
    ),
    # 60 GB
    "opt-30b": _opt(7168, 48, 56),
    # 131 GB
    "opt-66b": _opt(9216, 64, 72),
    # 350 GB; the paper's shape (Zhang et al. 2022, table 1), as the weights are not on the hub
    "opt-175b": _opt(12288, 96, 96),
    # 353 GB
    "bloom-176b": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "hidden_size": 14336,
        "n_layer": 70,
        "n_head": 112,
        "vocab_size": 250880,
        "seq_length": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **_SPECIALS,
    },
    # 93 GB
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **_SPECIALS,
    },
    # 6 MB
    "qwen3-moe-tiny": _qwen3_moe(
        128, 384, 96, 4, 4, 2, 512, head_dim=32, experts=16, experts_per_token=4, positions=2048
    ),
    # 9.3 GB: the demonstration's sparse model
    "qwen3-moe-demo": _qwen3_moe(
        2048, 6144, 768, 14, 32, 4, 32000, head_dim=128, experts=64, experts_per_token=8, positions=40960
    ),
    # 61 GB
    "qwen3-30b-a3b": _qwen3_moe(
        2048, 6144, 768, 48, 32, 4, 151936, head_dim=128, experts=128, experts_per_token=8, positions=40960
    ),
}

_LAYER_COUNTS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def resolve_config(config: str | PreTrainedConfig, layers: int | None = None) -> PreTrainedConfig:
    """A config of one's own for a built-in name, a config.json, a folder with one, or a config object.

    `layers` overrides the number of layers (of the text model, and of encoder and decoder alike); lists
    with one entry a layer are cut or repeated to match. Raises OptionError for an unknown name or a
    senseless `layers`, CheckpointError for a config that transformers cannot read.
    """
    resolved = _load(config) if isinstance(config, str) else copy.deepcopy(config)
    return resolved if layers is None else _with_layers(resolved, layers)


def _load(source: str) -> PreTrainedConfig:
    if source in SHAPES:
        fields = copy.deepcopy(SHAPES[source])
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    if not os.path.isfile(path):
        raise OptionError(
            f"{brief(source)} is neither a built-in shape nor a config.json nor a folder with one; the built-in "
            f"shapes are {', '.join(SHAPES)}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except REFUSALS as error:
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    if layers < 1:
        raise OptionError(f"layers={layers}: a model has at least one layer")
    text = config.get_text_config(decoder=True)
    old = getattr(text, "num_hidden_layers", None)
    if not isinstance(old, int):
        raise OptionError(
            f"layers={layers}: {type(text).__name__} has no single number of layers to override"
        )
    fields = config.to_dict()
    target = fields
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            target = fields[key]
    names = {text.attribute_map.get(name, name) for name in _LAYER_COUNTS}
    for key, value in target.items():
        if key in names and isinstance(value, int):
            target[key] = layers
        elif isinstance(value, list) and len(value) == old and not key.endswith("token_id"):
            target[key] = [value[index % old] for index in range(layers)]
    try:
        return type(config).from_dict(fields)
    except REFUSALS as error:
        raise OptionError(f"layers={layers}: {type(config).__name__} does not allow it: {error}") from error
