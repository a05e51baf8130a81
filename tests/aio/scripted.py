"""The scripted backend of the tests, in Python: what csrc/aio/faults_backend is to the compiled engine.

Real transfers, done at the moment each completes, so that memory is used as late as a slow drive would use it. One
script line an operation, in the order of submission.
"""

import ctypes
import threading
import time
from dataclasses import dataclass

from zinfer.aio.libaio import Result, Transfer
from zinfer.aio.portable import choose, engine
from zinfer.aio.portable.backends import carry_out
from zinfer.errors import OptionError

VALUES = {"ok": 1, "zero": 1, "short": 2, "error": 2, "delay": 2, "hold": 2}  # items of a line
BLOCK = 4096


@dataclass(eq=False)
class Pending:
    transfer: Transfer
    direct: bool
    fault: tuple
    due: float
    held_for: int  # later operations that must complete first

    def perform(self) -> Result:
        transfer, (kind, *value) = self.transfer, self.fault
        if kind == "error":
            return Result(transfer.token, -int(value[0]))
        if kind == "zero":
            return Result(transfer.token, 0)
        kept = min(int(value[0]), transfer.length) if kind == "short" else transfer.length
        if transfer.writing:
            return self.write(kept)
        done = carry_out(transfer)
        if done.result > kept:  # what was not reported as read must not look as if it had been
            ctypes.memset(transfer.address + kept, 0xDB, done.result - kept)
        return Result(transfer.token, min(done.result, kept))

    def write(self, reported: int) -> Result:
        """A direct write takes whole blocks: the last one, reported in part, is left as it was."""
        cut = self.direct and reported < self.transfer.length
        taken = reported // BLOCK * BLOCK if cut else reported
        done = carry_out(self.transfer._replace(length=taken)).result if taken else 0
        return Result(self.transfer.token, reported if done == taken else done)


class ScriptedBackend:
    name = "faults"
    direct_only = False

    def __init__(self, script, bell):
        self.script, self.bell, self.pending = list(script or ()), bell, []

    def submit(self, transfers, direct):
        for transfer, is_direct in zip(transfers, direct, strict=True):
            fault = self.script.pop(0) if self.script else ("ok",)
            delay = fault[1] if fault[0] == "delay" else 0.0
            held_for = int(fault[1]) if fault[0] == "hold" else 0
            self.pending.append(Pending(transfer, is_direct, fault, time.monotonic() + delay, held_for))
            if delay:
                timer = threading.Timer(delay + 0.001, self.bell.ring)
                timer.daemon = True
                timer.start()
        self.bell.ring()

    def collect(self):
        results = self.take_due()
        if not results and self.all_held():  # nothing left to wait for: let the oldest go
            self.pending[0].held_for = 0
            results = self.take_due()
        if self.all_held():
            self.bell.ring()
        return results

    def take_due(self):
        results, now = [], time.monotonic()
        while ready := [item for item in self.pending if item.held_for <= 0 and item.due <= now]:
            results.append(ready[0].perform())
            for earlier in self.pending[: self.pending.index(ready[0])]:
                earlier.held_for -= 1
            self.pending.remove(ready[0])
        return results

    def all_held(self):
        return bool(self.pending) and all(item.held_for > 0 for item in self.pending)

    def close(self):
        self.pending.clear()


def make_backend(wanted, bell, fallbacks):
    """As choose.make_backend, and "faults" too."""
    if wanted.backend != "faults":
        return choose.make_backend(wanted, bell, fallbacks)
    for line in wanted.faults or ():
        if VALUES.get(line[0]) != len(line) or not all(value >= 0 for value in line[1:]):
            raise OptionError(f"unknown fault {line}")
    return ScriptedBackend(wanted.faults, bell)


def install() -> None:
    """Let every portable engine of this process have the backend "faults"."""
    engine.make_backend = make_backend
