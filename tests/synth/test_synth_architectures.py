"""Synthetic checkpoints load into transformers without a missing or unexpected tensor, and compute."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from zinfer.synth import synthesise

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2, head_dim=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4),
    "bert": lambda: transformers.BertConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, architectures=["BertForMaskedLM"]
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=320,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "clip": lambda: transformers.CLIPConfig(
        text_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
        },
        vision_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "image_size": 64,
        },
        architectures=["CLIPModel"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_the_model_is_in_the_checkpoint_and_nothing_else(name, tmp_path):
    out = synthesise(CONFIGS[name](), str(tmp_path / "m"), progress=False)
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.dtype == torch.bfloat16
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p.numel() > 64]
    assert all(matrix.float().std() > 1e-3 for matrix in matrices)
    if name == "clip":
        return
    ids = AutoTokenizer.from_pretrained(out)("Hello", return_tensors="pt", add_special_tokens=False).input_ids
    extra = {"decoder_input_ids": torch.zeros(1, 2, dtype=torch.long)} if config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits.float()
    assert logits.isfinite().all()
    assert logits.std(-1).min() > 1e-3
    if model.can_generate():
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_initial_values_are_those_of_transformers(tmp_path):
    mamba = synthesise(CONFIGS["mamba"](), str(tmp_path / "mamba"), progress=False, dtype="float32")
    mixer = transformers.MambaForCausalLM.from_pretrained(mamba).backbone.layers[1].mixer
    torch.testing.assert_close(mixer.A_log[0], torch.arange(1, mixer.ssm_state_size + 1).log())
    assert mixer.D.eq(1).all()
    assert torch.nn.functional.softplus(mixer.dt_proj.bias).min() > 0
    bert = synthesise(CONFIGS["bert"](), str(tmp_path / "bert"), progress=False)
    embeddings = transformers.BertForMaskedLM.from_pretrained(bert).bert.embeddings
    assert embeddings.position_ids[0].tolist() == list(range(512))
    assert embeddings.LayerNorm.weight.eq(1).all()
    assert 0 < embeddings.LayerNorm.bias.abs().max() < 0.2


def test_large_tensors_keep_the_deviation_their_initialiser_asks_for(tmp_path):
    config = transformers.GPT2Config(vocab_size=2000, n_embd=512, n_layer=2, n_head=4)
    out = synthesise(config, str(tmp_path / "m"), progress=False)
    block = transformers.GPT2LMHeadModel.from_pretrained(out).transformer.h[1].mlp
    assert block.c_fc.weight.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert block.c_proj.weight.float().std().item() == pytest.approx(0.02 / 4**0.5, rel=0.02)


def test_experts_are_one_tensor_each_as_on_the_hub(tmp_path):
    from safetensors import safe_open

    out = synthesise("qwen3-moe-tiny", str(tmp_path / "m"), progress=False)
    with safe_open(f"{out}/model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert "model.layers.3.mlp.experts.15.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_text_survives_and_ids_beyond_the_bytes_read_as_their_number(tmp_path):
    out = synthesise("llama-tiny", str(tmp_path / "m"), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "naïve 東京\n\t\x00"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.decode([400, 511]) == " <400> <511>"
    assert tokenizer("<400>", add_special_tokens=False).input_ids != [400]
    config = transformers.AutoConfig.from_pretrained(out)
    assert tokenizer.bos_token_id == config.bos_token_id == 256
    assert tokenizer.eos_token_id == config.eos_token_id == 257
    assert tokenizer.pad_token_id == config.pad_token_id == 258
    assert tokenizer.decode([257, 258], skip_special_tokens=True) == ""


def test_a_tokenizer_agrees_with_whatever_ids_the_config_names(tmp_path):
    config = transformers.MixtralConfig(
        **SMALL, num_local_experts=4, bos_token_id=1, eos_token_id=[2, 300], pad_token_id=99999
    )
    out = synthesise(config, str(tmp_path / "m"), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    saved = transformers.AutoConfig.from_pretrained(out)
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, [2, 300], None)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.decode(tokenizer("bytes", add_special_tokens=False).input_ids) == "bytes"


def test_a_vocabulary_too_small_for_all_bytes_still_has_a_tokenizer(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 100})
    out = synthesise(config, str(tmp_path / "m"), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("hello world", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "hello world"
    assert max(ids) < 100
