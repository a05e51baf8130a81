"""Memory runs out in the middle of a pass: some is given back, said, and either the operator runs again or an error is
raised that leaves a model which works."""

from __future__ import annotations

import gc
import logging
import random
import re
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers

import zinfer
from tests import architectures
from tests.streaming.running import check_device, smallest, tokens
from tests.streaming.test_attached import MEMORY, finish, run_within, staged
from zinfer import residency
from zinfer.device.staged import StagedProcessor
from zinfer.planner.placement import smallest as smallest_placement
from zinfer.weights import parameter

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
ON_A_GPU = "CUDA out of memory. Tried to allocate {} bytes. GPU 0 has none.\nMore about the allocator"
ON_THE_HOST = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "{} bytes. Error code 12 (Cannot allocate memory)"
)


class Script:
    """Makes products with streamed weights run out of memory, after they have computed, as `short` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed = 0
        self.short = lambda: 0  # bytes that an operator asks for in vain
        self.words = ON_A_GPU
        real = parameter._run

        def run(func, args, kwargs):
            out = real(func, args, kwargs)
            if func is F.linear and (asked := self.short()):
                self.failed += 1
                kind = torch.OutOfMemoryError if self.words is ON_A_GPU else RuntimeError
                raise kind(self.words.format(asked))
            return out

        monkeypatch.setattr(parameter, "_run", run)

    def times(self, count: int, asked: int) -> None:
        """The next `count` products fail, whatever memory there is."""
        left = [asked] * count
        self.short = lambda: left.pop() if left else 0

    def while_less(self, processor, asked: int) -> None:
        """They fail as long as `processor` has less than `asked` bytes left."""
        self.short = lambda: asked if processor.left < asked else 0


@pytest.fixture
def script(monkeypatch):
    return Script(monkeypatch)


@pytest.fixture
def llama(saved):
    """A folder, its model in memory, and how many bytes of parameters that has."""
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    return folder, reference, architectures.parameter_bytes(reference)


@pytest.fixture
def on_staged(llama):
    """Half of a model on a staged device, loaded, and then another process takes what is left there."""
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="nvme")
    assert tokens(model, count=3) == tokens(reference, count=3)
    gc.collect()
    assert model.zinfer.report().device.planned_resident_bytes > 0
    processor.claim(processor.memory()[0])
    yield model, reference, processor
    finish(model, processor)


@pytest.fixture
def on_cpu(llama):
    """A model in host memory of which about half stays, loaded."""
    folder, reference, total = llama
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": smallest(folder) + total // 2}) as model:
        assert tokens(model, count=3) == tokens(reference, count=3)
        assert model.zinfer.report().planned_resident_bytes > 0
        yield model, reference
        check_device(model)


def test_another_process_takes_memory_and_residents_make_room_for_an_operator(on_staged, script, caplog):
    model, reference, processor = on_staged
    before = model.zinfer.report().device
    asked = before.planned_resident_bytes // 3
    script.while_less(processor, asked)
    assert tokens(model) == tokens(reference)
    assert script.failed == 1
    report = model.zinfer.report()
    assert report.shortages == 1
    assert report.device.planned_resident_bytes <= before.planned_resident_bytes - asked
    assert report.device.window_bytes == before.window_bytes
    said = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "ran out" in r.getMessage()
    ]
    assert len(said) == 1 and "weight'" in said[0] and f"{asked} bytes" in said[0]
    assert "More about the allocator" not in said[0]
    note = next(text for text in report.fallbacks if "memory ran out once" in text)
    assert "the window is" in note and note in str(report)


def test_the_next_passes_do_not_grow_back_into_the_same_trouble(on_staged, script):
    model, reference, processor = on_staged
    script.while_less(processor, model.zinfer.report().device.planned_resident_bytes // 3)
    for _ in range(3):
        assert tokens(model) == tokens(reference)
        gc.collect()
    assert script.failed == 1


def test_where_residents_are_not_enough_the_window_shrinks(script, tmp_path, monkeypatch):
    monkeypatch.setattr(residency, "SHORT_PATIENCE", 30.0)  # copies may be slow to end on a busy machine
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    processor = staged()
    model = run_within(str(tmp_path), processor, 6 << 20, 1 << 25, offload="nvme")
    tokens(model, count=3)
    gc.collect()
    before = model.zinfer.report().device
    least = smallest_placement(model.zinfer._streaming.footprints)
    given = before.window_bytes + before.conversion_bytes - least
    assert given > 0, "nothing to shrink: the test proves nothing"
    processor.claim(processor.memory()[0])
    script.while_less(processor, before.planned_resident_bytes + given // 2)
    assert tokens(model) == tokens(reference)
    assert script.failed == 1
    after = model.zinfer.report().device
    assert after.window_bytes < before.window_bytes
    assert f"window is {after.window_bytes / (1 << 20):.2f} MiB" in " ".join(model.zinfer.report().fallbacks)
    finish(model, processor)


def test_the_second_time_in_one_operator_is_an_error_that_says_what_to_do(on_staged, script):
    model, reference, _ = on_staged
    script.times(2, 1000)
    with pytest.raises(zinfer.OutOfMemoryError, match=r"run twice.*Make batch or context smaller") as caught:
        tokens(model)
    assert script.failed == 2
    assert isinstance(caught.value, zinfer.BudgetError)
    assert isinstance(caught.value, torch.OutOfMemoryError), "code that catches torch's error would miss it"
    assert type(caught.value.__cause__) is torch.OutOfMemoryError
    assert "max_memory[0] to " in str(caught.value)
    assert model.zinfer.report().shortages == 2
    del caught
    assert tokens(model) == tokens(reference)


@pytest.mark.parametrize("where", ["on_staged", "on_cpu"])
def test_where_attention_runs_out_the_pass_ends_and_the_next_has_room(where, request, monkeypatch):
    model, reference, *_ = request.getfixturevalue(where)
    before = sum(w.resident is not None for w in model.zinfer._streaming.weights)
    words = ON_A_GPU if where == "on_staged" else ON_THE_HOST

    def refuse(*args, **kwargs):
        raise (torch.OutOfMemoryError if where == "on_staged" else RuntimeError)(words.format(5000))

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with pytest.raises(zinfer.OutOfMemoryError, match="in a pass") as caught:
        tokens(model)
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.undo()
    assert sum(w.resident is not None for w in model.zinfer._streaming.weights) < before
    assert model.zinfer.report().shortages == 1
    assert tokens(model) == tokens(reference)


def test_an_error_that_is_kept_keeps_no_memory_of_the_pass(on_cpu, monkeypatch):
    model, _ = on_cpu
    window = model.zinfer._streaming.coordinator.device.window

    def refuse(*args, **kwargs):
        raise RuntimeError(ON_THE_HOST.format(5000))

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with pytest.raises(zinfer.OutOfMemoryError) as caught:
        tokens(model)
    assert caught.value.__cause__ is not None
    assert model.zinfer._streaming.coordinator.device.window.in_use == 0
    assert window is not None


def test_on_the_cpu_too(on_cpu, script):
    model, reference = on_cpu
    before = model.zinfer.report()
    script.words = ON_THE_HOST
    script.times(1, before.planned_resident_bytes // 2)
    assert tokens(model) == tokens(reference)
    after = model.zinfer.report()
    assert after.planned_resident_bytes < before.planned_resident_bytes
    assert after.shortages == script.failed == 1


def test_other_errors_are_not_taken_for_a_shortage(on_cpu, script):
    model, reference = on_cpu
    script.words = "an error of {} bytes"
    script.times(1, 1000)
    with pytest.raises(RuntimeError, match="an error of 1000 bytes"):
        tokens(model)
    assert script.failed == 1
    assert model.zinfer.report().shortages == 0
    assert tokens(model) == tokens(reference)


def test_where_all_weights_are_to_stay_an_operator_is_run_again_all_the_same(llama, script):
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="cpu")
    before = model.zinfer.report().device
    script.times(1, 1000)
    assert tokens(model) == tokens(reference)
    after = model.zinfer.report()
    assert after.shortages == 1
    assert after.device.window_bytes == before.window_bytes
    finish(model, processor)


def test_what_was_missing_is_looked_for_again_when_no_cache_is_alive(llama, script, monkeypatch):
    monkeypatch.setattr(residency, "CALM_PASSES", 3)
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="nvme")
    tokens(model, count=3)
    gc.collect()
    planned = model.zinfer.report().device.planned_resident_bytes
    processor.claim(processor.memory()[0])
    script.while_less(processor, planned // 2)
    tokens(model)
    few = model.zinfer.report().device.planned_resident_bytes
    gc.collect()
    for _ in range(3):  # long enough, but the memory is still somebody else's
        tokens(model)
        gc.collect()
    assert model.zinfer.report().device.planned_resident_bytes == few < planned
    processor.claim(0)
    for _ in range(3):
        assert tokens(model) == tokens(reference)
        gc.collect()
    assert model.zinfer.report().device.planned_resident_bytes > few
    assert script.failed == 1
    finish(model, processor)


def test_residents_that_the_device_refused_are_not_asked_for_at_every_pass(llama, caplog):
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="nvme")
    processor.claim(processor.memory()[0] - 1000)  # before any resident has come
    assert tokens(model, count=2) == tokens(reference, count=2)
    refused = caplog.text.count("was short of memory")
    assert refused == 1, "said again for each weight"
    (note,) = [line for line in model.zinfer.report().fallbacks if "was short of memory" in line]
    assert re.search(r"staged was short of memory: \d+ weights had to stream", note)
    for _ in range(3):
        assert tokens(model, count=2) == tokens(reference, count=2)
        gc.collect()
    assert caplog.text.count("was short of memory") == refused
    assert note in model.zinfer.report().fallbacks, "weights were refused again"
    finish(model, processor)


def test_weights_that_were_refused_and_came_back_are_not_reported_as_streaming(llama, monkeypatch, caplog):
    monkeypatch.setattr(residency, "CALM_PASSES", 1)
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 2 * total, offload="nvme")
    processor.claim(processor.memory()[0] - 1000)
    assert tokens(model, count=2) == tokens(reference, count=2)
    gc.collect()
    processor.claim(0)
    for _ in range(6):
        assert tokens(model, count=2) == tokens(reference, count=2)
        gc.collect()
    (note,) = [line for line in model.zinfer.report().fallbacks if "was short of memory" in line]
    assert re.search(r"for a time: \d+ weights had to stream, and can stay there again", note)
    finish(model, processor)


@pytest.mark.parametrize("where", ["device", "host"])
def test_threads_that_compute_meanwhile_get_the_same_tokens(where, llama, script):
    folder, reference, total = llama
    if where == "device":
        processor = staged(5)
        model = run_within(folder, processor, total // 2, 2 * total, offload="nvme")
    else:
        script.words = ON_THE_HOST
        model = zinfer.run(
            folder, offload="nvme", max_memory={"cpu": smallest(folder) + total // 2 + 200_000}
        )
    expected = tokens(reference, count=8)
    dice, lock, last = random.Random(3), threading.Lock(), threading.local()

    def short() -> int:
        with lock:  # one of fifty fails, but never twice running
            last.failed = not getattr(last, "failed", False) and dice.random() < 1 / 50
            return 3000 if last.failed else 0

    script.short = short
    results: list[object] = []

    def work() -> None:
        for _ in range(2):
            try:
                results.append(tokens(model, count=8))
            except Exception as error:
                results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    assert results == [expected] * 6
    assert script.failed > 0
    assert model.zinfer.report().shortages == script.failed
    if where == "device":
        finish(model, processor)
    else:
        check_device(model)
        model.zinfer.close()


@pytest.fixture
def all_there(llama):
    """A model that is to stay on a staged device whole, so that there is no window; nothing is loaded yet."""
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, 4 * total, 2 * total, offload="nvme")
    assert model.zinfer.report().device.window_bytes == 0
    yield model, reference, processor
    finish(model, processor)


def test_a_model_that_was_to_stay_whole_streams_where_another_process_came_first(all_there, llama):
    model, reference, processor = all_there
    processor.claim(processor.memory()[0] - llama[2] // 2)
    for _ in range(3):
        assert tokens(model) == tokens(reference)
        gc.collect()
    report = model.zinfer.report()
    assert report.device.window_bytes > 0
    assert report.shortages == 1, "memory was asked for in vain again"


def test_memory_is_divided_anew_for_a_weight_that_neither_stays_nor_streams(all_there):
    model, reference, _ = all_there
    streaming = model.zinfer._streaming
    weight = next(weight for weight in streaming.weights if not weight.rows_only)
    weight.wants_residence = False  # refused by a thread that had it on its way while memory was divided
    streaming.coordinator.device.refused_bytes += weight.nbytes
    assert tokens(model) == tokens(reference)
    report = model.zinfer.report()
    assert report.device.window_bytes >= weight.nbytes
    assert report.shortages == 0


def test_a_resident_that_is_larger_than_the_window_is_no_dead_end(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    processor = staged()
    model = run_within(str(tmp_path), processor, 6 << 20, 1 << 25, offload="nvme")
    head = next(w for w in model.zinfer._streaming.weights if w.nbytes == 8192 * 128 * 4)
    before = model.zinfer.report().device
    assert head.wants_residence and before.window_bytes < head.nbytes, (
        "it could stream: the test proves nothing"
    )
    others = before.planned_resident_bytes - head.nbytes
    assert others > 0
    processor.claim(processor.memory()[0] - head.nbytes - others // 2)  # the head comes last
    for _ in range(2):
        assert tokens(model) == tokens(reference)
        gc.collect()
    report = model.zinfer.report()
    assert report.shortages == 1
    assert report.device.window_bytes >= head.nbytes
    assert not any("was short of memory" in line for line in report.fallbacks)
    finish(model, processor)


def test_where_not_even_a_window_can_be_had_the_model_works_once_there_is_memory(all_there, llama):
    model, reference, processor = all_there
    processor.claim(MEMORY)
    for _ in range(2):
        with pytest.raises(zinfer.OutOfMemoryError, match="end what else uses") as caught:
            tokens(model)
        assert isinstance(caught.value, torch.OutOfMemoryError)
        del caught
        gc.collect()
    processor.claim(MEMORY - llama[2])
    for _ in range(2):
        assert tokens(model) == tokens(reference)
        gc.collect()


def test_after_no_window_could_be_had_the_report_states_none(all_there, llama, caplog):
    model, reference, processor = all_there
    processor.claim(processor.memory()[0] - llama[2] // 2)
    assert tokens(model) == tokens(reference)
    gc.collect()
    assert model.zinfer.report().device.window_bytes > 0
    relief, streaming = model.zinfer._relief, model.zinfer._streaming
    least = smallest_placement(streaming.footprints)
    processor.claim(MEMORY)
    with pytest.raises(zinfer.OutOfMemoryError):
        model.zinfer._residency._divide_smaller(least, least)
    figures = model.zinfer.report().device
    assert (figures.window_bytes, figures.planned_resident_bytes, figures.conversion_bytes) == (0, 0, 0)
    assert streaming.coordinator.device.window_bytes == 0
    (note,) = [line for line in model.zinfer.report().fallbacks if "memory ran out" in line]
    assert "the window is 0.00 MiB now, residents 0.00 MiB" in note
    processor.claim(MEMORY - llama[2])
    caplog.clear()
    relief.relieve("a weight", ON_A_GPU.format(1000))
    assert "of the window were given back" not in caplog.text, "there was none to give"
    assert model.zinfer.report().device.window_bytes == streaming.coordinator.device.window_bytes > 0
    assert tokens(model) == tokens(reference)


def test_on_the_cpu_the_report_states_no_window_either(on_cpu, monkeypatch):
    model, reference = on_cpu
    gc.collect()
    device = model.zinfer._streaming.coordinator.device

    def refuse(*args, **kwargs):
        raise zinfer.BudgetError("no memory")

    monkeypatch.setattr(device, "_take_memory", refuse)
    with pytest.raises(zinfer.BudgetError, match="no memory"):
        model.zinfer._residency._divide_smaller(1 << 20, 1 << 20)
    report = model.zinfer.report()
    assert (report.window_bytes, report.planned_resident_bytes) == (0, 0)
    monkeypatch.undo()
    assert tokens(model) == tokens(reference)
    assert model.zinfer.report().window_bytes > 0


def test_where_a_layer_of_a_cache_finds_no_room_the_pass_ends_and_the_next_has_some(llama):
    folder, reference, total = llama
    processor = staged()
    model = run_within(folder, processor, total // 2, 4 * total, offload="nvme", kv_offload="cpu")
    assert tokens(model, count=3) == tokens(reference, count=3)
    gc.collect()
    model.zinfer.caches._space.settle()
    processor.reclaim()
    before = model.zinfer.report().device.planned_resident_bytes
    processor.claim(processor.memory()[0])
    with pytest.raises(zinfer.OutOfMemoryError, match=r"in a pass.*staged device has") as caught:
        tokens(model)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    del caught
    gc.collect()
    assert model.zinfer.report().shortages == 1
    assert model.zinfer.report().device.planned_resident_bytes < before
    for _ in range(2):
        assert tokens(model) == tokens(reference)
        gc.collect()
    finish(model, processor)


class Costly(StagedProcessor):
    """Running anything there takes memory, as on a GPU."""

    overhead = 100_000


def test_what_to_lower_counts_with_what_the_device_takes_itself(llama, script):
    folder, _, total = llama
    processor = Costly(MEMORY)
    model = run_within(folder, processor, total // 2 + Costly.overhead, 2 * total, offload="nvme")
    tokens(model, count=3)
    script.times(2, 1000)
    with pytest.raises(zinfer.OutOfMemoryError) as caught:
        tokens(model)
    left = model.zinfer.report().device.budget - model.zinfer._residency.lost_bytes
    assert f"lower max_memory[0] to {left + Costly.overhead}" in str(caught.value)
    del caught
    finish(model, processor)
