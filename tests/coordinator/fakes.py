"""Weights, fetches, a window and a device that are plain Python objects: no I/O, every move written down."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from zinfer.errors import BudgetError, DriveError
from zinfer.timeline.tally import Tally

SIZE = 100  # bytes of a weight's region, unless told


class FakeLayout:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class FakeWeight:
    """What the coordinator looks at."""

    def __init__(
        self, name: str, nbytes: int = SIZE, *, wants_residence: bool = False, placed: bool = True
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.layout = FakeLayout(nbytes)
        self.rows_only = False
        self.wants_residence = wants_residence
        self.placed = object() if placed else None
        self.resident: torch.Tensor | None = None
        self.fetch: weakref.ref[FakeFetch] | None = None

    def __repr__(self) -> str:
        return self.name


class FakeFetch:
    """Ready at once, unless `error` is given or `held_back` until released."""

    def __init__(self, weight: Any, error: Exception | None = None, held_back: bool = False) -> None:
        self.weight = weight
        self.in_place = self.settles = False
        self.generation = 0
        self._error = error
        self._ready = threading.Event()
        self._tensor: torch.Tensor | None = None
        if not held_back:
            self._ready.set()

    @property
    def takes_room(self) -> bool:
        return not self.in_place

    @property
    def lifted(self) -> bool:
        return True

    @property
    def done(self) -> bool:
        return self._ready.is_set()

    def release(self) -> None:
        self._ready.set()

    def wait(self) -> torch.Tensor:
        assert self._ready.wait(10), "nobody released this read"
        if self._error is not None:
            raise self._error
        if self._tensor is None:
            self._tensor = torch.empty(0)
        return self._tensor


class FakeWindow:
    """Bytes of `capacity`, given back when the fetch that took them dies."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.in_use = 0

    def take(self, nbytes: int) -> bool:
        if self.in_use + nbytes > self.capacity:
            return False
        self.in_use += nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.in_use -= nbytes


class FakeDevice:
    """Starts fetches; `started` lists (name, urgent) of each; reads of weights named in `fail` fail."""

    def __init__(self, window: int | None) -> None:
        self.window = FakeWindow(window) if window is not None else None
        self.started: list[tuple[str, bool]] = []
        self.rows: list[tuple[str, list[int]]] = []
        self.fail: set[str] = set()
        self.hold_back: set[str] = set()
        self.closed = False
        self.tally = Tally()
        self.generation = 0
        self.patience = 0.3
        self.absent: set[str] = set()  # residents whose place is not present yet
        self.on_room: weakref.WeakMethod[Callable[[], None]] | None = None
        self.on_start: Callable[[str], None] = lambda name: None
        self._lives: list[weakref.ref[FakeFetch]] = []

    @property
    def ahead_bytes(self) -> int:
        return self.window.capacity if self.window is not None else 0

    @property
    def in_use(self) -> int:
        return self.window.in_use if self.window is not None else 0

    def bring(self, weight: Any) -> bool:
        return False

    def lift(self, fetch: Any, timeout: float = 0.0) -> bool:
        return True

    def refused(self, weight: Any) -> None:
        weight.wants_residence = False

    def release(self, weight: Any) -> None:
        pass

    def shortage(self, weight: Any) -> BudgetError:
        return BudgetError(
            f"{weight.name!r} needs {weight.layout.nbytes} bytes, held by tensors still in use"
        )

    def in_place(self, weight: Any) -> bool:
        return weight.wants_residence and weight.placed is not None and weight.name not in self.absent

    def settles(self, weight: Any) -> bool:
        return weight.wants_residence and weight.name not in self.absent

    def start(self, weight: Any, *, urgent: bool, timeout: float = 0.0) -> FakeFetch | None:
        kept = self.in_place(weight)
        if self.window is not None and not kept and not self.window.take(weight.layout.nbytes):
            return None
        self.on_start(weight.name)
        self.started.append((weight.name, urgent))
        error = DriveError("EIO", weight.name, 0, 1, 5, "fake") if weight.name in self.fail else None
        fetch = FakeFetch(weight, error, weight.name in self.hold_back)
        fetch.in_place = kept
        fetch.settles = weight.wants_residence and (kept or weight.placed is None)
        weight.fetch = weakref.ref(fetch)
        self._lives.append(weight.fetch)
        if self.window is not None and not kept:
            weakref.finalize(fetch, self.window.give, weight.layout.nbytes).atexit = False
        return fetch

    def read_rows(self, weight: Any, rows: list[int]) -> torch.Tensor:
        self.rows.append((weight.name, rows))
        return torch.zeros(len(rows), 4)

    def free_memory(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def alive(self) -> list[str]:
        """Names of the weights whose reads still exist, oldest first."""
        return [fetch.weight.name for ref in self._lives if (fetch := ref()) is not None]

    def names(self, *, urgent: bool | None = None) -> str:
        """Weights with names of one letter, in the order their reads were started."""
        return "".join(name for name, kind in self.started if urgent is None or kind is urgent)
