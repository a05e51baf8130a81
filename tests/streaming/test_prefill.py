"""Prompts whose activations do not fit are prefilled in chunks, and what a plan says fits can be generated."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.planner.machines import cpu, gpu, measure_quickly
from tests.streaming.devices import (
    CHUNKING,
    MIB,
    NEW,
    PROMPT,
    PROMPTS,
    SETTINGS,
    assert_chunks_are_equal,
    chunk_said,
    llama_in,
    long_prompts,
    run_within,
)
from tests.streaming.test_attached import finish, staged
from zinfer import BudgetError, budgets, residency
from zinfer.kv_cache import Pass, activation_bytes, prefills_in_chunks
from zinfer.pass_recorder import Recorder
from zinfer.planner.chunks import SMALLEST_CHUNK, chunks_of
from zinfer.prefill import Prefill


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a llama, and the same in memory."""
    folder = str(tmp_path_factory.mktemp("prefill") / "llama")
    return folder, llama_in(folder).from_pretrained(folder).eval()


@pytest.fixture
def ids():
    return long_prompts()


@pytest.fixture
def on_staged(llama, nothing_left):
    folder, reference = llama
    processor = staged()
    model = run_within(folder, processor, **CHUNKING, offload="nvme")
    yield model, reference
    finish(model, processor)


def lengths(model) -> list[int]:
    """Tokens of each pass from now on."""
    found: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return found


def test_a_long_prompt_comes_in_as_few_chunks_as_fit_and_logits_are_equal(on_staged, ids, caplog):
    model, reference = on_staged
    passes = lengths(model)
    assert_chunks_are_equal(model, reference, ids)
    chunk = chunk_said(model)
    assert chunk is not None and SMALLEST_CHUNK < chunk < PROMPT
    count = chunks_of(PROMPT, chunk)
    assert passes == [chunk] * (count - 1) + [PROMPT - (count - 1) * chunk] + [1] * (NEW - 1)
    room = 24 * MIB - model.zinfer._streaming.account.small
    cache = 2 * 4 * 4 * 32 * 4 * PROMPTS * (PROMPT + NEW - 1)
    last = Pass(PROMPTS, PROMPT - (count - 1) * chunk, 1)
    assert activation_bytes(reference.config, 4, last, (count - 1) * chunk) + cache <= room
    one_less = Pass(PROMPTS, -(-PROMPT // (count - 1)), 1)
    assert activation_bytes(reference.config, 4, one_less, PROMPT - one_less.tokens) + cache > room - 2 * MIB
    model.generate(ids, **SETTINGS)
    said = [
        r.getMessage() for r in caplog.records if "was prefilled in" in r.getMessage() and r.levelno >= 30
    ]
    assert len(said) == 1 and f"{PROMPTS} x {PROMPT} tokens" in said[0]


def test_tokens_are_those_of_a_prompt_that_is_not_cut(on_staged, ids):
    model, reference = on_staged
    assert model.generate(ids, **SETTINGS).tolist() == reference.generate(ids, **SETTINGS).tolist()
    assert chunk_said(model) is not None


def test_sequences_of_different_lengths_are_equal_too(on_staged, ids):
    model, reference = on_staged
    mask = torch.ones_like(ids)
    mask[1, :100] = mask[2, :7] = 0
    assert_chunks_are_equal(model, reference, ids, attention_mask=mask)
    assert chunk_said(model) is not None


def test_beams_count_as_sequences(on_staged, ids):
    model, reference = on_staged
    passes = lengths(model)
    settings = SETTINGS | {"num_beams": 4}
    ours = model.generate(ids[:1], **settings)
    chunk = chunk_said(model)
    assert chunk is not None and max(passes) == chunk
    assert torch.equal(ours, reference.generate(ids[:1], prefill_chunk_size=chunk, **settings))


def test_a_prompt_that_fits_is_not_cut(on_staged, ids):
    model, reference = on_staged
    assert_chunks_are_equal(model, reference, ids[:1, :100])
    assert chunk_said(model) is None


def test_the_chunk_that_the_user_asks_for_is_taken(on_staged, ids):
    model, reference = on_staged
    passes = lengths(model)
    assert_chunks_are_equal(model, reference, ids, prefill_chunk_size=200)
    assert passes[:2] == [200, PROMPT - 200]
    assert chunk_said(model) is None


def test_what_a_user_wants_of_each_position_is_left_whole(on_staged, ids):
    model, reference = on_staged
    settings = SETTINGS | {"return_dict_in_generate": True, "output_hidden_states": True}
    ours, theirs = (m.generate(ids, **settings).hidden_states[0][-1] for m in (model, reference))
    assert ours.shape == theirs.shape == (PROMPTS, PROMPT, 256)
    assert chunk_said(model) is None


def test_a_prompt_of_embeddings_is_left_whole(on_staged, ids):
    model, reference = on_staged
    embedded = reference.get_input_embeddings()(ids).detach()
    passes = []
    model.register_forward_pre_hook(lambda _, a, k: passes.append(k["inputs_embeds"]), with_kwargs=True)
    settings = SETTINGS | {"max_new_tokens": 1}
    ours = model.generate(inputs_embeds=embedded, **settings)
    assert torch.equal(ours, reference.generate(inputs_embeds=embedded, **settings))
    assert len(passes) == 1


def test_a_conversation_goes_on_with_chunks(on_staged, ids):
    """What is in the cache already is not computed again."""
    model, reference = on_staged
    out = []
    for one in (model, reference):
        cache = transformers.DynamicCache(config=reference.config)
        with torch.no_grad():
            one(input_ids=ids[:, :64], past_key_values=cache, use_cache=True)
        passes = lengths(one)
        chunk = {} if one is model else {"prefill_chunk_size": chunk_said(model)}
        out.append(one.generate(ids, past_key_values=cache, **chunk, **SETTINGS))
        assert sum(passes[: -(NEW - 1)]) == PROMPT - 64
        assert len(passes) > NEW
        del cache
        gc.collect()
    assert torch.equal(*out)


def test_on_the_cpu_what_the_machine_has_free_is_what_counts(llama, ids, monkeypatch):
    folder, reference = llama
    free = 26 * MIB
    monkeypatch.setattr(budgets, "free_memory", lambda: free)
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": 16 * MIB}) as model:
        assert_chunks_are_equal(model, reference, ids)
        chunk = chunk_said(model)
        assert chunk is not None and SMALLEST_CHUNK < chunk < PROMPT
    free = 1 << 30
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": 16 * MIB}) as model:
        assert_chunks_are_equal(model, reference, ids)
        assert chunk_said(model) is None


def test_the_caches_in_host_memory_leave_room_for_larger_chunks(llama, ids):
    folder, reference = llama
    chunks = []
    for kv_offload in (None, "cpu"):
        processor = staged()
        budget = {0: 18 * MIB, "cpu": 96 * MIB}
        model = zinfer.run(folder, device=processor, offload="nvme", max_memory=budget, kv_offload=kv_offload)
        assert_chunks_are_equal(model, reference, ids)
        chunks.append(chunk_said(model) or PROMPT)
        finish(model, processor)
    assert chunks[0] < chunks[1]


CACHING = [name for name in architectures.ALL if architectures.build(name).can_generate()]


@pytest.mark.parametrize("name", CACHING)
def test_every_architecture_is_cut_where_that_is_right_and_left_whole_elsewhere(name, saved, monkeypatch):
    """However little room there is: the tokens are those of a prompt that is not cut."""
    monkeypatch.setattr(Prefill, "_room", lambda *_: 1)
    folder = saved(name)
    reference = architectures.reference(name, folder)
    torch.manual_seed(2)
    ids = torch.randint(5, 100, (2, 2 * SMALLEST_CHUNK + 5))
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": "4MiB"}) as model:
        ours = model.generate(ids, **SETTINGS)
        assert (chunk_said(model) is not None) == prefills_in_chunks(reference.config)
        assert torch.equal(ours, reference.generate(ids, **SETTINGS))


def test_what_encodes_positions_by_their_number_or_looks_ahead_is_not_cut():
    plain = transformers.LlamaConfig()
    assert prefills_in_chunks(plain)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not prefills_in_chunks(transformers.LlamaConfig(rope_parameters=rope))
    assert not prefills_in_chunks(transformers.Gemma3TextConfig(use_bidirectional_attention=True))
    assert not prefills_in_chunks(transformers.T5Config())
    assert not prefills_in_chunks(transformers.MambaConfig())
    assert not prefills_in_chunks(transformers.Qwen3NextConfig())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [PROMPT, 96])
def test_a_pass_takes_no_more_than_is_foreseen(chunk, attention, padded, llama, ids):
    """Nor far less: what is foreseen in vain makes weights leave, and chunks smaller."""
    reference = transformers.LlamaForCausalLM.from_pretrained(llama[0], attn_implementation=attention).eval()
    weights = {p.untyped_storage()._cdata: i for i, p in enumerate(reference.parameters())}
    cache = transformers.DynamicCache(config=reference.config)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad(), Recorder(weights, on_demand=False) as recorder:
        for start in range(0, PROMPT, chunk):
            end = start + chunk
            inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "logits_to_keep": 1}
            reference(**inputs, past_key_values=cache, use_cache=True)
    cached = 2 * 4 * 4 * 32 * 4 * PROMPTS * PROMPT
    coming = Pass.of({"input_ids": ids[:, -chunk:], "attention_mask": mask, "logits_to_keep": 1})
    assert coming == Pass(PROMPTS, chunk, 1, masked=padded)
    foreseen = activation_bytes(reference.config, 4, coming, PROMPT - chunk)
    assert cached + foreseen / 3 < recorder.peak <= cached + foreseen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plan_foresees_the_activations_that_a_run_does(attention, llama, ids, monkeypatch):
    folder, _ = llama
    foreseen = []

    def noted(*args):
        foreseen.append(activation_bytes(*args))
        return foreseen[-1]

    measure_quickly(monkeypatch)
    monkeypatch.setattr(residency, "activation_bytes", noted)
    processor, budget = staged(), {0: 512 * MIB, "cpu": 64 * MIB}
    with zinfer.run(
        folder, device=processor, max_memory=budget, attn_implementation=attention, offload="nvme"
    ) as model:
        model.generate(ids, **SETTINGS)
    options = {"prompt": PROMPT, "batch": PROMPTS, "new_tokens": NEW, "attn_implementation": attention}
    plan = zinfer.plan(folder, device=staged(), max_memory=budget, offload="nvme", **options)
    assert plan.activation_bytes == foreseen[0]
    scores = 2 * 4 * 8 * PROMPTS * PROMPT * PROMPT
    assert (foreseen[0] > scores) == (attention == "eager")


def test_a_padded_prompt_counts_its_masks():
    config = transformers.LlamaConfig(num_hidden_layers=2)
    ids = torch.ones(3, 100, dtype=torch.long)
    mask = torch.ones_like(ids)
    whole = activation_bytes(config, 4, Pass.of({"input_ids": ids, "attention_mask": mask}))
    mask[0, :2] = 0
    padded = activation_bytes(config, 4, Pass.of({"input_ids": ids, "attention_mask": mask}))
    assert padded - whole >= 3 * 100 * 100 * 5
    config.sliding_window = 64
    assert activation_bytes(config, 4, Pass(3, 100, 100)) == padded


def plans_and_runs(folder, reference, hardware, budget, prompt, **options):
    """Generate with the largest batch that the plan says fits, and with the chunks that it says."""
    task = {"max_memory": budget, "prompt": prompt, "new_tokens": NEW, "offload": "nvme"}
    most = zinfer.plan(folder, hardware=hardware, **task).largest_batch
    assert most > 1
    plan = zinfer.plan(folder, hardware=hardware, batch=most, **task)
    with pytest.raises(BudgetError):
        zinfer.plan(folder, hardware=hardware, batch=most + 1, **task)
    torch.manual_seed(3)
    ids = torch.randint(1, 500, (most, prompt))
    model = zinfer.run(folder, offload="nvme", max_memory=budget, **options)
    assert_chunks_are_equal(model, reference, ids)
    assert (chunk_said(model) or prompt) == plan.prefill_chunk < prompt
    sweeps = model.zinfer.sweeps
    assert sweeps == chunks_of(prompt, plan.prefill_chunk) + NEW - 1
    assert any(f"in {sweeps - NEW + 1} chunks of {plan.prefill_chunk} tokens" in note for note in plan.notes)
    return plan, model


def test_the_largest_batch_of_a_plan_can_be_generated_on_a_device(llama, caplog):
    folder, reference = llama
    processor = staged()
    budget = {0: 24 * MIB, "cpu": 32 * MIB}
    plan, model = plans_and_runs(folder, reference, gpu(), budget, PROMPT, device=processor)
    assert "more than the machine has free" not in caplog.text
    finish(model, processor)
    whole = zinfer.plan(
        folder, hardware=gpu(), max_memory=budget | {0: "1GiB"}, prompt=PROMPT, batch=plan.batch
    )
    assert whole.prefill_chunk == PROMPT
    assert plan.first_token_seconds > whole.first_token_seconds


def test_the_largest_batch_of_a_plan_can_be_generated_on_the_cpu(llama, caplog, monkeypatch):
    folder, reference = llama
    free = 72 * MIB
    monkeypatch.setattr(budgets, "free_memory", lambda: free)
    monkeypatch.setattr(budgets, "total_memory", lambda: free)
    plan, model = plans_and_runs(folder, reference, cpu(host_memory=free), {"cpu": 60 * MIB}, PROMPT)
    assert plan.activation_bytes > 0
    assert "more than the machine has free" not in caplog.text
    model.zinfer.close()
