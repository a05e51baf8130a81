"""Tiny, random models of many architectures: (name, model class, config). A few hundred KB each."""

from __future__ import annotations

import copy

import torch
import transformers as t

_DENSE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_HEADS = _DENSE | {"head_dim": 16}
_MOE = _HEADS | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def _deepseek(cls: type = t.DeepseekV3Config) -> t.PreTrainedConfig:
    return cls(
        **(_DENSE | {"num_key_value_heads": 4}),
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )


def _qwen3_next() -> t.Qwen3NextConfig:
    return t.Qwen3NextConfig(
        **(_MOE | {"num_hidden_layers": 4}),
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )


CAUSAL: dict[str, tuple[type, object]] = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**_DENSE)),
    "llama_tied": (t.LlamaForCausalLM, t.LlamaConfig(**_DENSE, tie_word_embeddings=True)),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**_HEADS)),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**_DENSE)),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**_HEADS)),
    "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**_HEADS)),
    "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**_HEADS)),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**_DENSE)),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(n_embd=64, n_layer=2, n_head=4, **_GPT)),
    "gptj": (t.GPTJForCausalLM, t.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **_GPT)),
    "gpt_neox": (
        t.GPTNeoXForCausalLM,
        t.GPTNeoXConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, **_GPT
        ),
    ),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            ffn_dim=128,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            **_GPT,
        ),
    ),
    "bloom": (t.BloomForCausalLM, t.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **_GPT)),
    "falcon": (
        t.FalconForCausalLM,
        t.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **_GPT),
    ),
    "starcoder2": (t.Starcoder2ForCausalLM, t.Starcoder2Config(**_DENSE)),
    "cohere": (t.CohereForCausalLM, t.CohereConfig(**_DENSE)),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config(**_DENSE)),
    "granite": (t.GraniteForCausalLM, t.GraniteConfig(**_DENSE)),
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig(**_HEADS, num_local_experts=4)),
    "qwen3_moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**_MOE)),
    "qwen3_moe_eager_experts": (
        t.Qwen3MoeForCausalLM,
        t.Qwen3MoeConfig(**_MOE, experts_implementation="eager"),
    ),
    "olmoe": (t.OlmoeForCausalLM, t.OlmoeConfig(**_DENSE, num_experts=8, num_experts_per_tok=2)),
    "granite_moe": (t.GraniteMoeForCausalLM, t.GraniteMoeConfig(**_DENSE, num_local_experts=4)),
    "deepseek_v3": (t.DeepseekV3ForCausalLM, _deepseek()),
    "gpt_oss": (t.GptOssForCausalLM, t.GptOssConfig(**_HEADS, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_next": (t.Qwen3NextForCausalLM, _qwen3_next()),
    "mamba": (t.MambaForCausalLM, t.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **_GPT)),
    "mamba2": (
        t.Mamba2ForCausalLM,
        t.Mamba2Config(
            hidden_size=64, num_hidden_layers=2, state_size=16, head_dim=16, num_heads=8, n_groups=1, **_GPT
        ),
    ),
}

ENCODER: dict[str, tuple[type, object]] = {
    "bert": (
        t.BertForMaskedLM,
        t.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=256
        ),
    ),
    "roberta": (
        t.RobertaForSequenceClassification,
        t.RobertaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=256
        ),
    ),
    "albert_shared_layers": (
        t.AlbertForMaskedLM,
        t.AlbertConfig(
            hidden_size=64,
            embedding_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=256,
        ),
    ),
}

SEQ2SEQ: dict[str, tuple[type, object]] = {
    "t5": (
        t.T5ForConditionalGeneration,
        t.T5Config(
            d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=256,
            decoder_start_token_id=0, eos_token_id=None,
        ),
    ),
    "bart": (
        t.BartForConditionalGeneration,
        t.BartConfig(
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=256, max_position_embeddings=128,
            decoder_start_token_id=2, eos_token_id=None, forced_eos_token_id=None,
        ),
    ),
}  # fmt: skip

ALL = CAUSAL | ENCODER | SEQ2SEQ

# Mixtures of experts that transformers dispatches; those of ALL, and more.
SPARSE: dict[str, tuple[type, object]] = {
    **{name: ALL[name] for name in ("mixtral", "qwen3_moe", "olmoe", "granite_moe", "gpt_oss", "qwen3_next")},
    "qwen3_moe_eager_experts": ALL["qwen3_moe_eager_experts"],  # asked for by the config
    "deepseek_v3": ALL["deepseek_v3"],
    "deepseek_v2": (t.DeepseekV2ForCausalLM, _deepseek(t.DeepseekV2Config)),
    "qwen2_moe": (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=32)),
    "glm4_moe": (
        t.Glm4MoeForCausalLM,
        t.Glm4MoeConfig(
            **_HEADS, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
    "minimax": (t.MiniMaxForCausalLM, t.MiniMaxConfig(**_HEADS, num_local_experts=4, num_experts_per_tok=2)),
}  # fmt: skip

# Routers that want more than the states; sums in another precision than the states'. Only where transformers has them.
_UNUSUAL = {
    "minimax_m2": ("MiniMaxM2", _HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "afmoe": ("Afmoe", _MOE | {"num_dense_layers": 0, "num_shared_experts": 1}),
    "lfm2_moe": (
        "Lfm2Moe",
        _DENSE
        | _MOE
        | {
            "num_hidden_layers": 3,
            "num_dense_layers": 0,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronH",
        _HEADS
        | {
            "layers_block_type": ["moe", "attention", "moe"],
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
}
for _name, (_prefix, _fields) in _UNUSUAL.items():
    if hasattr(t, f"{_prefix}ForCausalLM"):
        _config = getattr(t, f"{_prefix}Config")(**_fields)
        SPARSE[_name] = (getattr(t, f"{_prefix}ForCausalLM"), _config)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> t.PreTrainedModel:
    """The seeded random model called `name`, in eval mode."""
    cls, config = (ALL | SPARSE)[name]
    torch.manual_seed(seed)
    return cls(copy.deepcopy(config)).to(dtype).eval()


def reference(name: str, folder: str, **options: object) -> t.PreTrainedModel:
    """The model in `folder` held in memory, computed as zinfer promises to: experts by the model's own "eager" code."""
    cls = (ALL | SPARSE)[name][0]
    if name in SPARSE:
        options = {"experts_implementation": "eager"} | options
    return cls.from_pretrained(folder, **options).eval()


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of the distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
