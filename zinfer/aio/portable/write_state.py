"""What a file open for writing knows besides its descriptor: who writes it, how far, how long it will be.

    file     |####|####|##..|    |         # = written, . = zeros that complete the last block
                      ^size ^touched      close() cuts the file at size

All in bytes.
"""

from __future__ import annotations

import math
import threading

from zinfer.aio.portable.request import Progress
from zinfer.errors import ClosedError, OptionError


class WriteState:
    """Shared by the descriptor and the requests on it.

    Any thread may claim; `touch`, `wrote` and `release` are for the reactor of the one engine that has claims, and
    take no lock (see request.py).
    """

    def __init__(self, size: int) -> None:
        self.size = size  # bytes: what was reserved or, if that is more, the end of what was written
        self._touched = 0
        self._refused = False
        self._claims: dict[Progress, int] = {}
        self._lock = threading.RLock()  # of claim() alone; the cycle collector may claim within a claim

    def claim(self, path: str, progress: Progress, engine: int) -> None:
        """Let the request write. Raises ClosedError once refused, OptionError while another engine has claims.

        Blocks that two requests share are kept whole by the one reactor that sees both.
        """
        with self._lock:
            if any(other != engine for other in list(self._claims.values())):
                raise OptionError(
                    f"{path}: another engine is writing to this file; wait for its requests, or use that engine"
                )
            self._claims[progress] = engine
            if self._refused:  # asked last: who refuses first waits for every claim that is seen afterwards
                del self._claims[progress]
                raise ClosedError(f"{path}: the file was closed; open it again to write it")

    def release(self, progress: Progress) -> None:
        """The request has ended, or was never submitted."""
        self._claims.pop(progress, None)

    def refuse_and_wait(self) -> None:
        """Let no claim succeed any more; return when the last has been released."""
        self._refused = True
        while waited_for := list(self._claims):
            waited_for[0].wait_until(math.inf)

    def touch(self, first: int, last: int) -> bool:
        """Mark [first, last). Whether nothing at or behind `first` was marked before: there the file holds zeros."""
        fresh = first >= self._touched
        self._touched = max(self._touched, last)
        return fresh

    def wrote(self, end: int) -> None:
        """Bytes up to `end` are in the file."""
        self.size = max(self.size, end)
