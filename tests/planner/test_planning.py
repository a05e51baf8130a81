"""zinfer.plan: the places of a run, known without weights; and what is refused before a byte is read."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import zinfer
from tests.planner.machines import CPU, cpu, gpu
from zinfer import planning
from zinfer.device.cuda import allocated_by_torch
from zinfer.device.staged import StagedProcessor
from zinfer.errors import BudgetError, CheckpointError, OptionError
from zinfer.synth import synthesise

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}


EXACT = {"allocated": StagedProcessor.allocated}  # of a class whose blocks take what is in them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """41 MB of a float32 llama."""
    root = tmp_path_factory.mktemp("plan")
    (root / "config.json").write_text(json.dumps(LLAMA))
    return synthesise(str(root / "config.json"), str(root / "llama"), dtype="float32", progress=False)


def config_of(fields: dict) -> transformers.PreTrainedConfig:
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(fields["model_type"], **rest)


@pytest.fixture
def config() -> transformers.PreTrainedConfig:
    """201 MB, its matrices large enough to stream whatever the budget."""
    return config_of(LLAMA | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4})


@pytest.mark.parametrize("budget", ["14MiB", "27MiB", "72MiB", "100MiB", "200MiB"])
def test_the_places_are_those_of_a_run(checkpoint, budget, nothing_left):
    plan = zinfer.plan(checkpoint, hardware=cpu(), max_memory={"cpu": budget}, prompt=8, new_tokens=4)
    with zinfer.run(checkpoint, max_memory={"cpu": budget}, progress=False) as model:
        with torch.no_grad():
            model(torch.arange(11).reshape(1, 11), use_cache=True)  # as many positions as the plan has
        report = model.zinfer.report()
        resident = {w.name for w in model.zinfer._streaming.weights if w.wants_residence}
        sweep_bytes = model.zinfer.sweep_bytes
    assert {name for name, tier in plan.tiers.items() if tier == "host"} == resident
    assert plan.host_bytes - plan.small_bytes == pytest.approx(report.planned_resident_bytes, abs=4096 * 90)
    assert (plan.host_window, plan.small_bytes, plan.buffer_bytes, plan.host_budget) == (
        report.window_bytes,
        report.small_bytes,
        report.bounce_bytes,
        report.budget,
    )
    assert plan.weight_bytes == report.model_bytes
    assert plan.read_bytes == sweep_bytes
    assert plan.drive_seconds == pytest.approx(sweep_bytes / 1e9)


def test_a_config_alone_has_the_places_of_its_checkpoint(checkpoint, tmp_path):
    task = {"hardware": cpu(), "max_memory": {"cpu": "27MiB"}, "prompt": 8, "new_tokens": 4}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = [
        zinfer.plan(model, **task)
        for model in (checkpoint, config_of(LLAMA), tmp_path, str(tmp_path / "config.json"))
    ]
    for other in found[1:]:
        assert any("from the config" in note for note in other.notes)
        assert other.tiers == found[0].tiers
        assert other.seconds_a_token == found[0].seconds_a_token
        assert other.host_window == found[0].host_window


def test_where_all_fits_the_device_nothing_moves_and_arithmetic_is_the_bound(config):
    plan = zinfer.plan(config, hardware="h200", batch=2)
    assert plan.tiers
    assert plan.device_bytes == plan.weight_bytes
    assert plan.nvme_bytes == plan.host_bytes == plan.read_bytes == plan.pcie_bytes == 0
    assert plan.bottleneck == "compute"


def test_tiers_add_up_to_the_model(config):
    plan = zinfer.plan(
        config, hardware=gpu(), max_memory={"cpu": "40MiB", 0: "90MiB"}, prompt=8, new_tokens=4
    )
    assert plan.device_bytes + plan.host_bytes + plan.nvme_bytes == plan.weight_bytes
    assert 0 < plan.read_bytes <= plan.nvme_bytes
    assert plan.pcie_bytes <= plan.host_bytes + plan.nvme_bytes
    assert set(plan.tiers.values()) == {"device", "host", "nvme"}
    used = plan.device_bytes + plan.device_window + plan.cache_bytes + plan.activation_bytes
    assert used <= plan.device_budget == 90 << 20
    assert plan.host_bytes + plan.host_window + plan.buffer_bytes <= plan.host_budget == 40 << 20


def test_predictions_hang_together(config):
    plan = zinfer.plan(config, hardware=cpu(), max_memory={"cpu": "80MiB"}, batch=4, prompt=8, new_tokens=5)
    assert plan.seconds_a_token == max(plan.drive_seconds, plan.pcie_seconds, plan.compute_seconds)
    assert plan.bottleneck == "drive"
    assert plan.tokens_per_second == 4 / plan.seconds_a_token
    assert plan.throughput == pytest.approx(20 / (plan.first_token_seconds + 4 * plan.seconds_a_token))
    assert plan.first_token_seconds == pytest.approx(plan.sweep_bytes / 1e9, rel=0.05)
    assert json.loads(json.dumps(plan.as_dict()))["tiers"] == plan.tiers
    for word in ("LlamaConfig", "a made-up CPU", "drive", "tokens/s", "first token"):
        assert word in str(plan)


def test_a_cast_on_the_fly_takes_time_and_is_planned_as_it_is_run(checkpoint):
    task = {"hardware": cpu(), "max_memory": {"cpu": "16MiB"}, "prompt": 8, "new_tokens": 4}
    plan = zinfer.plan(checkpoint, dtype="bfloat16", **task)
    with zinfer.run(checkpoint, dtype="bfloat16", max_memory={"cpu": "16MiB"}, progress=False) as model:
        with torch.no_grad():
            model(torch.arange(11).reshape(1, 11), use_cache=True)  # as many positions as the plan has
        # The cast table of embeddings counts as a matrix there; rows of it are all that operators ask for.
        assert 0 < plan.read_bytes == model.zinfer.sweep_bytes - 512 * 256 * 4
        assert plan.conversion_bytes == model.zinfer.report().conversion_bytes > 0
    assert plan.dtype == "bfloat16"
    as_stored = zinfer.plan(config_of(LLAMA), dtype="bfloat16", **task)
    assert plan.compute_seconds > as_stored.compute_seconds


def test_the_largest_batch_fits_and_one_more_does_not(config):
    task = {"hardware": gpu(), "max_memory": {0: "256MiB"}, "prompt": 100, "new_tokens": 9}
    told = zinfer.plan(config, **task).largest_batch
    # What a pass takes whatever the batch counts less and less, so the first answer is on the safe side.
    largest = zinfer.plan(config, batch=told, **task).largest_batch
    assert told <= largest <= 1.1 * told
    with pytest.raises(BudgetError, match=f"largest batch that fits is {largest}$"):
        zinfer.plan(config, batch=largest + 1, **task)


def test_a_cache_takes_its_room_from_the_weights(config):
    machine = cpu(host_memory=2 << 30)
    small = zinfer.plan(config, hardware=machine, prompt=100)
    large = zinfer.plan(config, hardware=machine, prompt=100, batch=small.largest_batch)
    assert large.host_budget == small.host_budget
    assert large.host_bytes < small.host_bytes
    used = large.host_bytes + large.host_window + large.cache_bytes + large.activation_bytes
    assert used + large.buffer_bytes <= large.host_budget


@pytest.mark.parametrize("where", ["cpu", 0])
def test_a_budget_above_the_machine_is_refused(config, where):
    with pytest.raises(BudgetError, match="ask for at most"):
        zinfer.plan(config, hardware=gpu(), max_memory={where: "100GB"})


def test_a_budget_below_the_largest_operator_names_one_that_works(config):
    with pytest.raises(BudgetError, match="smallest max_memory") as refusal:
        zinfer.plan(config, hardware=cpu(), max_memory={"cpu": "1MiB"})
    enough = refusal.value.smallest
    assert zinfer.plan(config, hardware=cpu(), max_memory={"cpu": enough}).host_budget == enough


def test_a_device_below_the_largest_operator_names_a_budget_that_works(config):
    with pytest.raises(BudgetError, match=r"smallest max_memory\[0\]") as refusal:
        zinfer.plan(config, hardware=gpu(), max_memory={0: "1MiB"})
    enough = refusal.value.smallest
    assert zinfer.plan(config, hardware=gpu(), max_memory={0: enough}).device_budget == enough


def test_a_host_that_cannot_hold_the_rest_names_a_budget_that_works(config):
    task = {"hardware": gpu(), "offload": "cpu", "prompt": 8}
    with pytest.raises(BudgetError, match=r"smallest max_memory\['cpu'\]") as refusal:
        zinfer.plan(config, max_memory={0: "90MiB", "cpu": "40MiB"}, **task)
    plan = zinfer.plan(config, max_memory={0: "90MiB", "cpu": refusal.value.smallest}, **task)
    assert plan.nvme_bytes == 0


def test_a_model_kept_in_memory_has_to_fit(config):
    with pytest.raises(BudgetError, match="offload='cpu'"):
        zinfer.plan(config, hardware=cpu(), max_memory={"cpu": "80MiB"}, offload="cpu")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_memory": {0: "1GiB"}}, "max_memory.0. has no effect"),
        ({"max_memory": {"gpu": "1GiB"}}, "'gpu'"),
        ({"max_memory": {"cpu": "lots"}}, "'lots'"),
        ({"max_memory": 5}, "max_memory is 5"),
        ({"batch": 0}, "batch=0"),
        ({"prompt": 1.5}, "prompt=1.5"),
        ({"new_tokens": True}, "new_tokens=True"),
        ({"offload": "disk"}, "offload='disk'"),
        ({"dtype": "int8"}, "int8"),
        ({"hardware": "nowhere.json"}, "nowhere.json"),
        ({"hardware": 7}, "hardware=7"),
        ({"remeasure": True}, "remeasure"),
        ({"revision": "main"}, "revision"),
        ({"device_map": "auto"}, "device_map has no effect in zinfer.plan"),
        ({"_from_auto": True}, "_from_auto is internal"),
        ({"hardware": replace(cpu(), drive_read=-1.0)}, "drive_read"),
        ({"hardware": replace(cpu(), matmul=7)}, "matmul"),
    ],
)
def test_options_that_make_no_sense_are_refused(config, options, complaint):
    with pytest.raises(OptionError, match=complaint):
        zinfer.plan(config, **{"hardware": cpu(), **options})


@pytest.mark.parametrize("model", [None, 5, "", "no-such-shape", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(OptionError):
        zinfer.plan(model, hardware=cpu())


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(CheckpointError, match="NoSuchForCausalLM"):
        zinfer.plan(tmp_path, hardware=cpu())
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError, match="no-such-type"):
        zinfer.plan(tmp_path, hardware=cpu())


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither config.json nor model.safetensors"):
        zinfer.plan(tmp_path, hardware=cpu())


def test_a_model_that_cannot_run_without_data_is_assumed_to_be_dense_and_the_plan_says_so(
    config, monkeypatch
):
    def refuse(*_: object) -> None:
        raise planning.DryRunError("it reads its input")

    task = {"hardware": cpu(), "max_memory": {"cpu": "80MiB"}, "prompt": 8, "new_tokens": 4}
    exact = zinfer.plan(config, **task)
    monkeypatch.setattr(planning, "dry_run", refuse)
    assumed = zinfer.plan(config, **task)
    assert any("it reads its input" in note and "2 flops" in note for note in assumed.notes)
    assert assumed.tiers == exact.tiers
    assert assumed.read_bytes == exact.read_bytes
    assert assumed.cache_bytes == exact.cache_bytes
    assert assumed.compute_seconds == pytest.approx(exact.compute_seconds, rel=0.1)


def test_what_a_dry_run_cannot_know_is_noted(config):
    notes = zinfer.plan(config, hardware=cpu(), prompt=4000).notes
    assert any("2048 positions" in note for note in notes)
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=256
    )
    bert.architectures = ["BertModel"]
    plan = zinfer.plan(bert, hardware=cpu(), prompt=16)
    assert any("does not generate" in note for note in plan.notes)
    assert plan.cache_bytes == 0


def test_a_published_shape_is_planned_quietly_and_in_little_memory():
    """In a process of its own: transformers speaks through a logger that pytest has taken."""
    code = (
        "import psutil, zinfer; plan = zinfer.plan('opt-66b', hardware='a6000', batch=4); print(plan.weight_bytes); "
        "assert plan.sources['drive_read']; assert psutil.Process().memory_info().rss < 3e9"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == pytest.approx(131.4e9, rel=0.01)


def test_the_machine_at_hand_is_measured_for_the_drive_of_the_checkpoint(checkpoint, monkeypatch, caplog):
    asked = []

    def measured(paths: list[str], processor: object, *, refresh: bool) -> object:
        asked.append((paths, processor, refresh))
        return cpu()

    monkeypatch.setattr(planning, "this_machine", measured)
    with caplog.at_level(logging.WARNING):
        plan = zinfer.plan(checkpoint, device="cpu", max_memory={"cpu": "27MiB"}, prompt=8, remeasure=True)
    assert asked == [([f"{checkpoint}/model.safetensors"], None, True)]
    assert plan.hardware == CPU["name"]
    assert not caplog.records


def test_a_host_that_is_too_small_names_no_budget(config):
    with pytest.raises(BudgetError, match=r"no max_memory\['cpu'\] works there") as refusal:
        zinfer.plan(config, hardware=cpu(host_memory=150 << 20), offload="cpu")
    assert refusal.value.smallest is None
    assert "offload='nvme'" in str(refusal.value)


def test_a_device_that_is_too_small_names_no_budget(config):
    with pytest.raises(BudgetError, match=r"no max_memory\[0\] works there") as refusal:
        zinfer.plan(
            config, hardware=gpu(device_memory=64 << 20), max_memory={0: "64MiB"}, prompt=1000, batch=64
        )
    assert refusal.value.smallest is None


def test_two_budgets_that_are_too_small_are_told_together(config):
    task = {"hardware": gpu(), "offload": "cpu", "prompt": 8}
    with pytest.raises(BudgetError, match=r"with max_memory\[0\] that large") as refusal:
        zinfer.plan(config, max_memory={0: "1MiB", "cpu": "1MiB"}, **task)
    assert refusal.value.smallest is None
    device, host = (
        int(n) for n in re.findall(r"take (\d+) bytes.*works is (\d+) bytes", str(refusal.value))[0]
    )
    assert zinfer.plan(config, max_memory={0: device, "cpu": host}, **task).nvme_bytes == 0


@pytest.fixture
def at_hand(monkeypatch):
    """This machine, made up, without a GPU: what it has free is what the test sets."""
    free = [16 << 30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(planning, "this_machine", lambda *_, **__: cpu())
    monkeypatch.setattr(planning, "free_memory", lambda: free[0])
    return free


def test_where_too_little_is_free_the_bytes_that_have_to_be_are_named(config, at_hand):
    at_hand[0] = 150 << 20
    with pytest.raises(BudgetError, match="end other programs first") as refusal:
        zinfer.plan(config, offload="cpu", prompt=8)
    assert refusal.value.smallest is None
    at_hand[0] = int(re.search(r"for which (\d+) would have to be free", str(refusal.value))[1]) + (8 << 20)
    assert zinfer.plan(config, offload="cpu", prompt=8).nvme_bytes == 0


def test_cache_and_activations_that_do_not_fit_name_the_bytes_that_have_to_be_free(config, at_hand):
    at_hand[0] = 100 << 20
    task = {"prompt": 2500, "new_tokens": 4}
    with pytest.raises(BudgetError, match=r"(\d+) bytes would have to be free") as refusal:
        zinfer.plan(config, **task)
    needed = int(re.search(r"(\d+) bytes would have to be free", str(refusal.value))[1])
    at_hand[0] = needed + (8 << 20)  # a larger budget has larger buffers
    assert zinfer.plan(config, **task)
    at_hand[0] = needed - (8 << 20)
    with pytest.raises(BudgetError):
        zinfer.plan(config, **task)


def test_a_ceiling_above_what_is_free_is_cut_and_noted(config, at_hand):
    at_hand[0] = 1 << 30
    plan = zinfer.plan(config, max_memory={"cpu": "8GiB"}, prompt=8)
    assert plan.host_budget < 1 << 30
    assert any(f"{8 << 30} bytes; {plan.host_budget} are planned with" in note for note in plan.notes)
    assert not any("planned with" in note for note in zinfer.plan(config, prompt=8).notes)


@pytest.fixture
def staged(monkeypatch):
    """This machine, made up, with a device that is played: a function that makes one of so many bytes."""
    monkeypatch.setattr(
        planning,
        "this_machine",
        lambda _, processor, **__: cpu() if processor is None else gpu(device_memory=processor.memory()[1]),
    )
    return StagedProcessor


# Bytes of device and host: all on the device; device and host; all three tiers, with more and with less; hardly any.
BUDGETS = [
    ("60MiB", "20MiB"),
    ("30MiB", "60MiB"),
    ("24MiB", "26MiB"),
    ("12MiB", "40MiB"),
    ("6MiB", "14MiB"),
    ("4MiB", "12MiB"),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("device", "host"), BUDGETS)
def test_the_places_on_a_device_are_those_of_a_run(checkpoint, device, host, batch, staged, nothing_left):
    ceilings = {0: device, "cpu": host}
    plan = zinfer.plan(
        checkpoint, device=staged(1 << 30), max_memory=ceilings, batch=batch, prompt=11, new_tokens=1
    )
    ids = torch.arange(11 * batch).reshape(batch, 11)
    with zinfer.run(checkpoint, device=staged(1 << 30), max_memory=ceilings, progress=False) as model:
        with torch.no_grad():
            output = model(ids, use_cache=True, logits_to_keep=1)
        report = model.zinfer.report()
        del output  # its cache counted so long
        streaming = model.zinfer._streaming
        on_device = {w.name for w in streaming.weights if w.wants_residence}
        on_host = {w.name for w in streaming.weights if streaming.coordinator.device.in_place(w)} - on_device
        sweep_bytes = model.zinfer.sweep_bytes
    assert {name for name, tier in plan.tiers.items() if tier == "device"} == on_device
    assert {name for name, tier in plan.tiers.items() if tier == "host"} == on_host
    assert (plan.device_budget, plan.device_window, plan.small_bytes) == (
        report.device.budget,
        report.device.window_bytes + report.device.conversion_bytes,
        report.device.small_bytes,
    )
    assert (plan.host_budget, plan.host_window, plan.buffer_bytes) == (
        report.budget,
        report.window_bytes,
        report.bounce_bytes,
    )
    assert plan.weight_bytes == report.model_bytes
    assert plan.read_bytes == sweep_bytes
    assert plan.cache_bytes == report.device.cache_bytes


def test_the_budgets_of_the_test_above_are_of_each_kind(checkpoint, staged):
    """Else it would prove less than it says."""
    found = {
        frozenset(
            zinfer.plan(
                checkpoint, device=staged(1 << 30), max_memory={0: device, "cpu": host}, prompt=11
            ).tiers.values()
        )
        for device, host in BUDGETS
    }
    assert {frozenset({"device"}), frozenset({"device", "host", "nvme"})} <= found


@pytest.mark.parametrize("offload", ["auto", "cpu", "none"])
def test_a_device_that_holds_everything_is_planned_as_it_is_run(checkpoint, offload, staged, nothing_left):
    task = {"max_memory": {0: "100MiB", "cpu": "100MiB"}, "offload": offload}
    plan = zinfer.plan(checkpoint, device=staged(1 << 30), prompt=11, new_tokens=1, **task)
    with zinfer.run(checkpoint, device=staged(1 << 30), progress=False, **task) as model:
        assert {name for name, tier in plan.tiers.items() if tier == "device"} == {
            w.name for w in model.zinfer._streaming.weights if w.wants_residence
        }
    assert plan.nvme_bytes == plan.host_bytes == 0


class Costly(StagedProcessor):
    """Running anything takes memory; it is the second of its kind; and its blocks are those of torch's allocator."""

    overhead = 5 << 20

    def allocated(self, nbytes: int) -> int:
        """See Processor."""
        return allocated_by_torch(nbytes)


def test_what_a_device_takes_besides_is_not_planned_with(checkpoint, staged):
    plan = zinfer.plan(checkpoint, device=Costly(1 << 30), max_memory={0: "35MiB", "cpu": "60MiB"}, prompt=8)
    assert plan.device_budget == 30 << 20
    free = 256 << 20
    whole = zinfer.plan(checkpoint, device=Costly(free), max_memory={"cpu": "60MiB"}, prompt=8)
    assert (
        whole.device_budget == free - free // 16 - Costly.overhead
    )  # as a run: less headroom, less overhead


def test_a_ceiling_above_what_a_device_has_free_is_cut_and_noted(checkpoint, staged, caplog):
    processor = staged(64 << 20)
    held = processor.block(16 << 20)
    plan = zinfer.plan(checkpoint, device=processor, max_memory={0: "60MiB", "cpu": "60MiB"}, prompt=8)
    assert plan.device_budget == 48 << 20
    assert any(f"max_memory[0] is {60 << 20} bytes; {48 << 20} are planned" in note for note in plan.notes)
    del held


def test_a_device_at_hand_that_is_too_small_names_a_budget_that_works_for_a_run_too(checkpoint, staged):
    task = {"max_memory": {0: "6MiB", "cpu": "60MiB"}, "prompt": 11, "new_tokens": 1}
    with pytest.raises(BudgetError, match=r"smallest max_memory\[0\]") as refusal:
        zinfer.plan(checkpoint, device=Costly(1 << 30), **task)
    task["max_memory"][0] = refusal.value.smallest
    assert zinfer.plan(checkpoint, device=Costly(1 << 30), **task).device_budget > 0
    with zinfer.run(
        checkpoint, device=Costly(1 << 30), max_memory=task["max_memory"], progress=False
    ) as model:
        model(torch.arange(11).reshape(1, 11), use_cache=True, logits_to_keep=1)
    task["max_memory"][0] -= 4096
    with pytest.raises(BudgetError):
        zinfer.plan(checkpoint, device=Costly(1 << 30), **task)


def test_a_ceiling_above_the_device_at_hand_is_refused(checkpoint, staged):
    with pytest.raises(BudgetError, match=r"max_memory\[0\] is"):
        zinfer.plan(checkpoint, device=staged(1 << 30), max_memory={0: "2GiB"}, prompt=8)


def test_a_gpu_that_is_there_is_planned_for_unless_another_device_is_named(checkpoint, staged, monkeypatch):
    asked = []

    def chosen(device: object) -> object:
        asked.append(device)
        return staged(1 << 30) if device is None else None

    monkeypatch.setattr(planning, "processor_for", chosen)
    assert zinfer.plan(checkpoint, prompt=8).device_budget > 0
    assert zinfer.plan(checkpoint, device="cpu", prompt=8).device_budget == 0
    assert zinfer.plan(checkpoint, hardware=cpu(), prompt=8).device_budget == 0
    assert asked == [None, "cpu"]


def test_a_device_that_is_not_there_is_refused_as_by_a_run(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = []
    for function in (zinfer.plan, zinfer.run):
        with pytest.raises(OptionError, match="leave device out") as refusal:
            function(checkpoint, device="cuda:7")
        told.append(str(refusal.value))
    assert told[0] == told[1]


def test_a_device_means_nothing_on_hardware_that_says_what_computes(config):
    with pytest.raises(OptionError, match="device has no effect"):
        zinfer.plan(config, hardware=gpu(), device="cpu")


def test_residents_of_a_gpu_are_counted_as_its_allocator_rounds_them(checkpoint, staged):
    """Matrices of 0.7 MiB are not rounded; so the model of `config` is, with matrices of 4 and 10.75 MiB."""
    config = config_of(LLAMA | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4})
    task = {"max_memory": {0: "120MiB", "cpu": "300MiB"}, "prompt": 8, "new_tokens": 1}
    plans = [
        zinfer.plan(config, device=kind(1 << 30), **task)
        for kind in (Costly, type("Exact", (Costly,), EXACT))
    ]
    rounded, exact = (sum(tier == "device" for tier in plan.tiers.values()) for plan in plans)
    assert 0 < rounded < exact


@pytest.mark.parametrize(("offload", "counted"), [("nvme", True), ("cpu", False)])
def test_the_text_says_whether_the_cache_lies_within_the_budget(config, offload, counted):
    plan = zinfer.plan(config, hardware=cpu(), prompt=8, offload=offload)
    host = next(line for line in str(plan).splitlines() if line.startswith("host"))
    within, beside = host.split("; budget ")
    assert ("cache" in within, "cache" in beside) == (counted, not counted)
    assert "activations" in beside


@pytest.mark.parametrize("field", ["model", "hardware", "dtype"])
def test_a_message_repeats_no_more_than_the_beginning_of_what_was_given(config, field):
    given = {"model": config, "hardware": cpu(), field: "x" * 100_000}
    with pytest.raises(OptionError) as refusal:
        zinfer.plan(**given)
    assert len(str(refusal.value)) < 1000


def test_a_directory_is_no_hardware_file(config, tmp_path):
    with pytest.raises(OptionError, match="is a directory; give a JSON file"):
        zinfer.plan(config, hardware=str(tmp_path))


def test_options_of_the_hub_have_no_effect_on_a_folder(checkpoint):
    with pytest.raises(OptionError, match=r"revision.*has no effect"):
        zinfer.plan(checkpoint, hardware=cpu(), revision="main")


def test_the_checkpoints_own_code_is_run_where_it_is_trusted(checkpoint, tmp_path):
    config = json.loads(Path(checkpoint, "config.json").read_text())
    config["architectures"] = ["MineForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "mine.MineForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(Path(checkpoint, "model.safetensors"))
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass MineForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        zinfer.plan(tmp_path, hardware=cpu(), prompt=8)
    plan = zinfer.plan(tmp_path, hardware=cpu(), prompt=8, trust_remote_code=True)
    assert plan.tiers == zinfer.plan(checkpoint, hardware=cpu(), prompt=8).tiers


@pytest.mark.parametrize("error", [ImportError, AssertionError, ZeroDivisionError, RecursionError])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_whatever_transformers_raises_over_a_config_is_an_error_that_names_it(
    error, where, tmp_path, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise error("senseless")

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match="senseless"):
        zinfer.plan(tmp_path if where == "folder" else "someone/something", hardware=cpu())
