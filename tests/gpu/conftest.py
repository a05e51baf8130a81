"""The tests here need a GPU, and are skipped without one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def on_a_gpu():
    """Operators are those that give the same bits each time, where there are such."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
