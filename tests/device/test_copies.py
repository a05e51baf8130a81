"""The threads that copy: host memory is kept under a copy, whenever that was started."""

from __future__ import annotations

import threading
from contextlib import nullcontext

from zinfer.device.copies import Copies
from zinfer.device.staged import StagedEvent


def test_a_copy_that_starts_after_the_end_keeps_its_source_until_it_has_run():
    copies = Copies(lambda: None, nullcontext)
    copies.close()
    event, sources = StagedEvent(), [object()]
    thread = threading.Thread(target=copies.started, args=(event, sources))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and sources, "nobody waits for the copy, and its memory goes with the threads"
    event.reach()
    thread.join(10)
    assert sources == []


def test_a_copy_that_starts_before_the_end_is_waited_for_by_whoever_closes():
    copies = Copies(lambda: None, nullcontext)
    event, sources = StagedEvent(), [object()]
    copies.started(event, sources)
    closing = threading.Thread(target=copies.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive() and sources
    event.reach()
    closing.join(10)
    assert not closing.is_alive() and sources == []


def test_a_copy_that_failed_after_the_end_is_logged(caplog):
    class Failing(StagedEvent):
        def wait(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    copies = Copies(lambda: None, nullcontext)
    copies.close()
    sources = [object()]
    copies.started(Failing(), sources)
    assert sources == [] and "illegal memory access" in caplog.text
