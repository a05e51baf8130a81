"""From what the user calls a device to what computes there."""

from __future__ import annotations

from typing import Any

import torch

from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import Processor
from zinfer.errors import OptionError, OutOfMemoryError
from zinfer.weights.shortage import in_short
from zinfer.wording import brief

# Of the runtime's and cuBLAS's errors, those that say that there was no memory: torch tells none of its own by type.
FULL = ("out of memory", "ALLOC_FAILED")


def processor_for(device: Any, *, timed: bool = False) -> Processor | None:
    """What computes on `device`; None where that is the CPU.

    `device`: None for the GPU that torch uses first, or the CPU where there is none; a torch device or its name; or a
    Processor, such as StagedProcessor, which tests and demonstrations make themselves. `timed`: tell when copies ran.
    Raises OptionError for a device that is not there, or cannot be used now; OutOfMemoryError for one that is full.
    """
    if hasattr(device, "torch_device") and hasattr(device, "retire"):
        processor: Processor = device
        return processor
    if device is None:
        return _processor(torch.device("cuda"), timed) if torch.cuda.is_available() else None
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={brief(device)}: {str(error).splitlines()[0]}") from error
    if wanted.type == "cpu":
        return None
    if wanted.type != "cuda":
        raise OptionError(f"device={brief(device)}: zinfer computes on 'cpu' and on 'cuda' devices")
    if not torch.cuda.is_available():
        built = "is not built for GPUs" if not torch.backends.cuda.is_built() else "finds no GPU"
        raise OptionError(
            f"device={brief(device)}: this torch ({torch.__version__}) {built}; leave device out"
        )
    count = torch.cuda.device_count()
    if wanted.index is not None and wanted.index >= count:
        raise OptionError(f"device={brief(device)}: there are {count} GPUs, 'cuda:0' to 'cuda:{count - 1}'")
    return _processor(wanted, timed)


def _processor(device: torch.device, timed: bool) -> CudaProcessor:
    """The GPU `device`, which is the first that is asked of it: a context, kernels and streams."""
    try:
        return CudaProcessor(device, timed=timed)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        words, name = in_short(str(error)), brief(str(device))
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in FULL):
            raise OutOfMemoryError(
                f"device={name} has no memory left to begin with ({words}): other programs, or models and tensors of "
                "this one, hold it. End those, or name another device; device='cpu' computes without one"
            ) from error
        raise OptionError(
            f"device={name}: {words}. If another program has it to itself, end that; or name another device"
        ) from error
