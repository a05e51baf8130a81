"""Numbers and values as they stand in reports and messages."""

from __future__ import annotations

from typing import Any

GIB = float(1 << 30)
LONGEST_ECHO = 80  # characters of a value that a message repeats


def size_text(count: float) -> str:
    """`1.25 GiB`, or `12.50 MiB` below a tenth of a GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.2f} MiB"


def brief(value: Any) -> str:
    """`value` as a message echoes it: what a user or a file gave may be of any length."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * LONGEST_ECHO:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write out a very long one
    try:
        text = repr(value[: LONGEST_ECHO + 1] if isinstance(value, (str, bytes)) else value)
    except Exception as error:  # whatever a stranger's __repr__ raises, the message is about something else
        return f"{type(value).__name__} (its repr raises {type(error).__name__})"
    return text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}..."
