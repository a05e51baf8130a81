"""Shared fixtures: saved tiny models and a check that nothing is left behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests import architectures

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long tests/native/test_soak.py runs."""
    parser.addoption("--requests", type=int, default=100_000, help="random requests of the I/O soak test")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Save the tiny architecture of a given name; returns its folder."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: object) -> str:
        folder = tmp_path / name
        architectures.build(name, dtype).save_pretrained(folder, **options)
        return str(folder)

    return save


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail when the test leaves descriptors or engine threads behind."""
    gc.collect()
    before = _open_files()
    yield
    gc.collect()
    assert _open_files() - before == set()
    assert not [name for name in _thread_names() if name == "zinfer-aio"]


def _open_files() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor of this listing itself
        if target.startswith("/") and target.endswith((".safetensors", ".bin", ".part")):
            found.add(f"{number}:{target}")
    return found


def _thread_names() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        path = Path("/proc/self/task", task, "comm")
        if path.exists():
            names.append(path.read_text().strip())
    assert threading.current_thread().is_alive()
    return names
