"""On a GPU that nobody else uses meanwhile: memory that runs out, and limits of the whole process."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.gpu.on_gpu import CUDA, results, run_within, same
from zinfer.device.cuda import CudaProcessor

# Of operators that are not deterministic.
pytestmark = pytest.mark.filterwarnings("default")


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
