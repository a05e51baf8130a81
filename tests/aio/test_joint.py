"""Requests joined into one: all succeed, or the first failure speaks for them once nothing is in flight."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref

import pytest

from zinfer.aio.joint import JointRequest
from zinfer.errors import DriveError


class Part:
    """A request that ends when told to, or `drain` seconds after it is cancelled."""

    def __init__(self, nbytes=1, drain=0.0):
        self.nbytes = nbytes
        self.seconds = 0.0
        self.cancels = 0
        self._drain = drain
        self._over = threading.Event()
        self._errno = None

    @property
    def done(self):
        return self._over.is_set()

    def end(self, errno=None, seconds=0.0):
        if not self._over.is_set():
            self._errno, self.seconds = errno, seconds
            self._over.set()
        return self

    def wait(self, timeout=None):
        if not self._over.wait(timeout):
            return False
        if self._errno is not None:
            raise DriveError("failed", "file", 0, 1, self._errno, "fake")
        return True

    def cancel(self):
        self.cancels += 1
        if not self.done:
            threading.Timer(self._drain, self.end, (125,)).start()


def failure(joint, timeout=10.0):
    with pytest.raises(DriveError) as caught:
        joint.wait(timeout)
    return caught.value.errno


def test_it_is_done_when_all_parts_are():
    first, second = Part(3), Part(4)
    joint = JointRequest([first, second])
    assert not joint.done and not joint.wait(0)
    first.end(seconds=0.5)
    assert not joint.done and not joint.wait(0.01)
    second.end(seconds=0.25)
    assert joint.done and joint.wait() and joint.wait(0)
    assert (joint.nbytes, joint.seconds) == (7, 0.5)


def test_no_parts_are_done_at_once():
    joint = JointRequest([])
    assert joint.done and joint.wait() and (joint.nbytes, joint.seconds) == (0, 0.0)


def test_a_timeout_is_for_all_parts_together():
    joint = JointRequest([Part() for _ in range(5)])
    began = time.monotonic()
    assert not joint.wait(0.2)
    assert 0.15 < time.monotonic() - began < 1.0


def test_it_waits_for_parts_that_end_in_any_order():
    parts = [Part() for _ in range(4)]
    joint = JointRequest(parts)
    for number, part in enumerate(reversed(parts)):
        threading.Timer(0.02 * number, part.end).start()
    assert joint.wait(10)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_first_failure_cancels_the_others_and_is_raised_every_time(failing):
    parts = [Part() for _ in range(3)]
    joint = JointRequest(parts)
    threading.Timer(0.05, parts[failing].end, (5,)).start()
    assert [failure(joint) for _ in range(3)] == [5, 5, 5]
    assert joint.done
    assert all(part.cancels for part in parts)


def test_a_failure_is_raised_only_when_nothing_is_in_flight_any_more():
    slow = Part(drain=0.2)
    joint = JointRequest([slow, Part().end(5)])
    assert not joint.wait(0.02), "the deadline comes first"
    assert not slow.done
    assert failure(joint) == 5
    assert slow.done


def test_a_failure_is_the_same_for_every_thread():
    parts = [Part(drain=0.05), Part(), Part(drain=0.02)]
    joint = JointRequest(parts)
    found = []
    threads = [threading.Thread(target=lambda: found.append(failure(joint))) for _ in range(4)]
    for thread in threads:
        thread.start()
    parts[1].end(28)
    for thread in threads:
        thread.join(10)
    assert found == [28] * 4


def test_cancelling_twice_and_when_done_is_harmless():
    joint = JointRequest([Part(), Part()])
    joint.cancel()
    joint.cancel()
    assert failure(joint) == 125
    done = JointRequest([Part().end(), Part().end()])
    done.cancel()
    assert done.wait()


def test_dropping_it_drops_every_part_at_once():
    """Requests cancel and drain when they go."""
    parts = [Part(), Part()]
    gone = [weakref.ref(part) for part in parts]
    joint = JointRequest(parts)
    joint.wait(0)
    parts.clear()
    del joint
    assert [ref() for ref in gone] == [None, None]


def test_a_kept_error_keeps_no_part():
    class Weak(Part):
        alive = 0

        def __init__(self):
            super().__init__()
            Weak.alive += 1

        def __del__(self):
            Weak.alive -= 1

    joint = JointRequest([Weak().end(5), Weak()])
    gc.disable()
    try:
        with pytest.raises(DriveError):
            joint.wait()
        del joint
        time.sleep(0.05)  # the fake's timer
        assert Weak.alive == 0
    finally:
        gc.enable()


def test_an_error_that_is_kept_keeps_no_request():
    class Interrupted(Part):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    joint = JointRequest([Interrupted(), Interrupted()])
    with pytest.raises(KeyboardInterrupt) as kept:
        joint.wait()
    traceback.clear_frames(kept.tb)  # as the coordinator does
    alive = weakref.ref(joint)
    del joint
    assert alive() is None
