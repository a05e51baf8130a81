"""The promise: same logits and same tokens, bit for bit, as the model held in memory."""

from __future__ import annotations

import pytest
import torch

import zinfer
from tests import architectures

IDS = torch.tensor([[5, 17, 33, 101, 200, 9, 77], [8, 3, 250, 41, 6, 90, 12]])
BUDGET_SHARE = 0.55  # of the weights' bytes: some stay, most stream, many times over


def stream(folder: str, budget: int, **options):
    """Stream within `budget` bytes, or within the fewest that work."""
    try:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": budget}, **options)
    except zinfer.BudgetError as error:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": error.smallest}, **options)


def load_both(folder: str, name: str, **options):
    cls = architectures.ALL[name][0]
    reference = cls.from_pretrained(folder, **options).eval()
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
    reference = architectures.ALL[name][0].from_pretrained(folder).eval()
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
