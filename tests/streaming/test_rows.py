"""Weights that are asked for row by row, such as embeddings and eager experts, stay where they are planned to."""

from __future__ import annotations

import time

import pytest
import torch

import zinfer
from tests import architectures
from tests.planner.machines import cpu, gpu
from tests.streaming.devices import mixes, run_within
from tests.streaming.test_attached import MEMORY, finish, staged
from tests.streaming.test_exactness import CACHES, IDS, assert_same, stream
from zinfer.device.residents import Residents
from zinfer.device.staged import StagedProcessor

# A config that says "eager" loses it when it is saved: it has to be said of each model that is loaded.
OPTIONS = {"llama": {}, "qwen3_moe": {"experts_implementation": "eager"}}
DTYPES = ("auto", "bfloat16")  # as they lie in the file; cast at each use
PATIENCE = 30.0  # seconds for places to be made present
TASK = {"prompt": 8, "new_tokens": 4}


def sweep(model) -> int:
    """Bytes that a sweep reads."""
    before = model.zinfer.bytes_read
    with torch.no_grad():
        model(IDS)
    return model.zinfer.bytes_read - before


def all_are_there(model) -> bool:
    """Whether every weight stays in memory, or has its experts there."""
    weights = model.zinfer._streaming.weights
    return all(weight.resident is not None for weight in weights if weight.slices is None)


def saved_with_reference(saved, name, dtype):
    folder = saved(name)
    reference = architectures.ALL[name][0].from_pretrained(folder, dtype=dtype, **OPTIONS[name]).eval()
    return folder, reference, architectures.parameter_bytes(architectures.build(name))


def wait_for_places(model) -> None:
    streaming = model.zinfer._streaming
    residents, deadline = streaming.coordinator.device.residents, time.monotonic() + PATIENCE
    while not all(residents.present(weight) for weight in streaming.weights if residents.has(weight)):
        assert time.monotonic() < deadline, "places are not made present"
        time.sleep(0.01)


@pytest.mark.parametrize("offload", ["nvme", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_where_all_fits_the_cpu_a_sweep_soon_reads_nothing(name, dtype, offload, saved, nothing_left):
    folder, reference, total = saved_with_reference(saved, name, dtype)
    budget = {"cpu": 4 * total + CACHES}
    with zinfer.run(folder, offload=offload, dtype=dtype, max_memory=budget, **OPTIONS[name]) as model:
        wait_for_places(model)
        assert sweep(model) > 0
        sweep(model)
        assert sweep(model) == 0 == model.zinfer.sweep_bytes
        assert all_are_there(model)
        assert_same(reference, model, name)
    task = {"dtype": dtype, "offload": offload, "max_memory": budget, **TASK, **OPTIONS[name]}
    plan = zinfer.plan(folder, hardware=cpu(), **task)
    assert plan.read_bytes == 0 and set(plan.tiers.values()) == {"host"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_where_all_fits_the_device_a_sweep_soon_reads_nothing(name, dtype, saved, nothing_left):
    folder, reference, total = saved_with_reference(saved, name, dtype)
    processor = staged(1)
    model = run_within(folder, processor, 8 * total, 4 * total, offload="nvme", dtype=dtype, **OPTIONS[name])
    assert sweep(model) > 0
    sweep(model)
    assert sweep(model) == 0 == model.zinfer.sweep_bytes
    assert all_are_there(model)
    assert_same(reference, model, name)
    finish(model, processor)
    sizes = {0: "64MiB", "cpu": "4MiB"}
    plan = zinfer.plan(folder, hardware=gpu(), dtype=dtype, max_memory=sizes, **TASK, **OPTIONS[name])
    assert plan.read_bytes == plan.pcie_bytes == 0 and set(plan.tiers.values()) == {"device"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_to_stay_in_host_memory_is_read_once_and_its_rows_are_copied(
    name, dtype, saved, nothing_left
):
    folder, reference, total = saved_with_reference(saved, name, dtype)
    processor = staged(2)
    model = run_within(folder, processor, 1, 4 * total, offload="nvme", dtype=dtype, **OPTIONS[name])
    streaming = model.zinfer._streaming
    assert sweep(model) > 0
    sweep(model)
    assert sweep(model) == 0 == model.zinfer.sweep_bytes
    assert not all(weight.wants_residence for weight in streaming.weights), "nothing stays in host memory"
    assert streaming.coordinator.counters.row_reads > 0
    assert_same(reference, model, name)
    finish(model, processor)


@pytest.mark.parametrize("mix", mixes(0))
def test_eager_experts_are_bit_equal_with_each_mix_of_tiers(mix, saved, nothing_left):
    folder, reference, total = saved_with_reference(saved, "qwen3_moe", "auto")
    processor = staged(3)
    device, host = mixes(total)[mix]
    model = run_within(folder, processor, device, host, offload="nvme", **OPTIONS["qwen3_moe"])
    assert_same(reference, model, "qwen3_moe")
    finish(model, processor)


def test_eager_experts_are_bit_equal_where_the_cpu_streams_them(saved, nothing_left):
    folder, reference, total = saved_with_reference(saved, "qwen3_moe", "auto")
    with stream(folder, total // 2, **OPTIONS["qwen3_moe"]) as model:
        assert_same(reference, model, "qwen3_moe")
        report = model.zinfer.report()
    assert report.row_reads > 0 and report.bytes_read > report.model_bytes


def test_rows_serve_while_the_place_of_a_table_is_not_there_yet(saved, monkeypatch, nothing_left):
    """It may be larger than the window, and nobody waits for gigabytes to be made present."""
    monkeypatch.setattr(Residents, "ready", lambda self, weight: False)
    folder, reference, total = saved_with_reference(saved, "llama", "auto")
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": 4 * total + CACHES}) as model:
        (table,) = (weight for weight in model.zinfer._streaming.weights if weight.rows_only)
        assert not model.zinfer._streaming.coordinator.device.has_window_for(table)
        assert_same(reference, model, "llama")
        assert table.resident is None and table.wants_residence
        assert model.zinfer.report().row_reads > 0


def test_a_table_that_the_device_has_no_memory_for_goes_on_by_its_rows(saved, nothing_left):
    folder, reference, total = saved_with_reference(saved, "llama", "auto")
    processor = StagedProcessor(MEMORY, check=True)
    model = run_within(folder, processor, 8 * total, 4 * total, offload="nvme")
    (table,) = (weight for weight in model.zinfer._streaming.weights if weight.rows_only)
    device = model.zinfer._streaming.coordinator.device
    own_memory = device._own_memory
    nbytes = device._assembly.layout(table).nbytes
    refused: list[int] = []

    def none_for_the_table(size: int):
        if size == nbytes and not refused:
            refused.append(size)
            return None
        return own_memory(size)

    device._own_memory = none_for_the_table
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
    assert refused and model.zinfer.report().row_reads > 0
    assert_same(reference, model, "llama")
    finish(model, processor)
