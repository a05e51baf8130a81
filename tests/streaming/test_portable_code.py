"""A model streams with the portable engine and pool, and its logits are bit-equal all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zinfer

DEADLINE = 120.0  # seconds: most of them are torch's and transformers' imports

STREAM = """
import gc, sys, threading
import torch, zinfer, zinfer.aio, zinfer.pinned
from tests import architectures

assert not zinfer.aio.COMPILED and not zinfer.pinned.COMPILED
folder, name = sys.argv[1:]
reference = architectures.reference(name, folder)
budget = int(architectures.parameter_bytes(reference) * 0.55)
try:
    model = zinfer.run(folder, offload="nvme", max_memory={"cpu": budget})
except zinfer.BudgetError as error:
    model = zinfer.run(folder, offload="nvme", max_memory={"cpu": error.smallest})
ids = torch.tensor([[5, 17, 33, 101, 200, 9, 77], [8, 3, 250, 41, 6, 90, 12]])
settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
with model, torch.no_grad():
    for rows in (ids, ids[:1], ids[:1, :1]):
        assert torch.equal(reference(input_ids=rows).logits, model(input_ids=rows).logits)
    assert torch.equal(reference.generate(ids, **settings), model.generate(ids, **settings))
    report = model.zinfer.report()
    device = model.zinfer._streaming.coordinator.device
    assert type(device.drives._engines[0][1]).__module__ == "zinfer.aio.portable.engine"
    assert report.bytes_read > report.model_bytes, "nothing was streamed: the test proves nothing"
    device.drives.check_integrity()
    device.window.check_integrity()
del model, device
gc.collect()
assert not [thread for thread in threading.enumerate() if thread.name.startswith("zinfer-")]
"""


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_streams_bit_equal_with_portable_code(name, saved):
    root = str(Path(zinfer.__file__).parent.parent)
    environment = {**os.environ, "ZINFER_PORTABLE": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", STREAM, saved(name), name]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "zinfer", "--version"],
        ["-c", "import sys, zinfer.cli; sys.exit(zinfer.cli.aio_bench_main(['--version']))"],
    ],
)
def test_the_commands_take_the_usual_words_for_portable_code(command):
    root = str(Path(zinfer.__file__).parent.parent)
    environment = {**os.environ, "ZINFER_PORTABLE": "yes", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("zinfer ")
