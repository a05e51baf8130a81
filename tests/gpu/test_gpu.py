"""On a GPU: bit for bit what the model computes in the GPU's memory, at every tier and mix; and bad input there."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch

import zinfer
from tests import architectures
from tests.gpu.on_gpu import CUDA, GENERATE, results, run_within, same, with_its_experts
from tests.streaming import devices
from tests.streaming.test_exactness import IDS
from zinfer.device.arena import Arena
from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import POISON

PLENTY = 1 << 30  # bytes
KV_CACHES = 200_000  # bytes: what the longest of these tests caches, and its activations
pytestmark = pytest.mark.filterwarnings("default")  # of operators that are not deterministic


TYPICAL = ("llama", "qwen3_moe", "t5")  # dense, with experts, with an encoder
OTHERS = [name for name in architectures.ALL if name not in TYPICAL]

# The most telling tests come first, as gpu-check ends those that its time does not suffice for.


@pytest.mark.parametrize("name", TYPICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_every_mix_of_tiers_is_bit_equal(name, dtype, saved):
    assert_every_mix_is_bit_equal(name, dtype, saved)


def assert_every_mix_is_bit_equal(name, dtype, saved):
    folder = saved(name, dtype)
    reference = with_its_experts(architectures.reference(name, folder).to(CUDA))
    try:
        expected = results(reference, name)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"it does not run on this GPU in memory either: {error}")
    if not same(expected, results(reference, name)):
        pytest.skip("it is not the same twice on this GPU in memory either")
    total = architectures.parameter_bytes(reference)
    del reference
    for mix, (device, host) in devices.mixes(total).items():
        with run_within(folder, device, host) as model:
            assert same(expected, results(model, name)), mix
            report = model.zinfer.report()
    assert report.bytes_read > report.model_bytes, "nothing was streamed: the test proves nothing"


def test_what_was_given_back_is_poisoned():
    processor = CudaProcessor(CUDA, poison=True)
    arena = Arena(processor, 1 << 20)
    lease = arena.acquire(1000)
    lease.bytes.fill_(1)
    lease.used_on(processor.stream())
    at = lease.bytes.data_ptr() - arena._block.data_ptr()
    del lease
    gc.collect()
    torch.cuda.synchronize()
    assert bool((arena._block[at : at + 1000] == POISON).all())


def test_sweeps_with_recycled_memory_poisoned_give_the_same_logits(saved):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval().to(CUDA)
    third = architectures.parameter_bytes(reference) // 3
    ids = IDS[:1].to(CUDA)
    with torch.no_grad():
        expected = reference(ids).logits
    with run_within(folder, third, third, poison=True) as model:
        for _ in range(100):
            assert torch.equal(model(ids).logits, expected)


def in_memory(cls, folder: str):
    """The model in the GPU's memory; a test of one that is not the same twice there proves nothing."""
    reference = with_its_experts(cls.from_pretrained(folder).eval().to(CUDA))
    settings = GENERATE | {"output_logits": True, "return_dict_in_generate": True}
    first, second = (reference.generate(devices.ROWS.to(CUDA), **settings).logits for _ in range(2))
    if not same(first, second):
        pytest.skip("it is not the same twice on this GPU in memory either")
    return reference


@pytest.mark.parametrize("name", devices.CACHED)
def test_caches_in_host_memory_are_bit_equal(name, tmp_path):
    folder = str(tmp_path / "model")
    reference = in_memory(devices.saved_of(name, folder), folder)
    nbytes = int(architectures.parameter_bytes(reference) * 0.4) + 2 * KV_CACHES
    with run_within(folder, nbytes, PLENTY, kv_offload="cpu", poison=True) as model:
        for ids in (devices.IDS, devices.ROWS):
            devices.assert_generates_the_same(reference, model, ids)


@pytest.mark.parametrize("name", ["llama", "gemma2_that_slides"])
def test_every_way_to_decode_with_caches_in_host_memory_is_bit_equal(name, tmp_path):
    folder = str(tmp_path / "model")
    reference = in_memory(devices.saved_of(name, folder), folder)
    nbytes = int(architectures.parameter_bytes(reference) * 0.4) + 2 * KV_CACHES
    with run_within(folder, nbytes, PLENTY, kv_offload="cpu") as model:
        for way, settings in devices.WAYS.items():
            ids = devices.IDS.repeat(1, 3) if way == "prompt lookup" else devices.ROWS
            devices.assert_generates_the_same(reference, model, ids, **settings)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_static_cache_is_bit_equal_and_nothing_is_compiled(name, tmp_path):
    folder = str(tmp_path / "model")
    reference = in_memory(devices.saved_of(name, folder), folder)
    nbytes = int(architectures.parameter_bytes(reference) * 0.4) + 2 * KV_CACHES
    with run_within(folder, nbytes, PLENTY) as model:
        devices.assert_a_static_cache_gives_the_same(reference, model, devices.ROWS.to(CUDA))
        notes = model.zinfer.report().fallbacks
    assert any("does not compile" in note for note in notes)
    assert any("grouped_mm" in note for note in notes) == (name == "qwen3_moe")


@pytest.mark.parametrize("kv_offload", [None, "cpu"])
def test_a_prompt_in_chunks_is_bit_equal(kv_offload, tmp_path):
    folder = str(tmp_path / "llama")
    reference = in_memory(devices.llama_in(folder), folder)
    with run_within(folder, **devices.CHUNKING, kv_offload=kv_offload) as model:
        devices.assert_chunks_are_equal(model, reference, devices.long_prompts().to(CUDA))
        assert kv_offload or devices.chunk_said(model) is not None, "nothing was cut: the test proves nothing"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])  # the checkpoint's; converted at each use
def test_threads_with_streams_of_their_own_share_the_device(saved, dtype):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder, dtype=dtype).eval().to(CUDA)
    half = architectures.parameter_bytes(reference) // 2
    with torch.no_grad():
        expected = [reference(IDS[:1, : 1 + n].to(CUDA)).logits for n in range(2)]
    torch.cuda.synchronize()
    wrong: list[str] = []
    for _ in range(5):  # the first sweeps, in which residents come, are those that threads could get wrong
        with run_within(folder, half, half, poison=True, dtype=dtype) as model:

            def work(number: int, model=model) -> None:
                try:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        ids = IDS[:1, : 1 + number].to(CUDA)
                        for _ in range(15):
                            if not torch.equal(model(ids).logits, expected[number]):
                                wrong.append(f"thread {number}")
                except Exception as error:
                    wrong.append(repr(error))

            threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


def test_a_model_that_is_dropped_without_close_gives_its_memory_back(saved):
    folder = saved("llama")
    left = []
    for _ in range(2):  # the first one leaves cuBLAS's workspace
        model = run_within(folder, 1, 1)
        model(IDS.to(CUDA))
        del model
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("zinfer-cop"):
                thread.join(5)
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[0] == left[1]
    assert not {thread.name for thread in threading.enumerate()} & {"zinfer-copy", "zinfer-copied"}


def test_a_device_in_use_by_the_model_is_the_one_that_was_asked_for(saved):
    last = torch.cuda.device_count() - 1
    with zinfer.run(saved("llama"), device=f"cuda:{last}", max_memory={last: "2GiB"}) as model:
        assert model(IDS.to(f"cuda:{last}")).logits.device == torch.device("cuda", last)
        assert model.device == torch.device("cuda", last)


def test_a_budget_above_the_card_is_refused(saved):
    number = torch.cuda.current_device()
    with pytest.raises(zinfer.BudgetError, match="ask for at most"):
        zinfer.run(saved("llama"), device="cuda", max_memory={number: "64TiB"})


def test_a_card_that_is_not_there_is_refused(saved):
    with pytest.raises(zinfer.OptionError, match=r"cuda:99.*GPUs"):
        zinfer.run(saved("llama"), device="cuda:99")


def test_memory_that_cannot_be_page_locked_is_used_as_it_is_and_told(saved, monkeypatch, caplog):
    monkeypatch.setenv("ZINFER_CUDART", "/nonexistent")
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval().to(CUDA)
    with caplog.at_level(logging.WARNING, "zinfer"), run_within(folder, 1, 1 << 20) as model:
        assert same(results(reference, "llama"), results(model, "llama"))
        (note,) = [line for line in model.zinfer.report().fallbacks if "page-locked" in line]
    assert note in caplog.text and "GB/s here" in note


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture_is_bit_equal_with_every_mix_of_tiers(name, saved):
    assert_every_mix_is_bit_equal(name, torch.bfloat16, saved)
