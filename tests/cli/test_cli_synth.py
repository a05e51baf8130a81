from __future__ import annotations

import json
from pathlib import Path

import pytest

import zinfer
from tests.cli.conftest import LLAMA
from zinfer.cli import main
from zinfer.synth import SHAPES


def test_a_synthesised_checkpoint_runs(command, tmp_path):
    out = str(tmp_path / "tiny")
    status, text, err = command(
        "synth", "llama-tiny", out, "--layers", "2", "--shard-size", "1MB", "--seed", "3"
    )
    assert (status, text) == (0, "")
    assert "GB of weights" in err
    assert len(list(Path(out).glob("*.safetensors"))) > 1
    status, text, err = command(
        "run", out, "--prompt", "Hello", "--max-new-tokens", "3", "--max-memory", "cpu=2MiB"
    )
    assert status == 0
    assert "3 new" in err


def test_a_config_file_dtype_and_seed_are_taken(command, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    out = tmp_path / "out"
    assert command("synth", str(config), str(out), "--dtype", "float16", "--seed", "9")[0] == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert json.loads((out / "synth.json").read_text())["seed"] == 9
    status, _, err = command("synth", str(config), str(out), "--dtype", "float16", "--seed", "10")
    assert status == 2
    assert "nothing is overwritten" in err


def test_the_list_names_every_shape_with_its_size(command):
    status, out, err = command("synth", "--list")
    assert (status, err) == (0, "")
    lines = out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(SHAPES)
    assert lines[1].split()[1:] == ["LlamaForCausalLM", "3,297,898,496", "6,595,796,992"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["synth", "llama-tiny"], "OUT"),
        (["synth", "no-such-shape", "out"], "llama-tiny"),
        (["synth", "--list", "llama-tiny"], "--list"),
        (["synth", "--list", "--seed", "1"], "--list"),
        (["synth", "llama-tiny", "out", "--layers", "0"], "layers=0"),
        (["synth", "llama-tiny", "out", "--dtype", "int4"], "int4"),
        (["synth", "llama-tiny", "out", "--shard-size", "huge"], "huge"),
        (["synth", "llama-tiny", "out", "--seed", "x"], "--seed"),
    ],
)
def test_wrong_options_get_one_line_and_write_nothing(arguments, named, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("zinfer: error: ") and err.count("\n") == 1
    assert named in err
    assert not list(tmp_path.iterdir())


def test_help_lists_all_commands_and_version_tells_it(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("run", "synth", "doctor", "examples:"):
        assert command in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zinfer {zinfer.__version__}\n"
    for command in ("run", "synth", "doctor"):
        assert main([command, "--help"]) == 0
        assert f"zinfer {command} " in capsys.readouterr().out
