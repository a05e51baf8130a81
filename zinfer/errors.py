"""Every exception zinfer raises on purpose.

    ZinferError
    +-- OptionError         (ValueError)   an option that is unknown, contradictory or would have no effect
    +-- BudgetError         (MemoryError)  the memory budget cannot hold what must be held at once
    |   +-- OutOfMemoryError               memory ran out that the budget allows, mostly in the middle of a pass
    +-- CheckpointError     (ValueError)   the checkpoint is incomplete, malformed or not supported
    |   +-- CheckpointChangedError         a file was altered while it was streamed
    +-- StoreError          (OSError)      the folder under `nvme_path` cannot be used
    +-- DriveError          (OSError)      a read or write failed, came up short, or could not be submitted
    +-- ReadOnlyError       (RuntimeError) an attempt to write to a streamed parameter
    +-- ClosedError         (RuntimeError) use after close(), or in a forked child

A message names the file, the tensor or the option, the numbers involved, and the remedy.
"""

from __future__ import annotations


class ZinferError(Exception):
    """Base of all zinfer errors."""


class OptionError(ZinferError, ValueError):
    """An option is unknown, contradicts another, or would have no effect."""


class BudgetError(ZinferError, MemoryError):
    """The memory budget cannot hold what has to be in memory at the same time.

    Attribute: `smallest`, the fewest bytes of budget that work, where that is known, else None.
    """

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class OutOfMemoryError(BudgetError):
    """Memory ran out that the budget allows. In a pass, some was given back, so that the next call has more room.

    One that ends a pass is a torch.OutOfMemoryError as well; one that zinfer.run raises, as it takes memory, is not.
    """


class CheckpointError(ZinferError, ValueError):
    """A checkpoint is incomplete, malformed or of an unsupported kind."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint file was altered while it was being streamed."""


class StoreError(ZinferError, OSError):
    """The folder under `nvme_path` cannot be written, is too small, or holds damaged data."""


class DriveError(ZinferError, OSError):
    """A read or write failed.

    Attributes: `path`, `offset` and `length` (bytes) of the piece that failed, `errno` (0 when the
    file ended early), `backend`.
    """

    def __init__(self, message: str, path: str, offset: int, length: int, errno: int, backend: str) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.length = length
        self.errno = errno
        self.backend = backend


class ReadOnlyError(ZinferError, RuntimeError):
    """A streamed parameter was asked to change; its bytes belong to the checkpoint."""


class ClosedError(ZinferError, RuntimeError):
    """Something was used after it was closed."""
