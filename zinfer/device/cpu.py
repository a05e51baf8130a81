"""The CPU as the compute device: operators read the regions that the drive wrote."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from zinfer.device.fetch import Fetch
from zinfer.device.host import Host, flagged, view_of
from zinfer.errors import BudgetError
from zinfer.weights.lowering import Placed
from zinfer.weights.symbolic import evaluate
from zinfer.weights.weight import Weight


class CpuDevice(Host):
    """A Host whose weights are computed with where they were read to: in the window, or in their places."""

    torch_device = torch.device("cpu")
    name = "cpu"
    kept_bytes = 0
    patience = 1.0

    @property
    def ahead_bytes(self) -> int:
        """Bytes of weights that can be on their way at once; 0 where there is no window."""
        return self.window.capacity if self.window is not None else 0

    @property
    def window_bytes(self) -> int:
        """See Device."""
        return self.window.capacity if self.window is not None and self.window.base_address else 0

    @property
    def in_use(self) -> int:
        """Bytes of the window that hold a weight, or are being read into."""
        return self.window.in_use if self.window is not None else 0

    def release(self, weight: Weight) -> None:
        """Give the place of `weight`, if it has one, back to the kernel as soon as no tensor is on it."""
        if self.residents is not None and self.residents.has(weight):
            self.residents.release(weight)

    def renew_memory(self, places: Sequence[Weight], wanted: Sequence[Weight], window_bytes: int) -> None:
        """Give the window and all places back, and take new ones, those of `wanted` made present.

        No weight may be resident, and no read into the window under way; what is read into an old place meanwhile
        is good, but does not stay (see Fetch).
        """
        for memory in (self.residents, self.window):
            if memory is not None:
                memory.close()
        self.generation += 1
        self._take_memory(places, wanted, window_bytes, at_once=False)

    def in_place(self, weight: Weight) -> bool:
        """Whether a read of `weight` would go to the place where it stays, and take no room in the window."""
        residents = self.residents
        if residents is None or not weight.wants_residence or not residents.has(weight):
            return False
        window = self.window
        fits = window is not None and weight.layout.nbytes <= window.capacity
        return residents.ready(weight) or not fits

    def start(self, weight: Weight, *, urgent: bool, timeout: float = 0.0) -> Fetch | None:
        """Begin to read `weight`, or None when the window has no room for it within `timeout` seconds."""
        generation, in_place = self.generation, self.in_place(weight)
        if in_place:
            assert self.residents is not None
            memory, address = self.residents.take(weight)
        else:
            memory = self.window_room(weight, timeout)
            if memory is None:
                return None
            address = memory.address
        request = self.read(weight.layout, memory, address, urgent)
        self.note(request, weight.name, "demand" if urgent else "prefetch")
        # A partial, not a closure: frames in a traceback keep their function's closure, and so would keep the region.
        settles = in_place or (weight.placed is None and weight.wants_residence)
        finish = partial(self._tensor_of, weight, memory, address, settles)
        fetch = Fetch(weight, request, finish, in_place=in_place, settles=settles, generation=generation)
        weight.fetch = weakref.ref(fetch)
        return fetch

    def shortage(self, weight: Weight) -> BudgetError:
        """What to raise where `weight` waited for room in vain."""
        capacity = self.window.capacity if self.window is not None else 0
        return BudgetError(
            f"{weight.name!r} needs {weight.layout.nbytes} bytes of the window, but {self.in_use} of its {capacity} "
            "bytes are held by tensors still in use (an operator that takes several weights, or views kept by the "
            f"caller); raise max_memory['cpu'] by {weight.layout.nbytes} bytes"
        )

    def enter(self) -> None:
        """Nothing: operators have run when they return."""

    def free_memory(self) -> None:
        """None: operators compute in the host's memory."""

    def bring(self, weight: Weight) -> bool:
        """False: what stays in host memory is resident."""
        return False

    def lift(self, fetch: Fetch, timeout: float = 0.0) -> bool:
        """True: where a weight was read to, it is computed with."""
        return True

    def _tensor_of(self, weight: Weight, memory: Any, address: int, settles: bool) -> torch.Tensor:
        """The tensor of `weight` over `memory`, which it keeps alive, or what its conversion makes of it."""
        self.refuse_changes({piece.run.path for piece in weight.layout.pieces})
        provenance, starts = weight.provenance, weight.layout.starts
        # An inference tensor would be of no use to a later pass outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(provenance, Placed):
                value = view_of(memory, starts[0], provenance)
            else:
                leaves = {
                    id(node): view_of(memory, start, placed)
                    for (node, placed), start in zip(provenance.leaves, starts, strict=True)
                }
                value = evaluate(provenance.expression, partial(leaf_among, leaves), self.torch_device)
                inside = 0 <= value.data_ptr() - address < weight.layout.nbytes
                if settles and inside:  # a view would hold the window's region for good
                    value = value.clone(memory_format=torch.preserve_format)
            return flagged(value, weight.requires_grad)


def leaf_among(leaves: dict[int, torch.Tensor], node: Any) -> torch.Tensor | None:
    """What `evaluate` is given to look leaves up with; a partial of it keeps no frame alive."""
    return leaves.get(id(node))
