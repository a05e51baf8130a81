"""The promise: same logits and same tokens, bit for bit, as the model held in memory."""

from __future__ import annotations

import pytest
import torch
import transformers

import zinfer
from tests import architectures

IDS = torch.tensor([[5, 17, 33, 101, 200, 9, 77], [8, 3, 250, 41, 6, 90, 12]])
BUDGET_SHARE = 0.55  # of the weights' bytes: some stay, most stream, many times over


CACHES = 40_000  # bytes: what the longest of these tests caches


def stream(folder: str, budget: int, **options):
    """Stream within `budget` bytes, or within the fewest that work."""
    try:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": budget + CACHES}, **options)
    except zinfer.BudgetError as error:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": error.smallest + CACHES}, **options)


def load_both(folder: str, name: str, **options):
    reference = architectures.reference(name, folder, **options)
    return reference, stream(folder, int(architectures.parameter_bytes(reference) * BUDGET_SHARE), **options)


def inputs_for(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": ids}
    if name in architectures.SEQ2SEQ:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


@torch.no_grad()
def assert_same(reference, streamed, name: str) -> None:
    # Batches, one sequence, and a single token take different kernels; so do first and later sweeps.
    for ids in (IDS, IDS[:1], IDS[:1, :1], IDS):
        inputs = inputs_for(name, ids)
        assert torch.equal(reference(**inputs).logits, streamed(**inputs).logits)
    if reference.can_generate():
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        for ids in (IDS, IDS[:1]):
            assert torch.equal(reference.generate(ids, **settings), streamed.generate(ids, **settings))


@pytest.mark.parametrize("name", architectures.ALL)
def test_streams_bit_equal_to_the_model_in_memory(name, saved, nothing_left):
    reference, model = load_both(saved(name), name)
    with model:
        assert_same(reference, model, name)
        report = model.zinfer.report()
    assert report.resident_bytes < report.model_bytes
    assert report.bytes_read > report.model_bytes, "nothing was streamed: the test proves nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mixtral", "t5", "mamba", "gemma2"])
def test_streams_bit_equal_in_bfloat16(name, saved, nothing_left):
    reference, model = load_both(saved(name, torch.bfloat16), name)
    with model:
        assert_same(reference, model, name)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "bart"])
def test_a_cast_on_the_fly_equals_loading_in_that_dtype(name, saved, nothing_left):
    reference, model = load_both(saved(name), name, dtype=torch.bfloat16)
    with model:
        assert model.dtype == torch.bfloat16
        assert_same(reference, model, name)


@pytest.mark.parametrize("shift", [0, 8, 16, 24, 40, 56, 1, 3])
def test_the_alignment_of_the_file_does_not_change_a_bit(shift, saved, tmp_path, nothing_left):
    """Single-precision kernels choose their path by address: every header length must stay exact."""
    folder = saved("llama")
    shard = f"{folder}/model.safetensors"
    with open(shard, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, data = file.read(length), file.read()
    with open(shard, "wb") as file:
        file.write((length + shift).to_bytes(8, "little") + header + b" " * shift + data)
    reference, model = load_both(folder, "llama")
    with model:
        assert_same(reference, model, "llama")


def test_sharded_checkpoints_stream_like_single_files(saved, nothing_left):
    folder = saved("qwen3_moe", max_shard_size="100KB")
    reference, model = load_both(folder, "qwen3_moe")
    with model:
        assert_same(reference, model, "qwen3_moe")


@pytest.mark.parametrize("share", [0.2, 0.35, 0.8, 1.5])
@pytest.mark.parametrize("name", ["llama", "t5", "deepseek_v3"])
def test_every_budget_gives_the_same_bits(name, share, saved, nothing_left):
    folder = saved(name)
    reference = architectures.reference(name, folder)
    total = architectures.parameter_bytes(reference)
    with stream(folder, int(total * share)) as model:
        assert_same(reference, model, name)


@pytest.mark.parametrize("offload", ["cpu", "none", "auto"])
def test_modes_that_keep_everything_in_memory_are_exact_too(offload, saved, nothing_left):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with zinfer.run(folder, offload=offload) as model:
        assert_same(reference, model, "llama")
        assert model.zinfer.report().bytes_read < 1.1 * architectures.parameter_bytes(reference) + (1 << 20)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["beams", "sampling", "no cache", "prompt lookup", "static cache"],
)
def test_every_decoding_mode_gives_the_same_tokens(settings, saved, nothing_left):
    reference, model = load_both(saved("llama"), "llama")
    with model:
        ids = IDS[:1]
        torch.manual_seed(1)
        expected = reference.generate(ids, max_new_tokens=8, pad_token_id=0, **settings)
        torch.manual_seed(1)
        assert torch.equal(expected, model.generate(ids, max_new_tokens=8, pad_token_id=0, **settings))


def test_views_of_a_weight_carry_its_requires_grad_flag(saved, nothing_left):
    """matmul asks `weight.t()` for the flag, and folds the batch, or copies the whole weight, by the answer."""
    reference, model = load_both(saved("llama"), "llama")
    streamed = [p for p in model.parameters() if type(p) is not torch.nn.Parameter]
    assert streamed
    with model, torch.no_grad():
        for parameter in streamed:
            real = parameter.source.whole(parameter.weight)
            assert real.t().requires_grad == next(reference.parameters()).t().requires_grad
            del real
        for length in (1, 5, 12):
            hidden = torch.randn(1, length, 64)[:, -1:, :]
            assert torch.equal(reference.lm_head(hidden), model.lm_head(hidden))


def test_two_models_interleave_in_assisted_generation(saved, nothing_left):
    reference, model = load_both(saved("llama"), "llama")
    _, assistant = load_both(saved("qwen2"), "qwen2")
    with model, assistant:
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(IDS[:1], **settings)
        assert torch.equal(expected, model.generate(IDS[:1], assistant_model=assistant, **settings))


def test_a_model_with_weight_norm_loads_and_stays_exact(tmp_path, nothing_left):
    """Its loader initialises a weight that is computed from the parametrization."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    reference = transformers.Wav2Vec2Model.from_pretrained(tmp_path).eval()
    sound = torch.randn(1, 800)
    with torch.no_grad(), stream(str(tmp_path), 60_000) as model:
        for _ in range(2):
            assert torch.equal(reference(sound).last_hidden_state, model(sound).last_hidden_state)


def deberta(**options: int) -> transformers.DebertaV2Config:
    return transformers.DebertaV2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=64,
        **options,
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tables_that_are_used_whole_work_at_every_budget(share, tmp_path, nothing_left):
    """DeBERTa multiplies with its nn.Embedding of relative positions."""
    config = deberta(position_buckets=32, vocab_size=256)
    torch.manual_seed(0)
    transformers.DebertaV2Model(config).save_pretrained(tmp_path)
    reference = transformers.DebertaV2Model.from_pretrained(tmp_path).eval()
    budget = int(share * architectures.parameter_bytes(reference))
    with torch.no_grad(), stream(str(tmp_path), budget) as model:
        assert torch.equal(reference(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_autocast_gives_the_same_bits_and_keeps_no_weight(saved, nothing_left):
    reference, model = load_both(saved("llama"), "llama")
    with model, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert torch.equal(reference(IDS).logits, model(IDS).logits)


def test_gradients_through_streamed_weights_are_refused(saved, nothing_left):
    _, model = load_both(saved("llama"), "llama")
    with model:
        embeds = torch.randn(1, 5, 64, requires_grad=True)
        hidden = model.model(inputs_embeds=embeds).last_hidden_state
        with pytest.raises(zinfer.ReadOnlyError, match="gradients"):
            hidden.sum().backward()


def test_a_large_table_used_whole_says_how_much_is_lacking(tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr("zinfer.planner.placement.ROWS_WINDOW", 0)
    config = deberta(position_buckets=256, vocab_size=64)
    transformers.DebertaV2Model(config).save_pretrained(tmp_path)
    with (
        torch.no_grad(),
        stream(str(tmp_path), 1) as model,
        pytest.raises(zinfer.BudgetError, match=r"rel_embeddings.*raise max_memory\['cpu'\] by \d+ bytes"),
    ):
        model(torch.tensor([[5, 17, 33]]))
