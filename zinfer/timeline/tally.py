"""What one thread's operators cost, so that sweeps on several threads are told apart."""

from __future__ import annotations

import threading


class Tally(threading.local):
    """Running totals of the calling thread, for one model. Each thread sees, and changes, only its own."""

    asked: int = 0  # bytes of the reads that this thread started, ahead or on demand
    waited: float = 0.0  # seconds blocked for weights: for the drive, or for room in the window
    hits: int = 0  # uses served by a read started earlier
    misses: int = 0  # uses that had to be read on demand
