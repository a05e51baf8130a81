"""`zinfer plan`: a table for people, JSON for programs, and errors with the status of their kind."""

from __future__ import annotations

import json

import pytest

import zinfer
from tests.planner.machines import cpu
from zinfer import hardware_probe
from zinfer.planner.hardware import load_hardware

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 512,
}


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path / "config.json")


def test_it_prints_a_table(command, config):
    status, out, err = command("plan", config, "--hardware", "a6000", "--batch", "4")
    assert (status, err) == (0, "")
    labels = [line.split("  ")[0] for line in out.splitlines()]
    assert labels[:5] == ["model", "hardware", "task", "device", "host"]
    assert "RTX A6000" in out and "batch 4, 512 tokens of prompt, 32 new" in out
    assert "tokens/s" in out


def test_its_json_is_the_plan_of_the_library(command, config):
    asked = ["--prompt", "64", "--new-tokens", "8", "--max-memory", "0=80MiB", "--max-memory", "cpu=60MiB"]
    status, out, _ = command("plan", config, "--hardware", "rtx4090", *asked, "--dtype", "bfloat16", "--json")
    plan = zinfer.plan(
        config,
        hardware="rtx4090",
        prompt=64,
        new_tokens=8,
        max_memory={0: "80MiB", "cpu": "60MiB"},
        dtype="bfloat16",
    )
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(plan.as_dict()))
    assert plan.sources == load_hardware("rtx4090").sources


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--hardware", "nowhere.json"], 2, "nowhere.json"),
        (["--hardware", "a6000", "--max-memory", "cpu=1PiB"], 2, "not a memory size"),
        (["--hardware", "a6000", "--max-memory", "cpu=1000GiB"], 1, "ask for at most"),
        (["--hardware", "a6000", "--max-memory", "cpu=1GiB", "--max-memory", "cpu=2GiB"], 2, "twice"),
        (["--hardware", "a6000", "--max-memory", "0=1MiB"], 1, "smallest max_memory[0]"),
        (["--hardware", "a6000", "--batch", "99999"], 1, "largest batch that fits"),
        (["--hardware", "a6000", "--remeasure"], 2, "remeasure"),
        (["--hardware", "a6000", "--device", "cpu"], 2, "device has no effect"),
        (["--device", "cuda:99"], 2, "device='cuda:99'"),
        (["--device", "abacus"], 2, "device='abacus'"),
        (["--batch", "0"], 2, "not a positive number"),
        (["--hardware", "a6000", "--dtype", "int3"], 2, "int3"),
    ],
)
def test_what_makes_no_sense_is_an_error_with_a_remedy(command, config, arguments, status, complaint):
    found, out, err = command("plan", config, *arguments)
    assert (found, out) == (status, "")
    assert complaint in err


def test_a_file_of_hardware_is_read_and_its_faults_are_named(command, config, tmp_path):
    fields = load_hardware("a6000").as_dict()
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(fields | {"name": "my machine"}))
    status, out, _ = command("plan", config, "--hardware", str(mine))
    assert status == 0 and "my machine" in out
    mine.write_text(json.dumps(fields | {"drive_read": 5.6}))
    status, _, err = command("plan", config, "--hardware", str(mine))
    assert status == 2
    assert "'drive_read' is 5.6; plausible is 1e+06 to 1e+12 bytes a second" in err


def test_help_names_the_command_and_its_machines(command):
    _, out, _ = command("--help")
    assert "zinfer plan llama-3.1-70b" in out
    _, out, _ = command("plan", "--help")
    assert "a6000, rtx4090, h200" in out


def test_a_model_that_is_nowhere_is_an_option_error(command):
    status, _, err = command("plan", "llama-9-1t", "--hardware", "h200")
    assert status == 2 and "llama-3.1-405b" in err


@pytest.fixture
def measured(monkeypatch) -> None:
    """A measurement of this machine that takes no time."""
    monkeypatch.setattr(hardware_probe, "_measure", lambda *_: (cpu(), False))


def test_that_the_machine_is_measured_is_told_once_on_stderr(command, config, measured):
    asked = ("plan", config, "--device", "cpu", "--prompt", "8")
    status, out, err = command(*asked, "--json")
    assert status == 0 and json.loads(out)["hardware"] == "a made-up CPU"
    assert "measuring drive, memory and arithmetic of this machine" in err
    assert command(*asked)[2] == ""


def test_debug_tells_what_is_planned_for(command, config):
    asked = ("plan", config, "--hardware", "a6000", "--prompt", "8")
    assert "planning for" in command(*asked, "--debug")[2]
    assert "planning for" not in command(*asked)[2]


def test_trust_in_code_that_there_is_none_of_is_refused(command, config):
    status, _, err = command("plan", config, "--hardware", "a6000", "--trust-remote-code")
    assert status == 2 and "trust_remote_code" in err
