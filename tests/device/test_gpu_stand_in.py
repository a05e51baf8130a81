"""The tests on a GPU, with a device that the CPU plays in its place: those who write them may have no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import on_gpu, test_gpu
from tests.streaming.devices import Rounding

MEMORY = 1 << 34


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Instead of the one in conftest.py, which skips."""
    for module in (on_gpu, test_gpu):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(
        on_gpu, "WithoutLimit", lambda device, poison=False: WithoutLimit(MEMORY, check=poison)
    )


class WithoutLimit(Rounding):
    """As tests/gpu/on_gpu.py has it."""

    def limit(self, nbytes):
        """See Processor."""


@pytest.mark.parametrize("name", test_gpu.TYPICAL)
def test_mixes(name, saved):
    test_gpu.assert_every_mix_is_bit_equal(name, torch.bfloat16, saved)


def test_sweeps_with_poison(saved):
    test_gpu.test_sweeps_with_recycled_memory_poisoned_give_the_same_logits(saved)


@pytest.mark.parametrize("name", ["llama", "mistral_that_slides"])
def test_caches_in_host_memory(name, tmp_path):
    test_gpu.test_caches_in_host_memory_are_bit_equal(name, tmp_path)


def test_ways_to_decode(tmp_path):
    test_gpu.test_every_way_to_decode_with_caches_in_host_memory_is_bit_equal("llama", tmp_path)


@pytest.mark.parametrize("kv_offload", [None, "cpu"])
def test_prompts_in_chunks(kv_offload, tmp_path):
    test_gpu.test_a_prompt_in_chunks_is_bit_equal(kv_offload, tmp_path)
