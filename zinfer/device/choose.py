"""From what the user calls a device to what computes there."""

from __future__ import annotations

from typing import Any

import torch

from zinfer.device.cuda import CudaProcessor
from zinfer.device.processor import Processor
from zinfer.errors import OptionError
from zinfer.wording import brief


def processor_for(device: Any, *, timed: bool = False) -> Processor | None:
    """What computes on `device`; None where that is the CPU.

    `device`: None for the GPU that torch uses first, or the CPU where there is none; a torch device or its name; or a
    Processor, such as StagedProcessor, which tests and demonstrations make themselves. `timed`: tell when copies ran.
    Raises OptionError for a device that is not there.
    """
    if hasattr(device, "torch_device") and hasattr(device, "retire"):
        processor: Processor = device
        return processor
    if device is None:
        return CudaProcessor(torch.device("cuda"), timed=timed) if torch.cuda.is_available() else None
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
    return CudaProcessor(wanted, timed=timed)
