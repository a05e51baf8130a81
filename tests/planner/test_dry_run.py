"""Flops, bytes and cache that a model without data tells, against formulas and against the model with data."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests import architectures
from zinfer.dry_run import DryRunError, dry_run
from zinfer.outline import outline_of
from zinfer.parts import gather
from zinfer.planner.cost import Work

aten = torch.ops.aten

BATCH, PROMPT, NEW = 2, 12, 4


def noted_apart(model, held) -> Work:
    """The work where no operator is taken for another that was like it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zinfer.pass_recorder._shapes", lambda *_: None)
        return dry_run(model, held, BATCH, PROMPT, NEW)


def work_of(name: str, **changes: int) -> tuple[Work, list]:
    config = copy.deepcopy(architectures.ALL[name][1])
    config.architectures = [architectures.ALL[name][0].__name__]
    config.update(changes)
    model = outline_of(config, torch.float32, {}).model
    held = gather(model)
    return dry_run(model, held, BATCH, PROMPT, NEW), held


def cache_bytes(cache: object) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", [*architectures.CAUSAL, *architectures.SEQ2SEQ])
def test_every_architecture_that_generates_runs_without_data(name):
    work, held = work_of(name)
    assert work.prefill.flops > work.decode.flops > 0
    assert work.cache_bytes > 0
    assert work.activation_bytes > 0
    asked = {index for index, share in work.decode.asks if share == 1}
    if name not in architectures.SEQ2SEQ:
        missing = {held[i].slots[0].name for i in range(len(held)) if i not in asked}
        allowed = ("embed", "wte", "wpe", "experts", "position")  # rows of tables, and experts on demand
        assert all(any(word in one for word in allowed) for one in missing), missing


def test_a_sweep_of_an_encoder_is_one_pass_without_a_cache():
    work, _ = work_of("bert")
    assert work.prefill == work.decode
    assert work.cache_bytes == 0


def test_decoding_leaves_the_encoder_alone():
    work, held = work_of("t5")
    names = {held[index].slots[0].name for index, _ in work.decode.asks}
    assert not any(name.startswith("encoder.") for name in names)
    assert any(name.startswith("decoder.") for name in names)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "falcon", "gpt2"])
def test_flops_of_weights_are_those_that_torch_counts_on_the_model_with_data(name):
    work, _ = work_of(name)
    model = architectures.build(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(BATCH, PROMPT, dtype=torch.long), logits_to_keep=1)
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for func, flops in counted.items() if func in (aten.mm, aten.addmm))
    found = sum(op.flops * op.count for op in work.prefill.operators if op.kind == "matmul")
    assert products <= found <= 1.001 * products  # rotary positions are a product too


def test_attention_is_two_products_over_the_triangle_of_a_prompt_and_over_the_cache_of_a_token():
    work, _ = work_of("llama")
    config = architectures.CAUSAL["llama"][1]
    each = 2 * 2 * config.num_hidden_layers * BATCH * config.hidden_size

    def attention(operators: tuple) -> float:
        return sum(op.flops * op.count for op in operators if op.kind == "attention")

    assert attention(work.prefill.operators) == each * PROMPT * PROMPT / 2
    assert attention(work.decode.operators) == each * (PROMPT + NEW // 2 + 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "opt", "mixtral"])
def test_the_cache_takes_what_it_takes_in_the_model_with_data(name):
    changes = {"sliding_window": 8} if name == "gemma3" else {}
    work, _ = work_of(name, **changes)
    cls, config = architectures.ALL[name]
    config = copy.deepcopy(config)
    config.update(changes)
    model = cls(config).eval()
    ids = torch.zeros(BATCH, PROMPT + NEW - 1, dtype=torch.long)
    with torch.no_grad():
        held = cache_bytes(model(ids).past_key_values)
    assert held <= work.cache_bytes <= held + 64  # a sliding window counts its tokens in a tensor


def test_a_row_of_a_sparse_model_computes_with_its_experts_alone():
    one, _ = work_of("mixtral", num_experts_per_tok=1)
    two, _ = work_of("mixtral", num_experts_per_tok=2)
    config = architectures.CAUSAL["mixtral"][1]
    expert = 2 * BATCH * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    assert two.decode.flops - one.decode.flops == expert


def test_all_experts_are_read_unless_they_are_read_on_demand():
    def shares(name: str) -> set[float]:
        work, held = work_of(name)
        return {share for index, share in work.decode.asks if held[index].tensor.dim() == 3}

    assert shares("qwen3_moe") == {1.0}
    (share,) = shares("qwen3_moe_eager_experts")
    assert share == pytest.approx(1 - (1 - 2 / 8) ** BATCH)  # 8 experts, 2 distinct ones for each of the rows


def test_a_token_that_chooses_every_expert_reads_them_all():
    work, held = work_of("qwen3_moe_eager_experts", num_experts_per_tok=8)
    assert {share for index, share in work.decode.asks if held[index].tensor.dim() == 3} == {1.0}


class ReadsItsInput(transformers.LlamaForCausalLM):
    """A model whose path depends on data."""

    def forward(self, input_ids: torch.Tensor, **fields: object) -> object:
        """As Llama's, after a look at the input."""
        if int(input_ids.sum()) > 3:
            return None
        return super().forward(input_ids, **fields)


def test_a_model_that_looks_at_its_data_says_so():
    config = copy.deepcopy(architectures.CAUSAL["llama"][1])
    model = outline_of(config, torch.float32, {}).model
    held = gather(model)
    model.__class__ = ReadsItsInput
    with pytest.raises(DryRunError, match="item"):
        dry_run(model, held, 1, 4, 4)


@pytest.mark.parametrize(
    "error", [AssertionError, ZeroDivisionError, ImportError, RecursionError, NotImplementedError, KeyError]
)
def test_whatever_a_model_raises_without_data_is_a_refusal(error, monkeypatch):
    config = copy.deepcopy(architectures.CAUSAL["llama"][1])
    model = outline_of(config, torch.float32, {}).model
    held = gather(model)

    def refuse(*_: object, **__: object) -> None:
        raise error("no data")

    monkeypatch.setattr(type(model), "forward", refuse)
    with pytest.raises(DryRunError, match=error.__name__):
        dry_run(model, held, 1, 4, 4)


@pytest.mark.parametrize("name", architectures.ALL)
def test_operators_that_are_taken_for_alike_are(name):
    def outline():
        config = copy.deepcopy(architectures.ALL[name][1])
        config.architectures = [architectures.ALL[name][0].__name__]
        model = outline_of(config, torch.float32, {}).model
        return model, gather(model)

    try:
        apart = noted_apart(*outline())
    except DryRunError:
        with pytest.raises(DryRunError):
            dry_run(*outline(), BATCH, PROMPT, NEW)
    else:
        assert dry_run(*outline(), BATCH, PROMPT, NEW) == apart
