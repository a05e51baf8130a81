"""One weight on its way from the drive, or from host memory, to a device, and the tensor it becomes there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from zinfer.device.arena import Lease
from zinfer.device.processor import Event
from zinfer.weights.weight import Weight


class LiftedFetch:
    """A read, or a weight that lies in host memory already, and the copy of it.

        reading --landed--> in host memory, and once it has a lease --issue()--> copying --> `tensor` made

    Nothing here waits for a copy, but of what is to stay: the stream of whoever calls wait() does. Dropping a
    LiftedFetch that is still reading cancels the read; one whose copy was started leaves the copy to run, into memory
    that nobody else gets before. Any thread may call any method. `in_place`: it reads to the place where it stays in
    host memory, or lies there, and takes no room in the host's window. `settles`: the tensor may stay on the device.
    """

    def __init__(
        self,
        weight: Weight,
        request: Any | None,
        memory: Any,
        start_copy: Callable[[Any, Lease, bool], tuple[Event, list[Any]]],
        started: Callable[[Event, list[Any]], None],
        finish: Callable[[Lease, bool], tuple[torch.Tensor, Event | None]],
        follow: Callable[[Event, Lease, torch.Tensor | None], None],
        *,
        in_place: bool,
        settles: bool,
        generation: int,
    ) -> None:
        self.weight = weight
        self.in_place = in_place
        self.settles = settles
        self.generation = generation
        self.lease: Lease | None = None
        self.lifting = threading.Lock()  # held while somebody looks for room for it
        self._request = request
        self._memory = memory
        self._start_copy, self._started = start_copy, started
        self._finish, self._follow = finish, follow
        self._event: Event | None = None
        self._tensor: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def lifted(self) -> bool:
        """Whether it has a lease, and so will be copied."""
        return self.lease is not None

    @property
    def takes_room(self) -> bool:
        """Whether one of the windows has room when it is dropped."""
        return not self.in_place or (self.lifted and not self.settles)

    @property
    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""
        event = self._event
        return event is not None and event.done

    def landed(self, timeout: float | None) -> bool:
        """Whether its bytes are in host memory, within `timeout` seconds. Raises DriveError."""
        request = self._request
        return request is None or request.wait(timeout)

    def issue(self, *, urgent: bool) -> None:
        """Start the copy, unless that was done. It has landed, and has a lease."""
        with self._lock:
            if self._event is None:
                assert self.lease is not None
                self._event, sources = self._start_copy(self._memory, self.lease, urgent)
                self._request = self._memory = None
                # Only now: whoever is told that the copy has ended is to find the memory free.
                self._started(self._event, sources)

    def wait(self) -> torch.Tensor:
        """The tensor, which what the calling thread's stream is given from now on can read.

        One that is to stay is there when this returns: other streams will be given it, which know nothing of the copy.
        Raises DriveError or CheckpointChangedError.
        """
        self.landed(None)
        self.issue(urgent=True)
        with self._lock:
            lease, event = self.lease, self._event
            assert lease is not None and event is not None
            # What a conversion made is the memory of the stream that made it, and may be given to another here.
            self._follow(event, lease, self._tensor if self.weight.placed is None else None)
            if self._tensor is None:
                self._tensor, made = self._finish(lease, self.settles)
                self._event = event = made or event
            tensor = self._tensor
        if self.settles:
            event.wait()
        return tensor
