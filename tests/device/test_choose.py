"""From what the user calls a device to what computes there, where a GPU is full or busy; played without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zinfer
from zinfer.device import choose

MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call\nCompile with TORCH_USE_CUDA_DSA"
FULL = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 MiB.\nMore of the allocator"
    ),
    RuntimeError(f"CUDA error: out of memory{MORE}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
BUSY = RuntimeError(f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{MORE}")


def refuse(monkeypatch: Any, error: Exception) -> None:
    """There is one GPU, and `error` is what torch says of it."""

    def raises(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(choose, "CudaProcessor", raises)


def opened_by(how: str, folder: str, device: str | None) -> Any:
    return (zinfer.run if how == "run" else zinfer.plan)(folder, device=device)


@pytest.mark.parametrize("how", ["run", "plan"])
@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
@pytest.mark.parametrize("error", FULL, ids=["allocator", "runtime", "cublas"])
def test_a_gpu_without_memory_is_told_with_what_to_do(error, device, how, saved, monkeypatch):
    refuse(monkeypatch, error)
    with pytest.raises(zinfer.OutOfMemoryError, match=r"no memory left.*other programs.*End those") as caught:
        opened_by(how, saved("llama"), device)
    said = str(caught.value)
    assert f"device={device or 'cuda'!r}" in said and "\n" not in said
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("how", ["run", "plan"])
def test_a_gpu_that_another_program_has_to_itself_is_an_option_that_cannot_be(how, saved, monkeypatch):
    refuse(monkeypatch, BUSY)
    with pytest.raises(zinfer.OptionError, match=r"device='cuda:0': .*busy or unavailable") as caught:
        opened_by(how, saved("llama"), "cuda:0")
    assert "\n" not in str(caught.value)
