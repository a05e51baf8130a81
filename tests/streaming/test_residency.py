"""The ceiling holds for weights and key-value caches together: residents leave as caches grow, and return."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import transformers

from tests import architectures
from tests.streaming.running import check_device, smallest
from zinfer import BudgetError, run
from zinfer.kv_cache import Pass, cache_bytes, cache_growth
from zinfer.streaming import StreamedParameter

IDS = torch.arange(7).reshape(1, 7)
ITEM = 4
COUNTERS = 256  # bytes of the small tensors in which some caches count positions


def resident_weights(model):
    return {w.name for w in model.zinfer._streaming.weights if w.resident is not None}


def wanted(model):
    return {w.name for w in model.zinfer._streaming.weights if w.wants_residence}


def account_bytes(model):
    account = model.zinfer._streaming.account
    return account.residents + account.window + account.conversions + account.small + account.bounce


def decode(model, ids, count, cache=None):
    """Greedy tokens and the cache, by hand."""
    out = []
    with torch.no_grad():
        for _ in range(count):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
            out.append(ids[:, 0].tolist())
    return out, cache


@pytest.fixture
def wide(saved):
    """A model of which about half is resident, and its twin in memory."""
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    sizes = sorted(p.nbytes for p in reference.parameters())
    with run(folder, offload="nvme", max_memory={"cpu": smallest(folder) + 3 * sizes[-1]}) as model:
        yield model, reference


def test_a_cache_that_grows_turns_residents_back_to_streaming_and_tokens_stay_equal(wide):
    model, reference = wide
    ceiling = model.zinfer._streaming.account.ceiling
    decode(model, IDS, 3)
    before = wanted(model)
    assert resident_weights(model) == before
    rows = IDS.repeat(8, 1)
    tokens, cache = decode(model, rows, 12)
    assert wanted(model) < before
    assert tokens == decode(reference, rows, 12)[0]
    assert account_bytes(model) + cache_bytes(cache) <= ceiling
    left = before - wanted(model)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, StreamedParameter) or name not in left
    check_device(model)


def test_residents_return_when_the_caches_are_gone(wide):
    model, _ = wide
    decode(model, IDS, 2)
    before = wanted(model)
    _, cache = decode(model, IDS.repeat(8, 1), 12)
    few = model.zinfer._residency.planned_bytes
    assert wanted(model) != before
    del cache
    gc.collect()
    decode(model, IDS, 3)
    assert few < model.zinfer._residency.planned_bytes
    assert wanted(model) <= before
    assert resident_weights(model) == wanted(model)


def test_a_batch_whose_cache_cannot_fit_is_refused_before_a_read_and_names_what_would(wide):
    model, reference = wide
    read = model.zinfer.bytes_read
    with pytest.raises(BudgetError, match=r"at most (\d+) of its 400 sequences fit") as caught:
        decode(model, IDS.repeat(400, 1), 1)
    assert model.zinfer.bytes_read == read
    rows = int(str(caught.value).split("at most ")[1].split()[0])
    ids = IDS.repeat(rows, 1)
    assert decode(model, ids, 1)[0] == decode(reference, ids, 1)[0]
    gc.collect()
    with pytest.raises(BudgetError):
        decode(model, IDS.repeat(rows + 1, 1), 1)


def test_the_budget_that_the_refusal_names_works(saved):
    folder = saved("llama")
    budget, rows = smallest(folder), IDS.repeat(20, 1)
    with (
        run(folder, offload="nvme", max_memory={"cpu": budget}) as model,
        pytest.raises(BudgetError) as caught,
    ):
        decode(model, rows, 1)
    with run(folder, offload="nvme", max_memory={"cpu": caught.value.smallest}) as model:
        decode(model, rows, 1)


def test_where_everything_was_resident_memory_is_divided_anew_for_a_large_cache(saved):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with pytest.raises(BudgetError) as caught:
        run(folder, offload="cpu", max_memory={"cpu": 150_000})
    with run(folder, offload="auto", max_memory={"cpu": caught.value.smallest + 20_000}) as model:
        assert not model.zinfer._streaming.account.window
        decode(model, IDS, 2)
        rows = IDS.repeat(4, 1)
        tokens, cache = decode(model, rows, 60)
        assert model.zinfer._streaming.account.window
        assert account_bytes(model) + cache_bytes(cache) <= model.zinfer._streaming.account.ceiling
        assert tokens == decode(reference, rows, 60)[0]
        del cache
        gc.collect()
        decode(model, IDS, 2)
        assert not model.zinfer._streaming.account.window
        check_device(model)


def test_threads_that_decode_meanwhile_get_the_same_tokens(wide):
    model, reference = wide
    expected = decode(reference, IDS, 20)[0]
    results: list[object] = []

    def other():
        try:
            results.append(decode(model, IDS, 20)[0])
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(3):
        decode(model, IDS.repeat(6, 1), 8)
        gc.collect()
    thread.join()
    assert results == [expected]


def test_a_pass_is_seen_in_its_arguments():
    ids = torch.zeros(3, 9, dtype=torch.long)
    assert Pass.of({"input_ids": ids}) == Pass(3, 9, 9)
    assert Pass.of({"input_ids": ids, "logits_to_keep": 1}) == Pass(3, 9, 1)
    assert Pass.of({}, (ids,)) == Pass(3, 9, 9)
    assert Pass.of({"inputs_embeds": torch.zeros(2, 5, 8)}) == Pass(2, 5, 5)
    assert Pass.of({"labels": None}) is None


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "gpt2", "opt", "mixtral", "deepseek_v3", "phi3"]
)
def test_the_growth_of_a_cache_is_foreseen(name):
    if name not in architectures.ALL:
        pytest.skip(f"{name} is not among the tests' architectures")
    model = architectures.build(name)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        result = model(input_ids=ids, use_cache=True)
        cache = result.past_key_values
        foreseen = cache_growth(None, model.config, ITEM, Pass(2, 7, 7))
        assert abs(foreseen - cache_bytes(cache)) <= COUNTERS
        before = cache_bytes(cache)
        more = cache_growth(cache, model.config, ITEM, Pass(2, 1, 1))
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) - before <= more + COUNTERS


def test_a_static_cache_is_counted_whole_and_grows_no_more():
    model = architectures.build("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    coming = Pass(2, 7, 7)
    foreseen = cache_growth(cache, model.config, ITEM, coming)
    with torch.no_grad():
        model(input_ids=torch.arange(14).reshape(2, 7), past_key_values=cache, use_cache=True)
    assert foreseen <= cache_bytes(cache) <= foreseen + COUNTERS
    assert cache_growth(cache, model.config, ITEM, coming) == 0


def test_what_is_no_cache_has_no_bytes():
    assert cache_bytes(None) == cache_bytes(object()) == 0
    assert cache_bytes(((torch.zeros(3), torch.zeros(2)),)) == 20
