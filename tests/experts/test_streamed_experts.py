"""Experts read one by one: bit-equal to those in memory, whatever lands first and however few have room."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.test_exactness import assert_same
from zinfer.experts.cache import ExpertCache

CACHES = 60_000  # bytes of key-value caches of the longest test
EIGHT = torch.randint(1, 250, (8, 5), generator=torch.Generator().manual_seed(4))


def stream(folder: str, budget: int, **options):
    """Stream within `budget` bytes, or within the fewest that work."""
    try:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": budget + CACHES}, **options)
    except zinfer.BudgetError as error:
        return zinfer.run(folder, offload="nvme", max_memory={"cpu": error.smallest + CACHES}, **options)


def experts_of(model) -> ExpertCache:
    cache = model.zinfer._streaming.experts
    assert cache is not None
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("room", ["one", "some", "all"])
@pytest.mark.parametrize("name", architectures.SPARSE)
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
        slot = dice.choice(held)
        if slot.request is not None:
            slot.request.wait()
        orders.add(held.index(slot))
        return slot

    monkeypatch.setattr(ExpertCache, "_landed", landed)
    with stream(folder, 3 * architectures.parameter_bytes(reference)) as model, torch.no_grad():
        for ids in (EIGHT, EIGHT[:1], EIGHT[:3, :1]):
            assert torch.equal(reference(ids).logits, model(ids).logits)
    assert len(orders) > 1, "all landed in the order they were asked for: the test proves nothing"


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
                raise zinfer.DriveError("scripted")

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
