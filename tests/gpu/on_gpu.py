"""What the tests on a GPU share."""

from __future__ import annotations

import os

import torch

from tests.streaming import devices
from tests.streaming.test_exactness import IDS, inputs_for
from zinfer.device.cuda import CudaProcessor

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is used: the same bits each time
CUDA = torch.device("cuda")
GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


class WithoutLimit(CudaProcessor):
    """The budgets of tiny models are below what torch's allocator takes at once, and divide the tiers all the same."""

    def limit(self, nbytes: int | None) -> None:
        """See Processor."""


def run_within(folder: str, device: int, host: int, *, poison: bool = False, **options):
    """Stream within `device` and `host` bytes, or within the fewest that work."""
    return devices.run_within(
        folder, WithoutLimit(CUDA, poison=poison), device, host, **({"offload": "nvme"} | options)
    )


@torch.no_grad()
def results(model, name: str) -> list[torch.Tensor]:
    """Logits and tokens: batches, one sequence and a single token take different kernels."""
    found = []
    for ids in (IDS, IDS[:1], IDS[:1, :1], IDS):
        inputs = {key: value.to(CUDA) for key, value in inputs_for(name, ids).items()}
        found.append(model(**inputs).logits)
    if model.can_generate():
        found.append(model.generate(IDS.to(CUDA), **GENERATE))
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
