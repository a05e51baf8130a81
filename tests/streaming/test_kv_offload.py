"""Key-value caches in host memory: the same tokens, two layers on the device, and no byte read too early or late."""

from __future__ import annotations

import copy
import gc
import random
import threading

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.devices import CACHED, IDS, ROWS, WAYS, assert_generates_the_same, run_within, saved_of
from tests.streaming.test_attached import MEMORY, finish, staged
from zinfer.device.staged import StagedProcessor
from zinfer.kv_cache import cache_bytes
from zinfer.kv_offload.layers import layers_on_host

PLENTY = 1 << 30
CACHES = 200_000  # bytes: what the longest of these tests caches, and its activations


def deep(layers: int):
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(
        **(architectures._DENSE | {"num_hidden_layers": layers})
    )


@pytest.fixture
def pair(tmp_path, nothing_left):
    """Save a model; returns it in memory, and its twin whose caches go to the host, with the staged device."""
    made = []

    def make(source, *, seed: int = 0, device: float = 0.4, host: int = PLENTY, **options):
        folder = str(tmp_path / f"model-{len(made)}")
        cls = saved_of(source, folder, seed)
        reference = cls.from_pretrained(
            folder
        ).eval()  # mapped: what it computes depends on addresses, see design.md
        processor = staged(seed)
        nbytes = int(architectures.parameter_bytes(reference) * device) + 2 * CACHES
        options = {"offload": "nvme", "kv_offload": "cpu"} | options
        model = run_within(folder, processor, nbytes, host, **options)
        made.append((model, processor))
        return reference, model, processor

    yield make
    for model, processor in made:
        finish(model, processor)


@pytest.mark.parametrize("name", CACHED)
def test_every_kind_of_attention_is_bit_equal(name, pair):
    reference, model, _ = pair(name, seed=len(name))
    assert_generates_the_same(reference, model, IDS)
    assert_generates_the_same(reference, model, ROWS)


@pytest.mark.parametrize("name", ["llama", "gemma2_that_slides", "mistral_that_slides"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_decode_is_bit_equal(way, name, pair):
    reference, model, _ = pair(name, seed=len(way))
    ids = IDS.repeat(1, 3) if way == "prompt lookup" else ROWS
    assert_generates_the_same(reference, model, ids, **WAYS[way])


@pytest.mark.parametrize("name", ["llama", "gemma2_that_slides"])
def test_assisted_generation_takes_positions_back(name, pair):
    reference, model, _ = pair(name)
    torch.manual_seed(99)
    assistant = type(reference)(copy.deepcopy(reference.config)).eval()
    with torch.no_grad():  # agrees sometimes, which is when positions stay and others go
        for one, other in zip(assistant.parameters(), reference.parameters(), strict=True):
            one.copy_(0.95 * other + 0.05 * one)
    assert_generates_the_same(reference, model, IDS, assistant_model=assistant, max_new_tokens=30)


def test_both_the_model_and_its_assistant_may_keep_their_caches_on_the_host(pair):
    reference, model, _ = pair("llama")
    second, assistant, _ = pair("llama", seed=5)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(IDS, assistant_model=second, **settings)
    assert torch.equal(model.generate(IDS, assistant_model=assistant, **settings), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2_that_slides"])
def test_a_long_generation_is_bit_equal(name, pair):
    reference, model, _ = pair(name)
    assert_generates_the_same(reference, model, IDS, max_new_tokens=150)


def by_hand(model, ids, count, cache=None):
    """Greedy logits and the cache."""
    out = []
    with torch.no_grad():
        for _ in range(count):
            result = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
            out.append(result.logits)
    return out, cache


def assert_equal(expected, found):
    for there, here in zip(expected, found, strict=True):
        assert torch.equal(there, here)


def test_a_loop_by_hand_has_its_cache_on_the_host_unless_it_brings_its_own(pair):
    reference, model, _ = pair("gemma2_that_slides")
    expected, _ = by_hand(reference, ROWS, 9)
    found, cache = by_hand(model, ROWS, 9)
    assert_equal(expected, found)
    assert len(layers_on_host(cache)) == 4
    own = transformers.DynamicCache(config=model.config)
    found, cache = by_hand(model, ROWS, 9, own)
    assert_equal(expected, found)
    assert cache is own and not layers_on_host(own)
    given = transformers.DynamicCache(config=model.config)
    model.generate(ROWS, past_key_values=given, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not layers_on_host(given)


def test_a_pass_without_a_cache_makes_none(pair):
    reference, model, _ = pair("llama")
    result = model(ROWS, use_cache=False)
    assert result.past_key_values is None
    assert torch.equal(result.logits, reference(ROWS).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2_that_slides"])
def test_a_cache_can_be_cropped_selected_repeated_reset_and_copied(name, pair):
    if not hasattr(transformers.DynamicCache, "activate_past_recording"):
        pytest.skip("this transformers cannot take positions of a window back")
    reference, model, _ = pair(name)

    def story(one):
        out, cache = by_hand(one, ROWS, 2)
        cache.activate_past_recording()
        seen = [*out, *by_hand(one, ROWS[:, :5], 1, cache)[0]]
        cache.crop(-3)
        seen += by_hand(one, ROWS[:, :1], 1, cache)[0]
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        seen += by_hand(one, ROWS[:, :2].repeat_interleave(2, 0), 1, cache)[0]
        cache.crop(0)
        cache.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1]))
        twin = copy.deepcopy(cache)
        seen += by_hand(one, ROWS[:, 2:4].repeat(2, 1), 1, cache)[0]
        cache.crop(0)
        cache.batch_select_indices(torch.tensor([4, 1]))
        seen += by_hand(one, ROWS[:2, :1], 3, cache)[0]
        seen += by_hand(one, ROWS[:, :1].repeat(2, 1), 2, twin)[0]
        lengths = [cache.get_seq_length(), twin.get_seq_length()]
        cache.reset()
        seen += by_hand(one, ROWS[:1], 2, cache)[0]
        return seen, lengths

    expected, lengths = story(reference)
    found, same = story(model)
    assert lengths == same
    assert_equal(expected, found)


def test_a_prompt_that_was_cached_once_serves_several_questions(pair):
    reference, model, _ = pair("llama")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    _, prompt = by_hand(model, IDS, 1)
    for question in ROWS:
        ids = torch.cat([IDS, question[None]], dim=1)
        found = model.generate(ids, past_key_values=copy.deepcopy(prompt), **settings)
        assert torch.equal(found, reference.generate(ids, **settings))
    assert prompt.get_seq_length() == IDS.shape[1]


def test_threads_with_a_cache_each_share_the_memory(pair):
    reference, model, _ = pair("gemma2_that_slides", seed=4)
    prompts = [ROWS[:1, : 2 + number] for number in range(4)]
    expected = [by_hand(reference, ids, 20)[0] for ids in prompts]
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                assert_equal(expected[number], by_hand(model, prompts[number], 20)[0])
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def peak_of_caches(layers: int, tokens: int, tmp_path) -> tuple[int, int]:
    """Most bytes of the device that a generation takes besides weights, and those of the whole cache."""
    cls, config = deep(layers)
    torch.manual_seed(0)
    folder = str(tmp_path / f"{layers}-{tokens}")
    cls(config).save_pretrained(folder)
    processor = StagedProcessor(MEMORY, check=True)
    model = zinfer.run(folder, device=processor, offload="cpu", kv_offload="cpu", progress=False)
    with torch.no_grad():
        model(IDS, use_cache=False)
    before = processor.peak
    answer = model.generate(
        ROWS, max_new_tokens=tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in answer.past_key_values.layers)
    largest = whole // layers
    assert cache_bytes(answer.past_key_values) <= 2.2 * largest + 10_000
    peak = processor.peak - before  # the layer that comes; the one that is computed with is torch's
    assert peak <= 1.1 * largest + 10_000
    assert model.zinfer.report().cache_bytes >= whole
    del answer
    finish(model, processor)
    return peak, whole


def test_the_device_holds_two_layers_however_many_there_are(tmp_path):
    few, small = peak_of_caches(2, 100, tmp_path)
    many, large = peak_of_caches(8, 100, tmp_path)
    assert large == 4 * small
    assert many <= few + 1000
    longer, _ = peak_of_caches(8, 200, tmp_path)
    assert longer < 2.3 * many


def test_operators_and_copies_overlap_one_layer_ahead(tmp_path):
    """The layer that comes next was asked for before its operators run, the first one during the token before."""
    cls, config = deep(3)
    folder = str(tmp_path / "model")
    cls(config).save_pretrained(folder)
    asked: list[str] = []
    processor = StagedProcessor(MEMORY)
    model = zinfer.run(folder, device=processor, offload="cpu", kv_offload="cpu", progress=False)
    copy_cache = processor.copy_cache

    def told(moves, after, *, back):
        asked.append("back" if back else "into")
        return copy_cache(moves, after, back=back)

    processor.copy_cache = told
    _, cache = by_hand(model, IDS.repeat(1, 6), 1)
    assert asked == ["back"] * 3
    asked.clear()
    step = torch.tensor([[3]])
    for count in (1, 2):
        by_hand(model, step, 1, cache)
        # First token: layer 0 on demand; then always the layer before the operators that need it
        assert asked == (["into"] if count == 1 else []) + ["back", "into"] * 3
        asked.clear()
    model.zinfer.close()


def test_a_cache_beyond_the_hosts_budget_is_refused_before_a_read_and_names_what_would_do(pair):
    total = 2_000_000
    reference, model, _ = pair("llama", device=400.0, host=total)
    read = model.zinfer.bytes_read
    rows = IDS.repeat(6000, 1)
    with pytest.raises(zinfer.BudgetError, match=r"at most (\d+) of its 6000 sequences fit") as caught:
        model(rows)
    assert model.zinfer.bytes_read == read
    fit = int(str(caught.value).split("at most ")[1].split()[0])
    ids = IDS.repeat(fit, 1)
    result = model(ids)
    assert torch.equal(result.logits, reference(ids).logits)
    report = model.zinfer.report()
    assert 0 < report.cache_bytes <= total - report.window_bytes - report.bounce_bytes
    del result
    gc.collect()
    with pytest.raises(zinfer.BudgetError):
        model(IDS.repeat(fit + 1, 1))


def test_the_budget_that_the_refusal_names_works(pair):
    rows = IDS.repeat(600, 1)
    _, model, _ = pair("llama", device=400.0, host=500_000)
    with pytest.raises(zinfer.BudgetError) as caught:
        model(rows)
    reference, model, _ = pair("llama", device=400.0, host=caught.value.smallest)
    assert torch.equal(model(rows).logits, reference(rows).logits)


def test_the_host_budget_counts_caches_beside_weights(pair):
    _, model, _ = pair("llama", device=0.3, host=400_000)
    report = model.zinfer.report()
    weights = report.planned_resident_bytes + report.window_bytes + report.bounce_bytes
    answer = model.generate(ROWS, max_new_tokens=10, pad_token_id=0, return_dict_in_generate=True)
    held = model.zinfer.report().cache_bytes
    assert held >= sum(layer.keys.nbytes + layer.values.nbytes for layer in answer.past_key_values.layers)
    assert weights + held <= report.budget
    del answer
    gc.collect()
    model.zinfer.caches._space.settle()
    assert model.zinfer.report().cache_bytes == 0


def test_no_cache_outlives_its_model_unnoticed(pair):
    _, model, _ = pair("llama")
    _, cache = by_hand(model, IDS, 2)
    model.zinfer.close()
    with pytest.raises(zinfer.ClosedError):
        by_hand(model, IDS, 1, cache)
    with pytest.raises(zinfer.ClosedError):
        copy.deepcopy(cache)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "cross-attention"),
        ("bart", "cross-attention"),
        ("mamba", "recurrent state"),
        ("mamba2", "recurrent state"),
        ("bert", "generates no text"),
    ],
)
def test_models_whose_caches_cannot_go_there_are_refused_with_the_reason(name, words, saved):
    with pytest.raises(zinfer.OptionError, match=words):
        zinfer.run(saved(name), device=StagedProcessor(MEMORY), kv_offload="cpu")


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "offloaded", "quantized", "paged"])
def test_caches_of_a_kind_that_cannot_go_there_are_refused_before_anything_is_read(kind, pair):
    reference, model, _ = pair("llama")
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    before = model.zinfer.bytes_read
    with pytest.raises(zinfer.OptionError, match=f"'{kind}'.*leave cache_implementation out"):
        model.generate(IDS, cache_implementation=kind, **settings)
    if kind != "paged":  # generate() looks at the argument alone
        given = transformers.GenerationConfig(cache_implementation=kind, **settings)
        with pytest.raises(zinfer.OptionError, match=kind):
            model.generate(IDS, generation_config=given)
        model.generation_config.cache_implementation = kind
        with pytest.raises(zinfer.OptionError, match=kind):
            model.generate(IDS, **settings)
    assert model.zinfer.bytes_read == before
    assert_generates_the_same(reference, model, IDS, cache_implementation="dynamic")
    model.generation_config.cache_implementation = (
        "hybrid"  # of old checkpoints: transformers takes a plain one
    )
    assert_generates_the_same(reference, model, IDS)


def test_no_kind_is_refused_where_no_cache_is_made_or_the_caller_has_one(pair):
    reference, model, _ = pair("llama")
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, use_cache=False, **settings), expected)
    own = transformers.StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(model.generate(IDS, past_key_values=own, **settings), expected)


def test_the_option_is_refused_where_it_has_no_effect(saved):
    folder = saved("llama")
    with pytest.raises(zinfer.OptionError, match="where the CPU computes"):
        zinfer.run(folder, device="cpu", kv_offload="cpu")
    for wrong in ("nvme", True, 3):
        with pytest.raises(zinfer.OptionError, match="give 'cpu'"):
            zinfer.run(folder, device=StagedProcessor(MEMORY), kv_offload=wrong)


def test_a_thousand_tokens_with_late_copies_and_poisoned_memory(pair):
    """Caches that come, grow, are reordered and go, at random, against the same in memory."""
    reference, model, _ = pair("gemma2_that_slides", seed=8)
    dice = random.Random(8)
    tokens = 0
    while tokens < 1000:
        count = dice.randint(1, 60)
        ids = torch.randint(
            1, 255, (dice.randint(1, 4), dice.randint(1, 12)), generator=torch.Generator().manual_seed(tokens)
        )
        assert_equal(by_hand(reference, ids, count)[0], by_hand(model, ids, count)[0])
        tokens += count
