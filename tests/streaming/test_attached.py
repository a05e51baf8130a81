"""A device with memory of its own, played by the staged one: the promises hold at every tier and in every order."""

from __future__ import annotations

import gc
import random
import threading
import zlib
from typing import Any

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.devices import Rounding, mixes, run_within
from tests.streaming.test_exactness import IDS, assert_same
from zinfer.device import attached, host
from zinfer.device.staged import StagedProcessor

MEMORY = 1 << 34  # of the pretended device
LATE = 0.002  # seconds
TYPICAL = ("llama", "qwen3_moe", "t5")


def late(seed: int):
    """Copies and fences that come when they like, the same way for the same seed."""
    dice = random.Random(seed)
    lock = threading.Lock()

    def delay(kind: str) -> float:
        with lock:
            return dice.choice([0.0, 0.0, LATE * dice.random()])

    return delay


def staged(seed: int = 0) -> StagedProcessor:
    return StagedProcessor(MEMORY, delay=late(seed), check=True)


def finish(model, processor: StagedProcessor) -> None:
    model.zinfer.close()
    gc.collect()
    assert processor.races == []


def pytest_generate_tests(metafunc):
    """Each architecture with two mixes of tiers, in turns; the typical ones, and with --every-mix all, with each."""
    if metafunc.function is test_each_mix_of_tiers_is_bit_equal_when_copies_are_late:
        every, names = metafunc.config.getoption("--every-mix"), mixes(0)
        pairs = [
            (name, mix)
            for number, name in enumerate(architectures.ALL)
            for place, mix in enumerate(names)
            if every or name in TYPICAL or (place - number) % len(names) in (0, 2)
        ]
        metafunc.parametrize(("name", "mix"), pairs)


def test_each_mix_of_tiers_is_bit_equal_when_copies_are_late(name, mix, saved, nothing_left):
    folder = saved(name)
    reference = architectures.reference(name, folder)
    total = architectures.parameter_bytes(reference)
    device, host = mixes(total)[mix]
    processor = staged(zlib.crc32(f"{name}, {mix}".encode()))
    model = run_within(folder, processor, device, host, offload="nvme")
    assert_same(reference, model, name)
    report = model.zinfer.report()
    assert report.device is not None
    passed = report.device.window_bytes > 0 or report.experts is not None  # those have memory of their own
    assert passed or mix == "device", "nothing passed through: the test proves nothing"
    if (
        name in TYPICAL and name not in architectures.SPARSE
    ):  # others have weights that are small or cannot stream: there, a tier may stay empty
        assert (report.resident_bytes > 0) == (mix in ("device and host", "all tiers"))
        if mix != "device and host":  # there, what leaves the device for caches comes from the drive
            assert (model.zinfer.sweep_bytes > 0) == (mix != "device")
    finish(model, processor)


@pytest.mark.parametrize("mix", mixes(0))
@pytest.mark.parametrize("name", TYPICAL)
def test_each_mix_is_bit_equal_where_the_devices_allocator_rounds(name, mix, saved, nothing_left):
    """The budgets of tests/gpu, as a GPU divides them."""
    folder = saved(name, torch.bfloat16)
    reference = architectures.reference(name, folder)
    processor = Rounding(MEMORY, check=True)
    processor.limit = lambda nbytes, holder: None  # as there
    device, host = mixes(architectures.parameter_bytes(reference))[mix]
    model = run_within(folder, processor, device, host, offload="nvme")
    assert_same(reference, model, name)
    assert mix != "hardly anything" or model.zinfer.bytes_read > model.zinfer.report().model_bytes
    finish(model, processor)


def test_a_thousand_sweeps_with_recycled_memory_poisoned_give_the_same_logits(saved, nothing_left):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    total = architectures.parameter_bytes(reference)
    dice = random.Random(1)
    processor = StagedProcessor(
        MEMORY, delay=lambda kind: 0.0002 * dice.random() if dice.random() < 0.05 else 0.0, check=True
    )
    model = run_within(folder, processor, total // 3, total // 3, offload="nvme")
    ids = IDS[:1, :2]
    with torch.no_grad():
        expected = reference(ids).logits
        for _ in range(1000):
            assert torch.equal(model(ids).logits, expected)
    finish(model, processor)


def test_threads_at_different_places_share_the_device(saved, nothing_left):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    total = architectures.parameter_bytes(reference)
    processor = staged(3)
    model = run_within(folder, processor, total // 2, total // 2, offload="nvme")
    expected = [reference(IDS[:1, : 1 + n]).logits for n in range(4)]
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(8):
            try:
                if not torch.equal(model(IDS[:1, : 1 + number]).logits, expected[number]):
                    wrong.append(f"thread {number}")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    finish(model, processor)


def test_the_budget_of_the_device_holds(saved, nothing_left):
    folder = saved("llama")
    total = architectures.parameter_bytes(architectures.ALL["llama"][0].from_pretrained(folder))
    for share in (0.3, 0.5, 0.8):
        processor = staged()
        device = int(total * share)
        model = run_within(folder, processor, device, 2 * total, offload="nvme")
        budget = model.zinfer.report().device.budget
        model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        figures = model.zinfer.report().device
        assert processor.peak + figures.small_bytes + figures.cache_bytes <= budget
        finish(model, processor)


def test_the_budget_of_the_device_holds_where_its_allocator_rounds(tmp_path, nothing_left, caplog):
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=5504,  # 10.75 MiB a matrix, which takes 12
        num_hidden_layers=3,
        num_attention_heads=8,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    budget = 100 << 20
    processor = Rounding(MEMORY)
    with zinfer.run(
        tmp_path, device=processor, max_memory={0: budget, "cpu": "300MiB"}, offload="nvme", progress=False
    ) as model:
        for _ in range(2):
            model(IDS % 64)
        figures = model.zinfer.report().device
        there = sum(w.resident is not None for w in model.zinfer._streaming.weights)
        assert not caplog.records, "a resident found no memory"
    assert there > 3
    assert processor.peak + figures.small_bytes + figures.cache_bytes <= budget


def test_offload_cpu_reads_nothing_once_loaded_and_none_keeps_all_on_the_device(saved, nothing_left):
    folder = saved("llama")
    total = architectures.parameter_bytes(architectures.ALL["llama"][0].from_pretrained(folder))
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="cpu")
    for _ in range(2):  # what caches push off the device is read once more, to host memory
        model(IDS)
    before = model.zinfer.bytes_read
    for _ in range(3):
        model(IDS)
    assert model.zinfer.bytes_read == before
    finish(model, processor)
    processor = staged()
    model = run_within(folder, processor, 2 * total, 2 * total, offload="none")
    assert not any(isinstance(p, zinfer.weights.parameter.StreamedParameter) for p in model.parameters())
    finish(model, processor)


def test_what_does_not_fit_is_refused_before_anything_is_read(saved):
    folder = saved("llama")
    processor = StagedProcessor(1 << 20)
    with pytest.raises(zinfer.BudgetError, match=r"max_memory\[0\] is .* but staged has 1048576"):
        zinfer.run(folder, device=processor, max_memory={0: "1GiB"})
    with pytest.raises(zinfer.BudgetError, match="smallest max_memory") as caught:
        zinfer.run(folder, device=processor, max_memory={0: 100})
    assert caught.value.smallest > 100
    with pytest.raises(zinfer.BudgetError, match=r"raise max_memory\['cpu'\]"):
        zinfer.run(folder, device=StagedProcessor(MEMORY), max_memory={0: caught.value.smallest, "cpu": 1000})


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:7", "GPU"), ("tpu", "Expected one of"), ("mps", "'cpu' and on 'cuda'"), (3.5, "3.5")],
)
def test_a_device_that_is_not_there_is_refused(device, words, saved):
    with pytest.raises(zinfer.OptionError, match=words):
        zinfer.run(saved("llama"), device=device)


class Limited(StagedProcessor):
    """Knows who has a limit there; its memory is for as many models as like."""

    def __init__(self) -> None:
        super().__init__(MEMORY)
        self.limits: dict[Any, int] = {}

    def limit(self, nbytes: int | None, holder: object = None) -> None:
        """See Processor."""
        assert holder is not None, "another model's limit would be overwritten"
        if nbytes is None:
            self.limits.pop(holder, None)
        else:
            self.limits[holder] = nbytes


def test_models_on_one_device_have_limits_of_their_own_which_end_with_them(saved, nothing_left):
    processor, folder = Limited(), saved("llama")
    first = zinfer.run(folder, device=processor, max_memory={0: 1 << 20})
    second = zinfer.run(folder, device=processor, max_memory={0: 2 << 20})
    assert sorted(processor.limits.values()) == [1 << 20, 2 << 20]
    first.zinfer.close()
    assert list(processor.limits.values()) == [2 << 20]
    del second
    gc.collect()
    assert processor.limits == {}


@pytest.mark.parametrize(
    ("where", "what"), [(host, "Shards"), (host, "Pool"), (attached, "Arena"), (attached, "Copies")]
)
def test_a_model_that_cannot_be_opened_leaves_no_limit(where, what, saved, monkeypatch, nothing_left):
    processor, limits = Limited(), []

    def refuse(*_: Any, **__: Any) -> None:
        limits.append(len(processor.limits))
        raise zinfer.StoreError("a drive is gone")

    monkeypatch.setattr(where, what, refuse)
    with pytest.raises(zinfer.StoreError, match="a drive is gone") as caught:
        run_within(saved("llama"), processor, 1, 1, offload="nvme")
    assert limits == [1], "there was no limit: the test proves nothing"
    assert processor.limits == {}, "it holds as long as somebody has the error"
    del caught


def test_a_model_that_is_dropped_without_close_ends_its_threads(saved, nothing_left):
    folder = saved("llama")
    processor = staged()
    model = run_within(folder, processor, 1, 1, offload="nvme")
    model(IDS)
    names = {thread.name for thread in threading.enumerate()}
    assert "zinfer-copy" in names and "zinfer-copied" in names
    del model
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith(("zinfer-cop", "staged")):
            thread.join(5)
    assert not {t.name for t in threading.enumerate()} & {"zinfer-copy", "zinfer-copied"}
