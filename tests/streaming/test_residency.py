"""The ceiling holds for weights and key-value caches together: residents leave as caches grow, and return."""

from __future__ import annotations

import gc
import inspect
import threading

import pytest
import torch
import transformers

from tests import architectures
from tests.streaming.running import check_device, smallest
from tests.streaming.test_attached import MEMORY, run_within
from tests.streaming.test_out_of_memory import Costly
from zinfer import BudgetError, budgets, run
from zinfer.kv_cache import Pass, cache_bytes, cache_growth, caches_of
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
    with run(folder, offload="nvme", max_memory={"cpu": smallest(folder) + 6 * sizes[-1]}) as model:
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


@pytest.fixture(scope="module")
def of_matrices(tmp_path_factory):
    """14 MB of a llama whose matrices are large enough for windows to differ."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    folder = tmp_path_factory.mktemp("of-matrices")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_many_sequences_get_a_window_of_their_own_before_anything_stays(of_matrices):
    rows, budget = torch.arange(32).reshape(32, 1), 10_000_000
    reference = transformers.LlamaForCausalLM.from_pretrained(of_matrices).eval()
    with run(of_matrices, offload="nvme", max_memory={"cpu": budget}) as model:
        window = model.zinfer.report().window_bytes
        tokens, cache = decode(model, rows, 4)
        assert model.zinfer.report().window_bytes > window
        assert account_bytes(model) + cache_bytes(cache) <= budget
        assert tokens == decode(reference, rows, 4)[0]
        check_device(model)


def test_residents_that_leave_are_read_ahead_from_then_on(of_matrices):
    with run(of_matrices, offload="nvme", max_memory={"cpu": 10_000_000}) as model:
        decode(model, torch.arange(32).reshape(32, 1), 2)
        stayed = wanted(model)
        decode(model, torch.arange(32).reshape(32, 1), 10)
        assert len(wanted(model)) < len(stayed) - 3
        assert model.zinfer.report().misses == 1  # the very first


def test_memory_is_not_divided_for_more_sequences_once_residents_are_read(of_matrices):
    with run(of_matrices, offload="nvme", max_memory={"cpu": 10_000_000}) as model:
        decode(model, IDS, 3)
        window, residents = model.zinfer.report().window_bytes, resident_weights(model)
        decode(model, torch.arange(32).reshape(32, 1), 1)
        assert model.zinfer.report().window_bytes == window
        assert resident_weights(model) < residents  # some make room for the cache; none is read again


def test_residents_return_when_the_caches_are_gone(wide):
    model, _ = wide
    decode(model, IDS, 2)
    before = wanted(model)
    _, cache = decode(model, IDS.repeat(8, 1), 12)
    few = model.zinfer._streaming.account.residents
    assert wanted(model) != before
    del cache
    gc.collect()
    decode(model, IDS, 3)
    assert few < model.zinfer._streaming.account.residents
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


@pytest.fixture
def whole(saved):
    """A model of which everything fits, with hardly a byte to spare, and its twin in memory."""
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with pytest.raises(BudgetError) as caught:
        run(folder, offload="cpu", max_memory={"cpu": 150_000})
    with run(folder, offload="auto", max_memory={"cpu": caught.value.smallest + 20_000}) as model:
        assert not model.zinfer._streaming.account.window
        yield model, reference


def test_where_everything_was_resident_memory_is_divided_anew_for_a_large_cache(whole):
    model, reference = whole
    decode(model, IDS, 2)
    rows = IDS.repeat(4, 1)
    tokens, cache = decode(model, rows, 60)
    assert model.zinfer._streaming.account.window
    assert account_bytes(model) + cache_bytes(cache) <= model.zinfer._streaming.account.ceiling
    assert tokens == decode(reference, rows, 60)[0]
    few = len(resident_weights(model))
    del cache
    gc.collect()
    decode(model, IDS, 3)
    assert len(resident_weights(model)) > few  # in the places that were kept for them
    check_device(model)


def test_memory_is_divided_anew_while_another_thread_generates(whole):
    model, reference = whole
    expected = decode(reference, IDS, 40)[0]
    results = []

    def other():
        try:
            results.append(decode(model, IDS, 40)[0])
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=other) for _ in range(2)]
    for thread in threads:
        thread.start()
    rows = IDS.repeat(3, 1)
    for _ in range(2):
        assert decode(model, rows, 40)[0] == decode(reference, rows, 40)[0]
        gc.collect()
    for thread in threads:
        thread.join()
    assert results == [expected, expected]
    check_device(model)


def test_an_interrupt_while_memory_is_divided_leaves_a_model_that_works(whole, monkeypatch):
    model, reference = whole
    decode(model, IDS, 2)
    device = type(model.zinfer._streaming.coordinator.device)
    take = device._take_memory

    def interrupted(self, *arguments, **options):
        take(self, *arguments, **options)
        raise KeyboardInterrupt

    rows = IDS.repeat(4, 1)
    monkeypatch.setattr(device, "_take_memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(model, rows, 60)
    monkeypatch.undo()
    assert decode(model, rows, 20)[0] == decode(reference, rows, 20)[0]
    check_device(model)


def test_two_threads_growth_is_added_up(wide):
    model, _ = wide
    residency = model.zinfer._residency
    ceiling = model.zinfer._streaming.account.ceiling
    big = {"input_ids": IDS.repeat(12, 1)}
    residency.before((), big)
    alone = account_bytes(model)
    (growth, _) = next(iter(residency._coming.values()))
    assert alone + growth <= ceiling < alone + 2 * growth
    asked, over = threading.Event(), threading.Event()

    def other():
        residency.before((), big)
        asked.set()
        over.wait(30)

    worker = threading.Thread(target=other)
    worker.start()
    assert asked.wait(30)
    assert account_bytes(model) + 2 * growth <= ceiling
    over.set()
    worker.join()


def test_what_zinfer_takes_itself_does_not_count_twice(saved, monkeypatch):
    folder = saved("llama")
    free = [1 << 30]
    monkeypatch.setattr(budgets, "free_memory", lambda: free.pop() if free else 1)
    with run(folder, offload="nvme") as model:
        decode(model, IDS, 2)
        assert resident_weights(model) == {w.name for w in model.zinfer._streaming.weights}


TIGHT = ["llama", "llama_tied", "qwen3_moe", "gemma3", "gpt_oss", "deepseek_v3", "falcon"]
TIGHT += ["t5", "bart", "bert", "mamba"]


@pytest.mark.parametrize("name", [name for name in TIGHT if name in architectures.ALL])
def test_architectures_stay_exact_while_caches_count(name, saved):
    """At the tightest budget but for caches, with whatever they cache."""
    folder = saved(name)
    reference = architectures.reference(name, folder)
    with (
        run(folder, offload="nvme", max_memory={"cpu": smallest(folder) + 150_000}) as model,
        torch.no_grad(),
    ):
        ids = IDS.repeat(2, 1)
        if not reference.can_generate():
            assert torch.equal(model(ids)[0], reference(ids)[0])
            return
        for settings in ({}, {"num_beams": 3}):
            settings |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(ids, **settings), reference.generate(ids, **settings))
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
    one = ids[:, :1]
    assert Pass.of({"input_ids": ids, "decoder_input_ids": one}) == Pass(3, 1, 1, source=9)
    encoded = (torch.zeros(3, 11, 8),)
    assert Pass.of({"decoder_input_ids": one, "encoder_outputs": encoded}) == Pass(3, 1, 1, source=11)


CACHING = [name for name in architectures.ALL if architectures.build(name).can_generate()]


@pytest.mark.parametrize("name", CACHING)
def test_the_growth_of_a_cache_is_foreseen(name):
    """At most what a first pass makes, where the config says so for sure; in proportion afterwards."""
    model = architectures.build(name)
    ids = torch.arange(14).reshape(2, 7)
    inputs = {"input_ids": ids, "use_cache": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :1]
    with torch.no_grad():
        foreseen = cache_growth(None, model.config, ITEM, Pass.of(inputs))
        cache = caches_of(model(**inputs))
        if not cache:
            pytest.skip("makes no cache")
        made = cache_bytes(cache[0])
        if foreseen.sure:
            assert made <= foreseen.nbytes + COUNTERS
            assert foreseen.nbytes <= made + COUNTERS
        for _ in range(3):
            step = {"input_ids": ids[:, :1], "use_cache": True}
            if model.config.is_encoder_decoder:
                step |= {"decoder_input_ids": ids[:, :1], "input_ids": ids}
            more = cache_growth(cache[0], model.config, ITEM, Pass(2, 1, 1))
            before = cache_bytes(cache[0])
            name_of_it = (
                "past_key_values"
                if "past_key_values" in inspect.signature(model.forward).parameters
                else "cache_params"
            )
            cache = caches_of(model(**step, **{name_of_it: cache[0]}))
            assert cache_bytes(cache[0]) - before <= more.nbytes + COUNTERS


@pytest.mark.parametrize(
    "fields, heads",
    [({"multi_query": True, "new_decoder_architecture": False}, 1), ({"multi_query": False}, 4)],
)
def test_a_falcon_caches_the_heads_it_has(fields, heads):
    config = transformers.FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **fields)
    config.num_kv_heads = heads
    assert cache_growth(None, config, ITEM, Pass(1, 10, 1)).nbytes == 2 * 2 * heads * 16 * 10 * ITEM


def test_a_sliding_window_that_is_a_view_counts_with_all_it_holds():
    whole = torch.zeros(1, 2, 100, 8)
    assert cache_bytes((whole[:, :, -10:], whole[:, :, -20:])) == whole.nbytes


def test_a_static_cache_is_counted_whole_and_grows_no_more():
    model = architectures.build("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    coming = Pass(2, 7, 7)
    foreseen = cache_growth(cache, model.config, ITEM, coming).nbytes
    with torch.no_grad():
        model(input_ids=torch.arange(14).reshape(2, 7), past_key_values=cache, use_cache=True)
    assert foreseen <= cache_bytes(cache) <= foreseen + COUNTERS
    assert cache_growth(cache, model.config, ITEM, coming).nbytes == 0


def test_what_is_no_cache_has_no_bytes():
    assert cache_bytes(None) == cache_bytes(object()) == 0
    assert cache_bytes(((torch.zeros(3), torch.zeros(2)),)) == 20


def test_on_a_device_the_refusal_names_its_budget_with_what_the_device_takes_itself(saved, caplog):
    folder, rows = saved("llama"), IDS.repeat(400, 1)
    total = architectures.parameter_bytes(architectures.ALL["llama"][0].from_pretrained(folder))
    model = run_within(folder, Costly(MEMORY), 1, 2 * total, offload="nvme")
    with model, pytest.raises(BudgetError, match=r"raise max_memory\[0\] to (\d+)") as caught:
        decode(model, rows, 1)
    needed = caught.value.smallest
    assert f"max_memory[0] to {needed}," in str(caught.value)
    with run(
        folder, device=Costly(MEMORY), max_memory={0: needed, "cpu": 2 * total}, offload="nvme"
    ) as model:
        decode(model, rows, 1)
    assert "more than the budget on staged leaves" in caplog.text  # for its activations
    named = int(caplog.text.split("raise max_memory[0] to ")[1].split()[0])
    assert named > needed
    caplog.clear()
    with run(folder, device=Costly(MEMORY), max_memory={0: named, "cpu": 2 * total}, offload="nvme") as model:
        decode(model, rows, 1)
    assert "leaves" not in caplog.text
