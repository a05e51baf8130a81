"""Experts read one by one: bit-equal to those in memory, whatever lands first and however few have room."""

from __future__ import annotations

import errno
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.test_exactness import assert_same
from zinfer.experts import forward, lookahead
from zinfer.experts.cache import ExpertCache
from zinfer.experts.lookahead import Trust, guess

CACHES = 60_000  # bytes of key-value caches of the longest test
EIGHT = torch.randint(1, 250, (8, 5), generator=torch.Generator().manual_seed(4))


def stream(folder: str, budget: int, **options):
    """Stream within `budget` bytes, or within the fewest that work."""
    try:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": budget + CACHES}, **options)
    except zinfer.BudgetError as error:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": error.smallest + CACHES}, **options)


def weights_of(folder: str) -> int:
    """Bytes of the checkpoint's shards."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def stream_most(folder: str):
    """Stream within the smallest budget that holds half of the experts, and not all."""
    for tenths in range(5, 30):
        model = stream(folder, tenths * weights_of(folder) // 10)
        if (cache := model.zinfer._streaming.host_experts) is None:
            break
        if 2 * cache.allowed >= cache.total:
            assert cache.allowed < cache.total
            return model
        model.zinfer.close()
    raise AssertionError("no budget holds half of the experts")


def experts_of(model) -> ExpertCache:
    cache = model.zinfer._streaming.host_experts
    assert cache is not None
    return cache


ROOMS = ("one", "some", "all")
DTYPES = (torch.float32, torch.bfloat16)
TYPICAL = ("qwen3_moe", "gpt_oss")  # experts that the checkpoint has one by one, and fused with biases


def pytest_generate_tests(metafunc):
    """Each architecture in one way or two, in turns; the typical ones, and with --every-mix all, in each."""
    if metafunc.function is test_mixtures_are_bit_equal_with_room_for_one_expert_some_or_all:
        every, ways = metafunc.config.getoption("--every-mix"), list(product(ROOMS, DTYPES))
        found = [
            pytest.param(name, *way, id=f"{name}-{way[0]}-{str(way[1]).removeprefix('torch.')}")
            for number, name in enumerate(architectures.SPARSE)
            for place, way in enumerate(ways)
            if every or name in TYPICAL or (place - number) % len(ways) in (0, 3)
        ]
        metafunc.parametrize(("name", "room", "dtype"), found)


def test_mixtures_are_bit_equal_with_room_for_one_expert_some_or_all(name, room, dtype, saved, nothing_left):
    folder = saved(name, dtype)
    reference = architectures.reference(name, folder)
    total = architectures.parameter_bytes(reference)
    with stream(folder, {"one": 1, "some": int(0.6 * total), "all": 3 * total}[room]) as model:
        cache = experts_of(model)
        if room == "one":
            cache.resize(0)
        assert_same(reference, model, name)
        with torch.no_grad():
            assert torch.equal(reference(EIGHT).logits, model(EIGHT).logits)
        figures = model.zinfer.report().experts
        assert figures is not None and figures.misses > 0
        if room == "one":
            assert figures.cached <= 1 and figures.misses > figures.experts
        if room == "all":
            assert figures.misses == figures.cached <= figures.experts, "nothing is read twice"
            assert figures.hits > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_landing_does_not_show(seed, saved, monkeypatch, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    dice, orders = random.Random(seed), set()

    def landed(cache, held):
        some = dice.sample(held, dice.randint(1, len(held)))
        for slot in some:
            if slot.request is not None:
                slot.request.wait()
        orders.add(tuple(held.index(slot) for slot in some))
        return some

    monkeypatch.setattr(ExpertCache, "_landed", landed)
    with stream(folder, 3 * architectures.parameter_bytes(reference)) as model, torch.no_grad():
        for ids in (EIGHT, EIGHT[:1], EIGHT[:3, :1]):
            assert torch.equal(reference(ids).logits, model(ids).logits)
    assert len(orders) > 3, "all landed in the order they were asked for: the test proves nothing"


def test_a_cache_too_small_for_one_tokens_experts_says_so_and_works(saved, caplog, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    with stream(folder, 1) as model, torch.no_grad():
        assert experts_of(model).allowed < model.config.num_experts_per_tok
        for _ in range(2):
            assert torch.equal(reference(EIGHT).logits, model(EIGHT).logits)
        (note,) = [note for note in model.zinfer.report().fallbacks if "experts" in note]
    told = [record.getMessage() for record in caplog.records if "experts of a layer" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith(note)
    assert "a token takes 2 experts of a layer, and 1 have room" in note


def test_nan_in_the_routers_output_is_computed_as_in_memory(saved, monkeypatch, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)

    class Broken(torch.nn.Module):
        """States with NaN, before the router picks."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return self.inner(states) * torch.tensor([1.0, float("nan")]).repeat(states.shape[-1] // 2)

    with stream(folder, 1) as model, torch.no_grad():
        for one in (model, reference):
            layer = one.model.layers[0]
            layer.post_attention_layernorm = Broken(layer.post_attention_layernorm)
        mine, expected = model(EIGHT).logits, reference(EIGHT).logits
    assert expected.isnan().any() and torch.equal(mine.isnan(), expected.isnan())


def test_router_logits_are_those_of_each_layer_once(saved, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    with stream(folder, 1) as model, torch.no_grad():
        mine = model(EIGHT, output_router_logits=True)
        expected = reference(EIGHT, output_router_logits=True)
    assert len(mine.router_logits) == len(expected.router_logits) == 2
    assert all(map(torch.equal, mine.router_logits, expected.router_logits))
    assert torch.equal(mine.aux_loss, expected.aux_loss)


def test_an_autograd_graph_holds_no_expert_and_passes_no_gradient(saved, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    with stream(folder, 1) as model:
        outputs = [model.model(ids).last_hidden_state for ids in EIGHT.split(1)]
        for ids, output in zip(EIGHT.split(1), outputs, strict=True):
            assert torch.equal(output, reference.model(ids).last_hidden_state)
        with pytest.raises(zinfer.ReadOnlyError):
            outputs[0].sum().backward()
        del outputs, output


def test_two_threads_that_wait_for_one_late_expert_both_get_it(saved, monkeypatch, nothing_left):
    folder = saved("mixtral")
    reference = architectures.reference("mixtral", folder)
    with torch.no_grad():
        expected = reference(EIGHT).logits
    with stream_most(folder) as model:
        host = experts_of(model)._host
        read = host.read

        class Late:
            def __init__(self, request) -> None:
                self.request, self.when = request, time.monotonic() + 0.003

            def __getattr__(self, name):
                return getattr(self.request, name)

            @property
            def done(self):
                return time.monotonic() > self.when and self.request.done

        monkeypatch.setattr(host, "read", lambda *args, **kwargs: Late(read(*args, **kwargs)))

        def use(_: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(model(EIGHT).logits, expected) for _ in range(4))

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(use, range(3)))


def test_less_memory_holds_as_soon_as_those_in_use_are_done(saved, nothing_left):
    folder = saved("qwen3_moe")
    with stream(folder, 3 * weights_of(folder)) as model:
        cache = experts_of(model)
        layer = model.model.layers[0].mlp.experts.__dict__[forward.ATTRIBUTE].layer
        while cache._memory.present < 4:
            time.sleep(0.01)
        arriving = cache.arrivals(layer, [0, 1, 2, 3])
        group = next(arriving)
        cache.resize(0)
        assert cache.count > cache.allowed == 1, "they are in use"
        del group
        for _ in arriving:
            pass
        assert cache.count <= 1


def test_tokens_that_pick_nobody_and_no_tokens_at_all(saved, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    with stream(folder, 1) as model, torch.no_grad():
        pair = [one.model.layers[0].mlp.experts for one in (model, reference)]
        states = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
        picked, shares = torch.tensor([[0, 8], [8, 8], [3, 1]]), torch.rand(3, 2)
        mine, expected = (experts(states, picked, shares) for experts in pair)
        assert torch.equal(mine, expected)
        mine, expected = (experts(states[:0], picked[:0], shares[:0]) for experts in pair)
        assert torch.equal(mine, expected)
        mine, expected = (experts(states[1:2], picked[1:2], shares[1:2]) for experts in pair)
        assert torch.equal(mine, expected)


def test_threads_share_the_experts_that_are_there(saved, nothing_left):
    folder = saved("mixtral")
    reference = architectures.reference("mixtral", folder)
    total = architectures.parameter_bytes(reference)
    with torch.no_grad():
        expected = [reference(EIGHT[row : row + 1]).logits for row in range(8)]
    with stream(folder, int(0.7 * total)) as model:

        def use(row: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(model(EIGHT[row : row + 1]).logits, expected[row]) for _ in range(10))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(8)))
        cache = experts_of(model)
        assert cache.count * cache.slot_bytes <= cache.limit


def test_an_implementation_that_the_user_asked_for_is_respected(saved, nothing_left):
    folder = saved("qwen3_moe")
    plain = transformers.Qwen3MoeForCausalLM.from_pretrained(
        folder, experts_implementation="batched_mm"
    ).eval()
    with stream(folder, architectures.parameter_bytes(plain), experts_implementation="batched_mm") as model:
        assert model.config._experts_implementation == "batched_mm"
        assert model.zinfer.report().experts is None
        with torch.no_grad():
            assert torch.equal(plain(EIGHT).logits, model(EIGHT).logits)


def test_experts_make_room_for_caches_as_they_grow(saved, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    total = architectures.parameter_bytes(reference)
    ids = EIGHT.repeat(4, 4)  # 32 sequences of 20: their cache is a good part of this model
    with stream(folder, int(0.9 * total)) as model, torch.no_grad():
        model(EIGHT[:1, :1])
        before = experts_of(model).limit
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, reference(ids).logits)
        during = experts_of(model).limit
        account = model.zinfer._streaming.account
        used = account.residents + account.window + account.small + account.bounce + account.conversions
        assert used + model.zinfer.report().cache_bytes + during <= account.ceiling
        assert during < before
        del out
        model(EIGHT[:1, :1])
        assert experts_of(model).limit == before


def test_a_failing_drive_is_told_and_the_next_pass_reads_anew(saved, monkeypatch, nothing_left):
    folder = saved("mixtral")
    reference = architectures.reference("mixtral", folder)
    with stream(folder, 1) as model, torch.no_grad():
        host = experts_of(model)._host
        read = host.read

        class Fails:
            nbytes, done, timing = 1, True, None

            def wait(self, timeout=None):
                raise zinfer.DriveError("scripted", "shard", 0, 1, errno.EIO, "faults")

        monkeypatch.setattr(host, "read", lambda *_, **__: Fails())
        with pytest.raises(zinfer.DriveError, match="scripted"):
            model(EIGHT)
        monkeypatch.setattr(host, "read", read)
        assert torch.equal(reference(EIGHT).logits, model(EIGHT).logits)


def test_closing_while_experts_are_on_their_way(saved, nothing_left):
    folder = saved("mixtral")
    model = stream(folder, 1)
    errors: list[Exception] = []

    def use() -> None:
        try:
            with torch.no_grad():
                while True:
                    model(EIGHT)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    time.sleep(0.1)
    model.zinfer.close()
    thread.join(20)
    assert [type(error) for error in errors] == [zinfer.ClosedError]


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_guesses_that_are_read_ahead_change_no_bit(name, saved, monkeypatch, nothing_left):
    monkeypatch.setattr(Trust, "pays", True)
    folder = saved(name)
    reference = architectures.reference(name, folder)
    with stream_most(folder) as model, torch.no_grad():
        for ids in (EIGHT[:1], *EIGHT.split(1), *EIGHT[:, :1].split(2)):
            assert torch.equal(reference(ids).logits, model(ids).logits)
        counters = experts_of(model).counters
        assert counters.foreseen > 0, "nothing was foreseen: the test proves nothing"
        assert counters.guessed_bytes >= 0
        idle = experts_of(model)._idle
        assert idle.sum() == experts_of(model).count, "a slot is held that nobody uses"


def test_wrong_guesses_are_dropped_and_stop(saved, monkeypatch, nothing_left):
    """A router that is asked beforehand tells another story than when it counts."""
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    monkeypatch.setattr(lookahead, "ENOUGH", 8.0)

    def wrong(router, states, picks):
        true = {int(index) for index in guess(router, states, picks)}
        return [index for index in range(8) if index not in true][:4]

    monkeypatch.setattr(forward, "guess", wrong)
    with stream_most(folder) as model, torch.no_grad():
        cache = experts_of(model)
        cache.trust.note(8, 8)
        assert cache.trust.pays
        for ids in EIGHT[:, :1].repeat(20, 1).split(1):
            assert torch.equal(reference(ids).logits, model(ids).logits)
        assert not cache.trust.pays
        wasted = cache.counters.guessed_bytes
        assert wasted > 0
        model(EIGHT[:1, :1])
        assert cache.counters.guessed_bytes == wasted, "it goes on guessing"


def test_where_guesses_do_not_pay_one_in_eight_is_made(saved, monkeypatch, nothing_left):
    asked = []

    def noted(router, states, picks):
        asked.append(len(states))
        return guess(router, states, picks)

    monkeypatch.setattr(forward, "guess", noted)
    with stream_most(saved("qwen3_moe")) as model, torch.no_grad():
        cache = experts_of(model)
        for right, most in ((0, 4), (1000, 32)):
            cache.trust.note(right, 1000)
            asked.clear()
            for _ in range(32):
                model(EIGHT[:1, :1])
                cache.trust.note(right, 1000)  # whatever was found out meanwhile
            assert len(asked) == most
        model(EIGHT)
        assert asked[-1] == EIGHT.numel(), "a long prompt is always looked ahead for"


def test_nothing_is_read_ahead_before_guesses_were_right(saved, nothing_left):
    folder = saved("qwen3_moe")
    with stream(folder, 1) as model, torch.no_grad():
        model(EIGHT[:1, :1])
        cache = experts_of(model)
        assert (
            cache.trust.share is None and cache.counters.foreseen == 0 and cache.counters.guessed_bytes == 0
        )
