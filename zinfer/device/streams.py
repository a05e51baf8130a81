"""The streams that a device's operators run on, and tensors that any of them may read."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from zinfer.device.processor import Processor


class Streams:
    """Those that operators are known to run on: `known`, which grows. Any thread may call any method."""

    def __init__(self, processor: Processor) -> None:
        self.known: list[Any] = []
        self._processor = processor
        self._shared: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()  # a tensor may die, and run what is not ours, inside a method here

    def enter(self) -> Any:
        """The calling thread runs operators from now on; on which stream."""
        stream = self._processor.stream()
        if stream in self.known:
            return stream
        with self._lock:
            if stream in self.known:
                return stream
            self.known.append(stream)
            shared = list(self._shared.values())
        for tensor in shared:
            self._processor.used(tensor, stream)
        return stream

    def share(self, tensor: torch.Tensor) -> None:
        """`tensor`, an operator's result, may be read on any of them, and on those that come, as long as it lives.

        Told while it lives, and not when it dies: nobody is asked before a model that is dropped takes it along.
        """
        with self._lock:
            self._shared[id(tensor)] = tensor
            known = list(self.known)
        for stream in known:
            self._processor.used(tensor, stream)
