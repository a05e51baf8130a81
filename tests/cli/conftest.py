"""Tiny checkpoints with a tokenizer, and the command in process and as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zinfer.cli import main
from zinfer.synth import synthesise

SPECIALS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 65536,
    **SPECIALS,
}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 272,
    "decoder_start_token_id": 258,
    **SPECIALS,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 272,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[dict], str]:
    """The folder of a float32 checkpoint of a config, written once."""
    folders: dict[str, str] = {}

    def make(config: dict) -> str:
        kind = config["model_type"]
        if kind not in folders:
            root = tmp_path_factory.mktemp(kind)
            (root / "config.json").write_text(json.dumps(config))
            folders[kind] = synthesise(
                str(root / "config.json"), str(root / "out"), dtype="float32", progress=False
            )
        return folders[kind]

    return make


@pytest.fixture
def llama(checkpoint) -> str:
    return checkpoint(LLAMA)


@pytest.fixture
def command(capsys) -> Callable[..., tuple[int, str, str]]:
    """Carry out `zinfer` in this process; its exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@contextmanager
def started(*arguments: str, **options) -> Iterator[subprocess.Popen]:
    """`python -m zinfer` as a process of its own, ended in any case."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "zinfer", *arguments],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        **{"stderr": subprocess.PIPE, "text": True, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
