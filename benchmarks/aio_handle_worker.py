"""DeepNVMe's `aio_handle` in a process of its own, with the Python of a venv that has deepspeed.

One JSON object a line in, one a line out:

    {"path", "size", "buffer_bytes", "block_bytes", "depth", "threads"}    makes the handle
    {"direction": "read" or "write", "seconds"}                            -> {"nbytes", "seconds", "cpu_seconds"}
"""

import json
import os
import sys
import time
from typing import Any


def transfer(
    handle: Any, tensor: Any, path: str, size: int, direction: str, seconds: float
) -> dict[str, Any]:
    """Move the file through `tensor`, one part after the other, round and round, for about `seconds`."""
    move = handle.async_pread if direction == "read" else handle.async_pwrite
    parts = size // tensor.numel()
    moved, started, cpu = 0, time.perf_counter(), time.process_time()
    while not moved or time.perf_counter() - started < seconds:
        move(tensor, path, moved // tensor.numel() % parts * tensor.numel())
        handle.wait()
        moved += tensor.numel()
    return {
        "nbytes": moved,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is not an answer
    import torch
    from deepspeed import __version__
    from deepspeed.ops.op_builder import AsyncIOBuilder

    library = AsyncIOBuilder().load(verbose=False)
    handle = tensor = path = size = None
    answers.write(json.dumps({"version": __version__}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if "path" in asked:
            handle = tensor = None
            path, size = asked["path"], asked["size"]
            handle = library.aio_handle(asked["block_bytes"], asked["depth"], False, True, asked["threads"])
            tensor = handle.new_cpu_locked_tensor(asked["buffer_bytes"], torch.empty(0, dtype=torch.uint8))
            tensor.fill_(7)
            answer: dict[str, Any] = {"ready": True}
        else:
            answer = transfer(handle, tensor, str(path), int(size or 0), asked["direction"], asked["seconds"])
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
