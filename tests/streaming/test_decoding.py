"""What generate() does to a model in memory before it decodes, and not to a streaming one."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from tests.streaming.devices import ROWS, assert_a_static_cache_gives_the_same, run_within
from tests.streaming.test_attached import finish, staged
from tests.streaming.test_exactness import stream

CACHES = 200_000  # bytes: what these tests cache, and its activations


def saved_and_loaded(saved, name):
    folder = saved(name)
    reference = architectures.reference(name, folder)
    return folder, reference, architectures.parameter_bytes(reference)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_static_cache_is_bit_equal_on_a_device(name, saved, nothing_left):
    folder, reference, total = saved_and_loaded(saved, name)
    processor = staged(4)
    model = run_within(folder, processor, int(total * 0.4) + 2 * CACHES, 4 * total, offload="nvme")
    assert_a_static_cache_gives_the_same(reference, model, ROWS)
    finish(model, processor)


def for_the_cpu_too():
    config = transformers.generation.CompileConfig()
    config._compile_all_devices = True
    return config


def test_a_streaming_model_is_never_compiled_and_that_is_told_once(saved, monkeypatch, caplog, nothing_left):
    compiled = []

    def recorded(self, config):
        compiled.append(self)
        return self.__call__

    monkeypatch.setattr(transformers.PreTrainedModel, "get_compiled_call", recorded)
    folder, reference, total = saved_and_loaded(saved, "llama")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    expected = reference.generate(ROWS, compile_config=for_the_cpu_too(), **settings)
    assert compiled, "transformers would not compile it either: the test proves nothing"
    compiled.clear()
    with caplog.at_level(logging.INFO, "zinfer"), stream(folder, total // 2 + CACHES) as model:
        for _ in range(2):
            assert torch.equal(model.generate(ROWS, compile_config=for_the_cpu_too(), **settings), expected)
        assert compiled == []
        (note,) = [note for note in model.zinfer.report().fallbacks if "compile" in note]
    assert "compile_config has no effect" in note
    assert [record.levelname for record in caplog.records if record.getMessage() == note] == ["WARNING"]


def test_a_model_that_would_be_compiled_unasked_tells_so(saved, monkeypatch, nothing_left):
    folder, _, total = saved_and_loaded(saved, "llama")
    with stream(folder, total // 2) as model:
        cache = transformers.StaticCache(config=model.config, max_cache_len=8)
        settings = transformers.GenerationConfig()
        dynamic = transformers.DynamicCache(config=model.config)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        for given in ({}, {"past_key_values": None}, {"past_key_values": dynamic}):
            assert not model._valid_auto_compile_criteria(given, settings)
        settings.disable_compile = True
        assert not model._valid_auto_compile_criteria({"past_key_values": cache}, settings)
        assert not any("compile" in note for note in model.zinfer.report().fallbacks)
        settings.disable_compile = False
        assert not model._valid_auto_compile_criteria({"past_key_values": cache}, settings)
        assert any("does not compile" in note for note in model.zinfer.report().fallbacks)


def test_a_model_in_memory_is_compiled_as_ever(saved, nothing_left):
    with zinfer.run(saved("llama"), offload="none", device="cpu") as model:
        cache = transformers.StaticCache(config=model.config, max_cache_len=8)
        settings = transformers.GenerationConfig(compile_config=for_the_cpu_too())
        assert model._valid_auto_compile_criteria({"past_key_values": cache}, settings)


def test_experts_are_computed_while_decoding_as_they_were_before(saved, monkeypatch, nothing_left):
    @contextlib.contextmanager
    def switching(self):
        """As on a GPU."""
        before = self.get_experts_implementation()
        self.set_experts_implementation("batched_mm")
        try:
            yield
        finally:
            self.set_experts_implementation(before)

    monkeypatch.setattr(transformers.generation.GenerationMixin, "_optimize_model_for_decode", switching)
    folder, reference, total = saved_and_loaded(saved, "qwen3_moe")
    processor = staged(5)
    model = run_within(folder, processor, int(total * 0.4) + 2 * CACHES, 4 * total, offload="nvme")
    used = {}

    def note(module, _):
        used.setdefault(module, []).append(module.config._experts_implementation)

    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for one in (reference, model):
        one.register_forward_pre_hook(note)
        one.generate(ROWS, **settings)
    assert "batched_mm" in used[reference], "nothing was switched: the test proves nothing"
    assert set(used[model]) == {"zinfer"}
    finish(model, processor)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("qwen3_moe", {}, False),
        ("qwen3_moe", {"experts_implementation": "grouped_mm"}, True),
        ("qwen3_moe", {"experts_implementation": "eager"}, False),
        ("llama", {}, False),
    ],
)
def test_experts_that_a_gpu_would_have_switched_are_told_of_once(
    name, options, told, saved, monkeypatch, nothing_left
):
    folder, _, total = saved_and_loaded(saved, name)
    with stream(folder, total // 2, **options) as model:
        with model._optimize_model_for_decode():
            pass
        assert not any("batched_mm" in note for note in model.zinfer.report().fallbacks)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        for _ in range(2):
            with model._optimize_model_for_decode():
                pass
        assert sum("batched_mm" in note for note in model.zinfer.report().fallbacks) == told
