"""Tensor values as streams of bytes, from one block of seeded normal numbers.

Drawing every value of a large model would take longer than writing it. So `BLOCK` standard normal
numbers are drawn once, scaled and cast once for each (mean, deviation, dtype), and every tensor reads
them round and round from a place of its own:

    block     |0 1 2 3 4 5 ... BLOCK-1|
    tensor i            ^ (first + i * STRIDE) mod BLOCK

BLOCK is prime, so the places of the first BLOCK tensors all differ, and rows of one tensor do not repeat
in step with its width: a read from the wrong place shows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from zinfer.synth.inventory import TensorSpec

BLOCK = 4_194_301  # the largest prime below 2**22: 16 MiB of float32
STRIDE = 2_592_221  # about BLOCK divided by the golden ratio: neighbours start far apart
_BLOCKS_KEPT = 4


class Values:
    """The bytes of every tensor of one checkpoint; the same for the same seed. For one thread."""

    def __init__(self, seed: int) -> None:
        digest = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        self._first = int(generator.integers(BLOCK))
        self._normals = torch.from_numpy(generator.standard_normal(BLOCK, dtype=np.float32))
        self._blocks: OrderedDict[tuple[float, float, torch.dtype], memoryview] = OrderedDict()

    def chunks(self, spec: TensorSpec, index: int) -> Iterator[memoryview]:
        """The bytes of tensor number `index` of the checkpoint, in pieces of up to a block."""
        if spec.value is not None:
            yield _bytes_of(spec.value)
            return
        block = self._block(spec.mean, spec.std, spec.dtype)
        start = (self._first + index * STRIDE) % BLOCK * spec.dtype.itemsize
        left = spec.nbytes
        while left:
            piece = block[start : start + left]
            yield piece
            left -= len(piece)
            start = 0

    def _block(self, mean: float, std: float, dtype: torch.dtype) -> memoryview:
        key = (mean, std, dtype)
        if key not in self._blocks:
            while len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            self._blocks[key] = _bytes_of(self._normals.mul(std).add_(mean).to(dtype))
        self._blocks.move_to_end(key)
        return self._blocks[key]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
