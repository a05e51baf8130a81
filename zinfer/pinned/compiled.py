"""Whether the compiled modules are in use, for `zinfer.pinned` and `zinfer.aio`, and one warning where they are not.

Where they could not be built, Python code takes their place: slower, never wrong. ZINFER_PORTABLE=1 in the
environment asks for that, to try it or to work round a fault in the compiled code. It is read as the modules are
imported, before a command could turn an error into a message: so all the usual words for yes and no will do.
"""

from __future__ import annotations

import logging
import os

from zinfer.errors import OptionError

VARIABLE = "ZINFER_PORTABLE"
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
REMEDY = (
    "install g++, and liburing-dev for io_uring, then install zinfer again: "
    "pip install --no-deps --force-reinstall ."
)

logger = logging.getLogger("zinfer")
_warned: list[str] = []


def portable_wanted() -> bool:
    """Whether the environment asks for the portable code, in any case of letters. Raises OptionError for others."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in YES + NO:
        raise OptionError(
            f'{VARIABLE} must be "1" (portable code) or "0" (compiled if it was built), not "{value}"'
        )
    return value in YES


def reason_of(error: ImportError | None) -> str:
    """Why portable code is in use, for people; `error` is None where it was asked for. Warns the first time."""
    if error is None:
        return f"{VARIABLE}={os.environ.get(VARIABLE)} is set"
    if not _warned:
        _warned.append(str(error))
        logger.warning(
            "zinfer's compiled modules are not in use (%s): files are read by Python code, more slowly, and memory "
            "cannot be page-locked. To build them: %s",
            error,
            REMEDY,
        )
    return str(error)
