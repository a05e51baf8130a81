"""On a GPU: bit for bit what the model computes in the GPU's memory, at every tier and mix; and bad input there."""

from __future__ import annotations

import gc
import logging
import os
import threading

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.test_exactness import IDS, inputs_for
from zinfer.device.arena import Arena
from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import POISON

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is used: the same bits each time
CUDA = torch.device("cuda")
CACHES = 60_000  # bytes: what the longest of these tests caches, and its activations
GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("default"),  # of operators that are not deterministic
]


def mixes(total: int) -> dict[str, tuple[int, int]]:
    """Budgets of device and host that make weights live on each tier, and on several."""
    return {
        "device": (4 * total, 2 * total),
        "device and host": (total // 2, 2 * total),
        "device and nvme": (total // 2, 1),
        "all tiers": (total // 3, total // 2),
        "hardly anything": (1, 1),
    }


class WithoutLimit(CudaProcessor):
    """The budgets of tiny models are below what torch's allocator takes at once, and divide the tiers all the same."""

    def limit(self, nbytes: int | None) -> None:
        """See Processor."""


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run_within(folder: str, device: int, host: int, *, poison: bool = False, dtype: str = "auto"):
    """Stream within `device` and `host` bytes, or within the fewest that work."""
    processor = WithoutLimit(CUDA, poison=poison)
    number, overhead = processor.torch_device.index or 0, processor.overhead
    for _ in range(4):
        sizes = {number: overhead + device, "cpu": host}
        try:
            return zinfer.run(folder, device=processor, offload="nvme", max_memory=sizes, dtype=dtype)
        except zinfer.BudgetError as error:
            assert error.smallest is not None
            if "max_memory['cpu'] to that" in str(error):
                host = error.smallest
            else:
                device = error.smallest - overhead + CACHES
    raise AssertionError("no budget works")


@torch.no_grad()
def results(model, name: str) -> list[torch.Tensor]:
    """Logits and tokens: batches, one sequence and a single token take different kernels."""
    found = []
    for ids in (IDS, IDS[:1], IDS[:1, :1], IDS):
        inputs = {key: value.to(CUDA) for key, value in inputs_for(name, ids).items()}
        found.append(model(**inputs).logits)
    if model.can_generate():
        found.append(model.generate(IDS.to(CUDA), **GENERATE))
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", architectures.ALL)
def test_every_mix_of_tiers_is_bit_equal(name, dtype, saved):
    folder = saved(name, dtype)
    reference = architectures.ALL[name][0].from_pretrained(folder).eval().to(CUDA)
    try:
        expected = results(reference, name)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"it does not run on this GPU in memory either: {error}")
    if not same(expected, results(reference, name)):
        pytest.skip("it is not the same twice on this GPU in memory either")
    total = architectures.parameter_bytes(reference)
    del reference
    for mix, (device, host) in mixes(total).items():
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


def test_what_the_process_has_already_does_not_count_against_a_limit(saved):
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval().to(CUDA)
    taken = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device=CUDA)
    processor = CudaProcessor(CUDA)
    before = processor.memory()[0]
    sizes = {processor.torch_device.index: processor.overhead + (256 << 20)}
    with zinfer.run(folder, device=processor, offload="nvme", max_memory=sizes) as model:
        assert same(results(reference, "llama"), results(model, "llama"))
        assert CudaProcessor(CUDA).memory()[0] < (1 << 30), "more seems to be free than can be allocated"
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
        block = processor.block(100 << 20)
        del block
    del model
    gc.collect()
    assert processor.memory()[0] >= before - (256 << 20), "the limit outlives the model"
    del taken


def test_a_limit_is_lifted_to_what_there_was_before():
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch does not tell")
    torch.cuda.set_per_process_memory_fraction(0.75)
    try:
        processor = CudaProcessor(CUDA)
        processor.limit(1 << 30)
        assert torch.cuda.get_per_process_memory_fraction() < 0.75
        processor.limit(None)
        assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.75)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


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


def test_memory_that_another_takes_is_missed_once(tmp_path):
    """An operator, or a pass, finds too little; then residents have made room, and the results are the same."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=16,
        num_attention_heads=8,
        vocab_size=64_000,
    )
    folder = str(tmp_path / "llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder).eval().to(CUDA)
    ids = torch.randint(0, 60_000, (1, 512), device=CUDA)  # whose logits are 131 MB
    with torch.no_grad():
        expected = reference(ids).logits.cpu()
    total = architectures.parameter_bytes(reference)
    del reference
    gc.collect()
    torch.cuda.empty_cache()
    model = run_within(folder, int(total * 0.8), 2 * total)
    with torch.no_grad():
        model(ids[:, :1])
        model(ids[:, :1])
        gc.collect()
        torch.cuda.empty_cache()
        before = model.zinfer.report().device
        taken = torch.empty(torch.cuda.mem_get_info()[0] - (96 << 20), dtype=torch.uint8, device=CUDA)
        try:
            found = model(ids).logits
        except zinfer.OutOfMemoryError:
            found = model(ids).logits
        assert torch.equal(found.cpu(), expected)
    report = model.zinfer.report()
    assert report.shortages >= 1
    assert report.device.planned_resident_bytes < before.planned_resident_bytes
    assert any("memory ran out" in note for note in report.fallbacks)
    del taken
    model.zinfer.close()
