from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import sys
import time

import pytest
import torch
import transformers

import zinfer
from tests.cli.conftest import BERT, T5, started
from tests.device.test_choose import BUSY, FULL, refuse
from zinfer.cli import run as run_command
from zinfer.device.staged import StagedProcessor

BUDGET = "cpu=200KB"  # of 500 KB of weights: most of them stream
PROMPT = "Once upon a time"


def expected_ids(folder: str, prompt: str, count: int, **settings) -> tuple[list[int], str]:
    """The new tokens of the model held in memory, and their text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, **{"do_sample": False, **settings})[0]
    new = out[1 if config.is_encoder_decoder else ids.shape[1] :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)


def test_stdout_is_the_text_of_the_model_in_memory_and_nothing_else(llama, command, nothing_left):
    _, text = expected_ids(llama, PROMPT, 24)
    status, out, err = command(
        "run",
        llama,
        "--prompt",
        PROMPT,
        "--max-memory",
        BUDGET,
        "--max-new-tokens",
        "24",
        "--offload",
        "nvme",
    )
    assert (status, out) == (0, text + "\n")
    assert len(text) > 10, "nothing was said: the test proves nothing"
    for part in ("budget", "resident", "sweeps", "memory", "16 in the prompt, 24 new"):
        assert part in err


def test_several_nvme_paths_are_striped_over(llama, command, tmp_path):
    _, text = expected_ids(llama, PROMPT, 4)
    paths = []
    for name in ("nvme0", "nvme1"):
        (tmp_path / name).mkdir()
        paths += ["--nvme-path", str(tmp_path / name)]
    status, out, err = command("run", llama, "--prompt", PROMPT, "--max-new-tokens", "4", *paths)
    assert (status, out) == (0, text + "\n")
    assert f"from {tmp_path}/nvme0/zinfer-store/" in err and "\ndrives " in err
    assert list((tmp_path / "nvme1").rglob("*.safetensors"))


@pytest.mark.parametrize("offload", ["auto", "cpu", "none"])
def test_every_offload_says_the_same(offload, llama, command):
    _, text = expected_ids(llama, PROMPT, 8)
    assert (
        command("run", llama, "--prompt", PROMPT, "--max-new-tokens", "8", "--offload", offload)[1]
        == text + "\n"
    )


def test_caches_in_host_memory_say_the_same(llama, command, monkeypatch, tmp_path):
    _, text = expected_ids(llama, PROMPT, 8)
    monkeypatch.setattr(sys.modules["zinfer.run"], "processor_for", lambda *_, **__: StagedProcessor(1 << 30))
    path = tmp_path / "report.json"
    arguments = ("--max-new-tokens", "8", "--kv-offload", "cpu", "--json", str(path))
    status, out, _ = command("run", llama, "--prompt", PROMPT, *arguments)
    assert (status, out) == (0, text + "\n")
    assert json.loads(path.read_text())["report"]["device"]["name"] == "staged"


def test_caches_in_host_memory_need_a_device(llama, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = command("run", llama, "--prompt", PROMPT, "--kv-offload", "cpu")
    assert (status, out) == (2, "")
    assert "kv_offload='cpu' has no effect where the CPU computes" in err


def test_it_computes_where_it_is_told(llama, command, monkeypatch, tmp_path):
    _, text = expected_ids(llama, PROMPT, 4)
    asked = []

    def chosen(device, **_):
        asked.append(device)
        return StagedProcessor(1 << 30)

    monkeypatch.setattr(sys.modules["zinfer.run"], "processor_for", chosen)
    path = tmp_path / "report.json"
    arguments = (
        "--max-new-tokens",
        "4",
        "--device",
        "cuda:0",
        "--max-memory",
        "0=100MiB",
        "--json",
        str(path),
    )
    status, out, _ = command("run", llama, "--prompt", PROMPT, *arguments)
    assert (status, out, asked) == (0, text + "\n", ["cuda:0"])
    device = json.loads(path.read_text())["report"]["device"]
    assert (device["name"], device["budget"]) == ("staged", 100 << 20)


@pytest.mark.parametrize(("error", "status"), [(FULL[0], 1), (FULL[1], 1), (BUSY, 2)])
@pytest.mark.parametrize("arguments", [("run", "--prompt", PROMPT), ("plan",)])
def test_a_gpu_that_is_full_or_busy_is_told_in_a_line(arguments, error, status, llama, command, monkeypatch):
    refuse(monkeypatch, error)
    name, *rest = arguments
    found, out, err = command(name, llama, *rest, "--device", "cuda:0")
    assert (found, out) == (status, "")
    assert err.startswith("zinfer: error: device='cuda:0'") and err.count("\n") == 1


def test_sampling_repeats_with_its_seed(llama, command):
    torch.manual_seed(7)
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    _, text = expected_ids(llama, PROMPT, 12, **settings)
    torch.manual_seed(7)
    sampling = ("--sample", "--temperature", "0.7", "--top-p", "0.9", "--seed", "7")
    status, out, _ = command("run", llama, "--prompt", PROMPT, "--max-new-tokens", "12", *sampling)
    assert (status, out) == (0, text + "\n")


def test_ids_in_give_ids_out(llama, command, tmp_path):
    new, _ = expected_ids(llama, "ab", 6)
    ids = transformers.AutoTokenizer.from_pretrained(llama)("ab").input_ids
    status, out, _ = command("run", llama, "--ids", ",".join(map(str, ids)), "--max-new-tokens", "6")
    assert (status, out) == (0, " ".join(map(str, new)) + "\n")


def test_the_json_report_holds_ids_text_and_figures(llama, command, tmp_path):
    new, text = expected_ids(llama, PROMPT, 5)
    path = tmp_path / "report.json"
    arguments = ("--max-new-tokens", "5", "--max-memory", BUDGET, "--json", str(path))
    assert command("run", llama, "--prompt", PROMPT, *arguments)[0] == 0
    summary = json.loads(path.read_text())
    assert (summary["new_ids"], summary["text"]) == (new, text)
    assert summary["report"]["sweeps"] == 5
    assert summary["report"]["bytes_read"] > 0
    assert summary["report"]["budget"] == 200_000
    assert summary["seconds"] > 0


def test_encoder_decoders_generate_too(checkpoint, command, nothing_left):
    folder = checkpoint(T5)
    _, text = expected_ids(folder, "a question", 10, min_new_tokens=10)
    status, out, err = command(
        "run", folder, "--prompt", "a question", "--max-new-tokens", "10", "--min-new-tokens", "10",
        "--progress", "--max-memory", "cpu=150KB",
    )  # fmt: skip
    assert (status, out) == (0, text + "\n")
    assert err.count("s a token") == 10


def test_greedy_overrides_a_generation_config_that_samples_beams(llama, command, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    _, text = expected_ids(llama, PROMPT, 8)
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "num_beams": 3,
        "max_length": 50,
    }
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 257}))
    status, out, _ = command("run", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8")
    assert (status, out) == (0, text + "\n")


def test_a_checkpoint_without_a_tokenizer_names_the_remedy(llama, command, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    status, out, err = command("run", str(folder), "--prompt", PROMPT)
    assert (status, out) == (1, "")
    assert "--ids" in err and err.startswith("zinfer: error: ") and err.count("\n") == 1
    assert command("run", str(folder), "--ids", "1,2", "--max-new-tokens", "2")[0] == 0


def test_a_model_that_cannot_generate_says_so(checkpoint, command):
    status, out, err = command("run", checkpoint(BERT), "--prompt", PROMPT)
    assert (status, out) == (1, "")
    assert "BertModel does not generate text" in err


def test_a_budget_too_small_names_the_smallest_that_works(llama, command, nothing_left):
    status, out, err = command("run", llama, "--prompt", PROMPT, "--max-memory", "cpu=2KB")
    assert (status, out) == (1, "")
    smallest = err.split("works is ")[1].split()[0]
    tokens = ("run", llama, "--prompt", PROMPT, "--max-new-tokens", "1")
    # It holds the weights; what the prompt's cache takes besides is told by the pass that makes it.
    status, _, err = command(*tokens, "--max-memory", f"cpu={smallest}")
    assert (status, "key-value cache" in err) == (1, True)
    with_cache = err.split("raise max_memory['cpu'] to ")[1].split(",")[0]
    assert command(*tokens, "--max-memory", f"cpu={with_cache}")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["run", "./no-such-model", "--prompt", "x"], 1, "no-such-model"),
        (["run", "MODEL", "--prompt", "x", "--offload", "floppy"], 2, "floppy"),
        (["run", "MODEL"], 2, "--prompt"),
        (["run", "MODEL", "--prompt", "x", "--ids", "1"], 2, "not allowed"),
        (["run", "MODEL", "--prompt", ""], 2, "no token"),
        (["run", "MODEL", "--ids", "1,x"], 2, "1,x"),
        (["run", "MODEL", "--ids", "1,272"], 2, "vocabulary of 272"),
        (["run", "MODEL", "--prompt", "x", "--max-memory", "3GiB"], 2, "cpu=3GiB"),
        (["run", "MODEL", "--prompt", "x", "--device", "abacus"], 2, "device='abacus'"),
        (["run", "MODEL", "--prompt", "x", "--device", "cuda:99"], 2, "device='cuda:99'"),
        (["run", "MODEL", "--prompt", "x", "--max-memory", "0=3GiB"], 2, "CPU"),
        (["run", "MODEL", "--prompt", "x", "--max-memory", "cpu=much"], 2, "much"),
        (["run", "MODEL", "--prompt", "x", "--max-memory", "cpu=1GB", "--max-memory", "cpu=2GB"], 2, "twice"),
        (["run", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], 2, "positive"),
        (["run", "MODEL", "--prompt", "x", "--min-new-tokens", "30"], 2, "--max-new-tokens 20"),
        (["run", "MODEL", "--prompt", "x", "--seed", "1"], 2, "--sample"),
        (["run", "MODEL", "--prompt", "x", "--sample", "--temperature", "0"], 2, "above 0"),
        (["run", "MODEL", "--prompt", "x", "--sample", "--top-p", "1.5"], 2, "at most 1"),
        (["run", "MODEL", "--prompt", "x", "--dtype", "float99"], 2, "float99"),
        (["run", "MODEL", "--prompt", "x", "--revision", "main"], 2, "revision"),
        (["run", "MODEL", "--prompt", "x", "--offload", "cpu", "--nvme-path", "."], 2, "nvme_path"),
        (["run", "MODEL", "--prompt", "x", "--nvme-path", ".", "--nvme-path", "./"], 2, "twice"),
        (["run", "MODEL", "--prompt", "x", "--json", "./no-such-folder/report.json"], 2, "report.json"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "COMMAND"),
    ],
)
def test_wrong_input_gets_one_line(arguments, status, named, llama, command):
    found, out, err = command(*[llama if argument == "MODEL" else argument for argument in arguments])
    assert (found, out) == (status, "")
    assert err.startswith("zinfer: error: ") and err.count("\n") == 1
    assert named in err


def test_debug_shows_the_traceback(command, capsys):
    from zinfer.cli import main

    assert main(["run", "./no-such-model", "--prompt", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_forced_progress_is_a_line_a_token_where_stderr_is_no_terminal(llama, command):
    arguments = ("--max-new-tokens", "4", "--max-memory", BUDGET)
    _, quiet_out, quiet = command("run", llama, "--prompt", PROMPT, *arguments)
    _, out, err = command("run", llama, "--prompt", PROMPT, *arguments, "--progress")
    assert "s a token" not in quiet
    assert [line.split(":")[0] for line in err.splitlines() if "s a token" in line] == [
        f"token {number} of 4" for number in (1, 2, 3, 4)
    ]
    assert out == quiet_out


def test_an_interrupt_closes_the_model(llama, command, monkeypatch, nothing_left):
    models = []
    real = zinfer.run

    def remember(*args, **kwargs):
        models.append(real(*args, **kwargs))
        return models[-1]

    def interrupt(streamer):
        if len(streamer.ids) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(zinfer, "run", remember)
    monkeypatch.setattr(run_command.IdStreamer, "show", interrupt)
    status, _, err = command("run", llama, "--ids", "1,2", "--max-memory", BUDGET, "--max-new-tokens", "50")
    assert status == 130
    assert err == "zinfer: interrupted\n"
    assert models[0].zinfer.closed
    models.clear()


def test_ctrl_c_ends_a_process_promptly_and_quietly(llama):
    endless = ("--max-new-tokens", "60000", "--min-new-tokens", "60000")
    with started("run", llama, "--ids", "1,2", "--max-memory", BUDGET, *endless) as process:
        process.stdout.read(20)  # some tokens are there
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - begun < 10
    assert process.returncode == 130
    assert err == "zinfer: interrupted\n"
    assert out.endswith("\n")


def test_a_reader_that_goes_away_ends_it_quietly(llama):
    with started(
        "run", llama, "--ids", "1,2", "--max-new-tokens", "60000", "--min-new-tokens", "60000"
    ) as process:
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == ""


def test_a_status_line_on_a_terminal_leaves_stdout_alone(llama):
    """stderr is a terminal, stdout a pipe."""
    _, text = expected_ids(llama, PROMPT, 120, min_new_tokens=120)
    length = ("--max-new-tokens", "120", "--min-new-tokens", "120")
    ours, theirs = pty.openpty()
    drawn = b""
    budget = "cpu=400KB"  # 130 positions of cache besides
    with started("run", llama, "--prompt", PROMPT, "--max-memory", budget, *length, stderr=theirs) as process:
        os.close(theirs)
        while chunk := _read(ours):
            drawn += chunk
        out = process.stdout.read()
        assert process.wait(timeout=30) == 0
    os.close(ours)
    assert out == text + "\n"
    assert b"of 120 [" in drawn and b"GB/s" in drawn
    assert b"120 new" in drawn.split(b"\x1b[2K")[-1], "the report comes after the line was removed"


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: the other side is closed
        return b""
