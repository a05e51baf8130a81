"""zinfer: run models far larger than memory; weights stream from NVMe in the order operators use them."""

from zinfer._version import __version__
from zinfer.errors import (
    BudgetError,
    CheckpointChangedError,
    CheckpointError,
    ClosedError,
    DriveError,
    OptionError,
    OutOfMemoryError,
    ReadOnlyError,
    StoreError,
    ZinferError,
)
from zinfer.planner.plan import Plan
from zinfer.planning import plan
from zinfer.report import Report
from zinfer.run import run

__all__ = [
    "BudgetError",
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "DriveError",
    "OptionError",
    "OutOfMemoryError",
    "Plan",
    "ReadOnlyError",
    "Report",
    "StoreError",
    "ZinferError",
    "__version__",
    "plan",
    "run",
]
