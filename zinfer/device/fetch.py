"""One weight on its way from the drive, and the tensor it becomes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from zinfer.weights.weight import Weight


class Fetch:
    """A read in flight and then the tensor it delivered.

        reading --wait()--> ready: `tensor` made, region owned by the tensor
           \\--error------> wait() raises, every time

    Dropping a Fetch that is still reading cancels the read and waits until no byte of it can land
    any more (the request guarantees it); dropping a ready one releases the region as soon as no
    operator or view uses the tensor. Any thread may wait; the tensor is made once. `in_place`: it reads into the
    memory where the weight is to stay, and takes no room in the window. `settles`: the tensor may stay, being there or
    in memory of its own. `generation`: of the device's memory, which may have been divided anew since.
    """

    lifted = True  # where it was read to, it is computed with

    def __init__(
        self,
        weight: Weight,
        request: Any,
        finish: Callable[[], torch.Tensor],
        *,
        in_place: bool,
        settles: bool,
        generation: int,
    ) -> None:
        self.weight = weight
        self.in_place = in_place
        self.settles = settles
        self.generation = generation
        self._request: Any = request
        self._finish = finish
        self._tensor: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def takes_room(self) -> bool:
        """Whether the window has room when it is dropped."""
        return not self.in_place

    @property
    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""
        request = self._request
        return request is None or request.done

    def wait(self) -> torch.Tensor:
        """The tensor, once its bytes have landed. Raises DriveError or CheckpointChangedError."""
        request = self._request
        if request is not None:
            request.wait()
        with self._lock:
            if self._tensor is None:
                self._tensor = self._finish()
                del self._finish
                self._request = None  # it holds the region, which from here on is the tensor's alone
            return self._tensor
