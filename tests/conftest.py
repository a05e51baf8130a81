"""Shared fixtures: saved tiny models and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests import architectures

# A shell starts its background jobs with Ctrl-C ignored, and so would be every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long tests/native/test_soak.py and test_pool_soak.py run, and which tests."""
    parser.addoption("--share", help="N/M: of the tests found only every M-th, from the N-th on")
    parser.addoption("--requests", type=int, default=100_000, help="random requests of the I/O soak test")
    parser.addoption(
        "--pool-operations",
        type=int,
        default=200_000,
        help="random acquires and releases of the pool soak test",
    )
    parser.addoption(
        "--every-mix", action="store_true", help="every architecture with every mix of tiers, not two of them"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests out that are not in the share asked for."""
    if share := config.getoption("--share"):
        number, count = map(int, share.split("/"))
        mine = items[number - 1 :: count]
        config.hook.pytest_deselected(
            items=[item for place, item in enumerate(items) if place % count != number - 1]
        )
        items[:] = mine


@pytest.fixture(autouse=True)
def no_drive_profiles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither use nor touch the profiles of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
    """Fail when the test leaves descriptors (of files, rings, events) or engine threads behind."""
    before = _open_files()
    yield
    if _open_files() - before or "zinfer-aio" in _thread_names():
        gc.collect()  # a fifth of a second, so only where something waits for it
    assert _open_files() - before == set()
    assert "zinfer-aio" not in _thread_names()


def _open_files() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor of this listing itself
        weights = target.startswith("/") and target.endswith((".safetensors", ".bin", ".part", ".lock"))
        if weights or "io_uring" in target or "eventfd" in target:
            found.add(f"{number}:{target}")
    return found


def _thread_names() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(Path("/proc/self/task", task, "comm").read_text().strip())
    return names
